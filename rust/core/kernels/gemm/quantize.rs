//! Rounding with a receipt: few bits per element, and a bound on what they leave out of every inner product.
//!
//! A row becomes `x = x_q + e_x`, a feature `w = w_q + e_w`, with `x_q`, `w_q` on a grid of 8-bit or 16-bit integers, or
//! bf16. Then
//!
//! ```text
//! |x·w − x_q·w_q|  =  |e_x·w + x_q·e_w|  ≤  |e_x| |w| + |x_q| |e_w|          (Cauchy–Schwarz, with the norms measured)
//! ```
//!
//! holds always: the deterministic certificate. With dithered rounding, `q = ⌊v/step + u⌋` with `u` uniform in `[0, 1)`,
//! the errors are independent, of mean zero and each within an interval of one step, so by Hoeffding's inequality
//!
//! ```text
//! P( |e_x·w| ≥ step · h · |w| ) ≤ 2 exp(−2h²),
//! ```
//!
//! which does not grow with the width. [`FAILURE`] is the probability granted per inner product. 16-bit words need no luck:
//! scaled so that sums of products just fit into 32 bits, they leave out some 1e-4 of a norm.

use super::narrow;
use crate::kernels::isa::per_isa;

/// Probability that one dithered inner product leaves its bound.
pub const FAILURE: f64 = 1e-18;

/// Below this no reciprocal of a step is formed.
const TINY: f32 = 1e-30;
/// Adding it rounds a float of magnitude below 2^22 to an integer, ties to even, whose last bits are those of the sum:
/// those of a conversion, which would have to mind numbers out of range.
const MAGIC: f32 = 12_582_912.0;

/// What bytes keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest magnitude. Even: dithering adds up to half a step to the largest element, and a tie goes to the even number.
    top: f32,
    /// Largest norm of a part of [`narrow`], where those are bounded.
    part_norm: Option<f64>,
}

impl Limits {
    /// Bytes whose products are added in 32 bits.
    pub const FULL: Self = Self { top: 126.0, part_norm: None };
    /// Bytes whose products are added in 16 bits.
    pub const NARROW: Self = Self { top: narrow::TOP, part_norm: Some(narrow::PART_NORM) };
}

/// Norm that a vector of words is scaled to, at most. With half a step per element on top it stays below `2^15.5` up to width
/// [`WIDEST_WORDS`], so that a sum of products, and every part of one, stays below `2^31` by Cauchy–Schwarz.
const WORD_NORM: f64 = 46_000.0;
/// Largest magnitude of a rounded word.
const TOP_WORD: f64 = 32_767.0;
/// Width up to which sums of products of words fit into 32 bits.
pub const WIDEST_WORDS: usize = 1 << 18;

/// `h` of the module documentation; two roundings share [`FAILURE`].
pub fn hoeffding() -> f64 {
    ((4.0 / FAILURE).ln() / 2.0).sqrt()
}

/// What rounding a vector has cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rounding {
    /// The grid's step; 1 for bf16.
    pub step: f32,
    /// Norm of the part that was rounded away.
    pub residual: f64,
    /// Bound on the inner product of that part with a vector, per unit of the vector's norm.
    pub share: f64,
}

impl Rounding {
    /// No rounding at all.
    pub const EXACT: Self = Self { step: 1.0, residual: 0.0, share: 0.0 };

    /// From the squares of the errors in units of `unit`, which lets none of them leave the range of f32. Without a unit the vector
    /// was too small for a grid: all of it is rounded away, or may be.
    #[inline(always)]
    fn certain(step: f32, unit: f32, squares: [f32; 16], v: &[f32]) -> Self {
        let errors = if unit > 0.0 {
            squares.into_iter().map(f64::from).sum::<f64>().sqrt() * f64::from(unit)
        } else {
            v.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
        };
        // The factor covers the rounding of the squares and of their sums.
        let residual = errors * 1.001;
        Self { step, residual, share: residual }
    }
}

/// Largest magnitude of an element.
#[inline(always)]
fn largest(v: &[f32]) -> f32 {
    let mut tops = [0.0_f32; 16];
    let (whole, rest) = v.as_chunks::<16>();
    for v in whole {
        for l in 0..16 {
            tops[l] = if v[l].abs() > tops[l] { v[l].abs() } else { tops[l] };
        }
    }
    tops.into_iter().chain(rest.iter().map(|v| v.abs())).fold(0.0, f32::max)
}

/// Rounds every element, given its number and its place among sixteen: whole sixteens are what compilers make vectors of.
#[inline(always)]
fn each<T>(v: &[f32], to: &mut [T], round: &mut impl FnMut(usize, usize, f32) -> T) {
    let ((whole, rest), (to_whole, to_rest)) = (v.as_chunks::<16>(), to.as_chunks_mut::<16>());
    for (i, (v, to)) in whole.iter().zip(to_whole).enumerate() {
        for l in 0..16 {
            to[l] = round(i * 16 + l, l, v[l]);
        }
    }
    for (l, (v, to)) in rest.iter().zip(to_rest).enumerate() {
        *to = round(whole.len() * 16 + l, l, *v);
    }
}

