//! Counts, sums, sums of squares and maxima per feature, from sparse codes.
//!
//! One feature's accumulators lie side by side in 32 bytes, so that a slot of a code costs one cache line and not four.
//! With k slots per row the work is k scattered additions. The accumulators of 131,072 features are 4 MiB and leave the
//! second-level cache; which lines the next slots need is known from their indices, so they are asked for ahead.

use super::prefetch::fetch;

/// Accumulators of one feature: over all tokens, h² uncentred.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(32))]
pub struct Moments {
    /// Σ h.
    pub sum: f64,
    /// Σ h², in f64 because the square of an activation leaves half and soon single precision.
    pub sum_sq: f64,
    /// Number of tokens with h > 0.
    pub fires: u64,
    /// Largest h, 0 where the feature never fires.
    pub max: f32,
}

/// [`Moments`] of many features, column by column.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    /// Number of tokens with h > 0.
    pub fires: Vec<u64>,
    /// Σ h.
    pub sum: Vec<f64>,
    /// Σ h².
    pub sum_sq: Vec<f64>,
    /// Largest h.
    pub max: Vec<f32>,
}

/// Slots between the request for a line and its use: the time of one access to the third-level cache, or to memory.
const AHEAD: usize = 64;

/// Bits of the largest finite f32.
const LARGEST: u32 = f32::MAX.to_bits();

impl Moments {
    /// Adds one activation h > 0.
    #[inline]
    fn fire(&mut self, h: f32) {
        let wide = f64::from(h);
        self.sum += wide;
        self.sum_sq += wide * wide;
        self.fires += 1;
        self.max = if h > self.max { h } else { self.max };
    }

    /// Adds one activation h < 0, which codes without a rectifier hold: it does not fire.
    fn suppress(&mut self, h: f32) {
        let wide = f64::from(h);
        self.sum += wide;
        self.sum_sq += wide * wide;
    }

    /// The accumulators of many features as one column each.
    pub fn columns(cells: &[Self]) -> Columns {
        Columns {
            fires: cells.iter().map(|c| c.fires).collect(),
            sum: cells.iter().map(|c| c.sum).collect(),
            sum_sq: cells.iter().map(|c| c.sum_sq).collect(),
            max: cells.iter().map(|c| c.max).collect(),
        }
    }

    /// Adds what another block has counted.
    pub fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.sum_sq += other.sum_sq;
        self.fires += other.fires;
        self.max = self.max.max(other.max);
    }
}

/// Adds the slots `(indices, values)` to `cells`, one cell per feature. `false` at a slot that is not finite or lies
/// outside the dictionary.
#[must_use]
pub fn accumulate(cells: &mut [Moments], indices: &[u32], values: &[f32]) -> bool {
    for (slot, (&index, &h)) in indices.iter().zip(values).enumerate() {
        if let Some(&later) = indices.get(slot + AHEAD) {
            fetch(cells, later as usize);
        }
        // One comparison for "positive and finite": the bits of such floats are 1..=LARGEST.
        if h.to_bits().wrapping_sub(1) < LARGEST {
            match cells.get_mut(index as usize) {
                Some(cell) => cell.fire(h),
                None => return false,
            }
        } else if h != 0.0 {
            match cells.get_mut(index as usize) {
                Some(cell) if h.is_finite() => cell.suppress(h),
                _ => return false,
            }
        }
    }
    true
}