/// A step of at least `grid`, and a factor that never takes a vector beyond what the grid was made for; zeros for no grid.
#[inline(always)]
fn steps(grid: f64) -> (f32, f32) {
    if grid < f64::from(TINY) { (0.0, 0.0) } else { (up(grid), ((1.0 / grid) as f32).next_down()) }
}

#[inline(always)]
fn bytes_body<const FUSED: bool>(v: &[f32], limits: Limits, dither: Option<u32>, to: &mut [u8]) -> Rounding {
    let top = largest(v);
    let part_norm = limits.part_norm.filter(|_| top >= TINY);
    let part = part_norm.map_or(0.0, |norm| f64::from(narrow::largest_part(v, top)) / norm);
    let (step, inverse) = steps(f64::from(top) * part.max(1.0 / f64::from(limits.top)));
    let mut squares = [0.0_f32; 16];
    let mut round = |i: usize, l: usize, v: f32| {
        let shift = dither.map_or(0.0, |seed| noise(i as u32, seed) - 0.5);
        let sum = v * inverse + shift + MAGIC;
        let e = (v - (sum - MAGIC) * step) * inverse;
        squares[l] += e * e;
        sum.to_bits() as u8
    };
    each(v, to, &mut round);
    let certain = Rounding::certain(step, step, squares, v);
    match dither {
        Some(_) if step > 0.0 => {
            let likely = f64::from(step) * hoeffding();
            // What overflowed is not a number, and must not pass for the smaller one.
            Rounding { share: if likely < certain.residual { likely } else { certain.residual }, ..certain }
        }
        _ => certain,
    }
}

/// A number in `[0, 1)` for element `i`, from a fixed sequence per seed.
#[inline(always)]
fn noise(i: u32, seed: u32) -> f32 {
    let mut z = i.wrapping_mul(0x9e37_79b9) ^ seed;
    z = (z ^ (z >> 16)).wrapping_mul(0x85eb_ca6b);
    z = (z ^ (z >> 13)).wrapping_mul(0xc2b2_ae35);
    ((z ^ (z >> 16)) >> 8) as f32 / 16_777_216.0
}

per_isa! {
    /// Rounds `v` to signed bytes in two's complement, on a grid that spans its largest element; dithered by a seed.
    pub fn bytes(v: &[f32], limits: Limits, dither: Option<u32>, to: &mut [u8]) -> Rounding = bytes_body;
}

#[inline(always)]
fn words_body<const FUSED: bool>(v: &[f32], norm: f64, to: &mut [i16]) -> Rounding {
    let top = f64::from(largest(v));
    let (step, inverse) = steps((norm / WORD_NORM).max(top / TOP_WORD));
    let mut squares = [0.0_f32; 16];
    let mut round = |_: usize, l: usize, v: f32| {
        let sum = v * inverse + MAGIC;
        let e = (v - (sum - MAGIC) * step) * inverse;
        squares[l] += e * e;
        sum.to_bits() as i16
    };
    each(v, to, &mut round);
    let mut rounding = Rounding::certain(step, step, squares, v);
    // `q · step` has up to 15 bits more than a byte's, and its rounding may hide that much of the residual.
    rounding.residual += norm * 2.0_f64.powi(-23);
    rounding.share = rounding.residual;
    rounding
}

per_isa! {
    /// Rounds `v` of norm `norm` to signed 16-bit integers, on a grid as fine as exact sums of 32 bits allow.
    ///
    /// The grid is set by the norm, not by the largest element: outlier dimensions do not coarsen it.
    pub fn words(v: &[f32], norm: f64, to: &mut [i16]) -> Rounding = words_body;
}

#[inline(always)]
fn brain_floats_body<const FUSED: bool>(v: &[f32], to: &mut [u16]) -> Rounding {
    let (unit, inverse) = steps(largest(v).into());
    let mut squares = [0.0_f32; 16];
    let mut round = |_: usize, l: usize, v: f32| {
        let bits = v.to_bits();
        let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        // The dot product instruction takes subnormal numbers for zero.
        let rounded = if rounded & 0x7f80 == 0 { 0 } else { rounded };
        let e = (v - f32::from_bits(rounded << 16)) * inverse;
        squares[l] += e * e;
        rounded as u16
    };
    each(v, to, &mut round);
    Rounding::certain(1.0, unit, squares, v)
}

per_isa! {
    /// Rounds `v` to bf16, to nearest even. Magnitudes stay below 3e38.
    pub fn brain_floats(v: &[f32], to: &mut [u16]) -> Rounding = brain_floats_body;
}

/// The next f32 above `v`, or `v` where it is one.
pub fn up(v: f64) -> f32 {
    let rounded = v as f32;
    if f64::from(rounded) < v { rounded.next_up() } else { rounded }
}

/// The next f32 below `v`, or `v` where it is one.
pub fn down(v: f64) -> f32 {
    -up(-v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn bytes_and_step_give_the_vector_back_within_the_residual() {
        let v: Vec<f32> = (0..100).map(|i| ((i * 31) % 47) as f32 - 20.0).collect();
        let limits = [Limits::FULL, Limits::NARROW];
        for (limits, dither) in limits.into_iter().flat_map(|limits| [(limits, None), (limits, Some(7))]) {
            let mut q = vec![0; v.len()];
            let r = bytes(Isa::PLAIN, &v, limits, dither, &mut q);
            let error: f64 = v
                .iter()
                .zip(&q)
                .map(|(v, q)| f64::from(v - f32::from(q.cast_signed()) * r.step).powi(2))
                .sum();
            assert!(error.sqrt() <= r.residual && r.residual < f64::from(r.step) * 10.0);
        }
    }

    /// One element larger by `outlier` than the rest.
    fn with_outlier(d: usize, outlier: f32) -> Vec<f32> {
        let mut v: Vec<f32> = (0..d).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
        v[d / 2] = outlier;
        v
    }

    #[test]
    fn words_and_step_give_the_vector_back_within_the_residual_whatever_the_outliers() {
        for (d, outlier) in [(1, 1.0), (7, -2.0), (512, 1.0), (512, 1e4), (4096, -30.0), (100, 0.0)] {
            let v = with_outlier(d, outlier);
            let norm = v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            for isa in Isa::available() {
                let mut q = vec![0; d];
                let r = words(isa, &v, norm, &mut q);
                let square = |v: f64| v * v;
                let error: f64 = v
                    .iter()
                    .zip(&q)
                    .map(|(v, q)| square(f64::from(*v) - f64::from(*q) * f64::from(r.step)))
                    .sum();
                assert!(error.sqrt() <= r.residual && r.residual <= norm * 1e-3, "{isa:?} d={d} {outlier}");
                let size: i64 = q.iter().map(|q| i64::from(*q).pow(2)).sum();
                assert!(size < 1 << 31, "{isa:?}: products of two such vectors leave 32 bits");
            }
        }
    }

    #[test]
    fn words_of_the_widest_vectors_keep_their_products_within_32_bits() {
        let v = with_outlier(WIDEST_WORDS, 1.0);
        let norm = v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let mut q = vec![0; v.len()];
        words(Isa::PLAIN, &v, norm, &mut q);
        assert!(q.iter().map(|q| i64::from(*q).pow(2)).sum::<i64>() < 1 << 31);
    }

    #[test]
    fn dithered_bytes_are_unbiased() {
        let v = [1.0_f32, 0.3, -0.7111];
        let mut sums = [0.0_f64; 3];
        for seed in 0..20_000 {
            let mut q = [0; 3];
            let r = bytes(Isa::PLAIN, &v, Limits::FULL, Some(seed), &mut q);
            for (sum, q) in sums.iter_mut().zip(q) {
                *sum += f64::from(q.cast_signed()) * f64::from(r.step) / 20_000.0;
            }
        }
        for (sum, v) in sums.iter().zip(v) {
            assert!((sum - f64::from(v)).abs() < 2e-4, "{sum} {v}");
        }
    }

    #[test]
    fn dithering_never_carries_the_largest_element_out_of_the_range_of_a_byte() {
        let almost_one = (0..20_000_000).filter(|&seed| noise(0, seed) > 1.0 - 2.0_f32.powi(-18)).take(40);
        for (i, seed) in almost_one.enumerate() {
            let v = [1.0 + i as f32 / 17.0, -0.3];
            let mut q = [0; 2];
            let r = bytes(Isa::PLAIN, &v, Limits::FULL, Some(seed), &mut q);
            let error = v[0] - f32::from(q[0].cast_signed()) * r.step;
            assert!(error.abs() <= r.step * 1.001, "{v:?} became {} steps of {}", q[0].cast_signed(), r.step);
        }
    }

    #[test]
    fn a_vector_whose_rotation_overflowed_has_no_bound() {
        let mut v = vec![1e30; 64];
        v[16] = f32::NAN;
        for (isa, dither) in Isa::available().flat_map(|isa| [(isa, None), (isa, Some(7))]) {
            let r = bytes(isa, &v, Limits::FULL, dither, &mut [0; 64]);
            assert!(!r.share.is_finite() && !r.residual.is_finite(), "{isa:?} {dither:?}: {r:?}");
        }
    }

    #[test]
    fn brain_floats_that_are_brain_floats_lose_nothing() {
        let v: Vec<f32> = (0..40).map(|i| i as f32 - 17.0).collect();
        let mut q = vec![0; 40];
        assert_eq!(brain_floats(Isa::PLAIN, &v, &mut q).residual.to_bits(), 0);
        assert!(v.iter().zip(&q).all(|(v, q)| f32::from_bits(u32::from(*q) << 16).to_bits() == v.to_bits()));
    }
}
