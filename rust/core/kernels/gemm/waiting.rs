//! The candidates of one row: features whose bound reaches the row's threshold, until they are scored or dropped.
//!
//! Bounds and features lie in arrays of their own, so that the search for a threshold reads bounds alone, a register at a
//! time. It need not find the `k`-th bound to the last bit: a bisection that ends once a few more than `k` reach the
//! threshold takes a third of the time of a selection.

#![allow(clippy::inline_always)] // bodies of `per_isa`, which compiles each once per instruction set

use super::hits::take_down;
use super::sift::sift;
use super::tile::COLS;
use crate::kernels::isa::{Isa, per_isa};
use crate::kernels::sieve::{key, score_of};

/// What `make_room` has made.
const ROOM: &str = "room for the hits of a panel";
/// Of how many candidates wanted one more may reach the threshold.
const SPARE: usize = 8;

/// Candidates that a row has room for at first: most need no more.
const FIRST_ROOM: usize = 7 * COLS;

/// Candidates of a row, in the order in which they came: the first `len` of either array. The arrays are longer, so that
/// hits are stored where they belong: to lengthen them would clear first what is about to be written.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting {
    len: usize,
    upper: Vec<f32>,
    feature: Vec<u32>,
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds the features of a panel, which begins with feature `first`, whose bit in `hits` is set.
    #[inline]
    pub(super) fn push_hits(&mut self, isa: Isa, upper: &[f32; COLS], hits: u32, first: u32) {
        self.make_room();
        let bounds = self.upper[self.len..].first_chunk_mut().expect(ROOM);
        let features = self.feature[self.len..].first_chunk_mut().expect(ROOM);
        self.len += take_down(isa, upper, hits, first, bounds, features);
    }

    /// Room for the hits of a panel.
    fn make_room(&mut self) {
        if self.len + COLS > self.upper.len() {
            let room = 2 * self.upper.len() + FIRST_ROOM;
            self.upper.resize(room, 0.0);
            self.feature.resize(room, 0);
        }
    }

    fn bounds(&self) -> &[f32] {
        &self.upper[..self.len]
    }

    /// How many candidates reach `bar`; what is not a number bounds nothing, and is not counted.
    pub(super) fn reaching(&self, isa: Isa, bar: f32) -> usize {
        count(isa, self.bounds(), bar) as usize
    }

    /// A candidate's bound that at least `k` of them reach, and not many more unless they are equal; minus infinity when
    /// there are fewer.
    pub(super) fn threshold(&self, isa: Isa, k: usize) -> f32 {
        let lowest = least_of(isa, self.bounds(), f32::NEG_INFINITY);
        let mut reaching = self.reaching(isa, lowest);
        if reaching < k {
            return f32::NEG_INFINITY;
        }
        // At least `k` candidates reach `low`; fewer reach `high`.
        let (mut low, mut high) = (key(lowest), key(largest(isa, self.bounds())) + 1);
        while reaching > k + k / SPARE && high - low > 1 {
            let middle = low + (high - low) / 2;
            let above = self.reaching(isa, score_of(middle));
            if above < k {
                high = middle;
            } else {
                (low, reaching) = (middle, above);
            }
        }
        // An infinite bound is one that overflowed: all that is known of it is that it lies beyond f32.
        least_of(isa, self.bounds(), score_of(low)).min(f32::MAX)
    }

    /// Drops the candidates below `bar`.
    pub(super) fn drop_below(&mut self, isa: Isa, bar: f32) {
        let (upper, feature) = (&mut self.upper[..self.len], &mut self.feature[..self.len]);
        self.len = sift::<true>(isa, upper, feature, bar, &mut []).kept;
    }

    /// Moves the features of the candidates that reach `bar` to `taken`, whose former contents are lost.
    pub(super) fn take_reaching(&mut self, isa: Isa, bar: f32, taken: &mut Vec<u32>) {
        taken.resize(self.len, 0);
        let (upper, feature) = (&mut self.upper[..self.len], &mut self.feature[..self.len]);
        let sifted = sift::<false>(isa, upper, feature, bar, taken);
        taken.truncate(sifted.taken);
        self.len = sifted.kept;
    }
}

/// Whether a candidate stays; a bound that is not a number bounds nothing, so it does.
pub(super) fn reaches(upper: f32, bar: f32) -> bool {
    upper >= bar || upper.is_nan()
}

#[inline(always)]
fn count_body<const FUSED: bool>(upper: &[f32], bar: f32) -> u32 {
    upper.iter().map(|&upper| u32::from(upper >= bar)).sum()
}

per_isa! {
    /// How many bounds are numbers of at least `bar`.
    fn count(upper: &[f32], bar: f32) -> u32 = count_body;
}

/// Numbers compared side by side.
const LANES: usize = 16;

#[inline(always)]
fn lesser(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// What `pick` leaves of all bounds, each as `read` reads it, and of `start`, which stands for none.
#[inline(always)]
fn extreme(upper: &[f32], start: f32, read: impl Fn(f32) -> f32, pick: impl Fn(f32, f32) -> f32) -> f32 {
    let (chunks, rest) = upper.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for upper in chunks {
        lanes = std::array::from_fn(|l| pick(lanes[l], read(upper[l])));
    }
    let whole = lanes.into_iter().fold(start, &pick);
    rest.iter().fold(whole, |best, upper| pick(best, read(*upper)))
}

#[inline(always)]
fn least_of_body<const FUSED: bool>(upper: &[f32], bar: f32) -> f32 {
    extreme(upper, f32::INFINITY, |upper| if upper >= bar { upper } else { f32::INFINITY }, lesser)
}

per_isa! {
    /// The least bound of at least `bar`; infinity where there is none.
    fn least_of(upper: &[f32], bar: f32) -> f32 = least_of_body;
}

#[inline(always)]
fn largest_body<const FUSED: bool>(upper: &[f32]) -> f32 {
    extreme(upper, f32::NEG_INFINITY, |upper| upper, larger)
}

per_isa! {
    /// The largest bound that is a number; minus infinity where none is.
    fn largest(upper: &[f32]) -> f32 = largest_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(upper: &[f32]) -> Waiting {
        Waiting { len: upper.len(), upper: upper.to_vec(), feature: (0..upper.len() as u32).collect() }
    }

    #[test]
    fn at_least_k_reach_the_threshold_and_few_more() {
        let upper: Vec<f32> =
            (0..500_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 - 4e6).collect();
        let waiting = waiting(&upper);
        for (isa, k) in Isa::available().flat_map(|isa| [1, 7, 32, 250, 499, 500].map(|k| (isa, k))) {
            let reaching = waiting.reaching(isa, waiting.threshold(isa, k));
            assert!((k..=k + k / SPARE).contains(&reaching), "{isa:?}: {reaching} of {k}");
        }
        assert_eq!(waiting.threshold(Isa::PLAIN, 501), f32::NEG_INFINITY);
    }

    #[test]
    fn equal_bounds_reach_the_threshold_together_and_what_is_no_number_is_not_counted() {
        let upper = [2.0, f32::NAN, 1.0, 1.0, -0.0, 0.0, f32::INFINITY, -f32::NAN, 1.0];
        for isa in Isa::available() {
            let mut waiting = waiting(&upper);
            assert_eq!([1, 2, 3, 5].map(|k| waiting.threshold(isa, k)), [f32::MAX, 2.0, 1.0, 1.0]);
            assert_eq!([6, 7, 8].map(|k| waiting.threshold(isa, k)), [0.0, 0.0, f32::NEG_INFINITY]);
            waiting.drop_below(isa, 1.0);
            let mut taken = vec![9];
            waiting.take_reaching(isa, 2.0, &mut taken);
            assert_eq!((taken, &waiting.feature[..waiting.len]), (vec![0, 1, 6, 7], &[2, 3, 8][..]));
        }
    }

    #[test]
    fn what_reaches_a_bar_is_kept_or_taken_in_order_whatever_the_number_of_candidates() {
        for (isa, n) in Isa::available().flat_map(|isa| [0, 1, 7, 8, 9, 64, 301].map(|n| (isa, n))) {
            let upper: Vec<f32> = (0..n).map(|i| (i * 37 % 101) as f32).collect();
            let of = |wanted: &dyn Fn(f32) -> bool| -> Vec<u32> {
                upper
                    .iter()
                    .zip(0..)
                    .filter(|(upper, _)| wanted(**upper))
                    .map(|(_, feature)| feature)
                    .collect()
            };
            for bar in [0.0, 50.0, 100.0, f32::INFINITY, f32::NEG_INFINITY] {
                let (mut kept, mut rest, mut taken) = (waiting(&upper), waiting(&upper), Vec::new());
                kept.drop_below(isa, bar);
                rest.take_reaching(isa, bar, &mut taken);
                let (above, below) = (of(&|upper| upper >= bar), of(&|upper| upper < bar));
                assert_eq!((&kept.feature[..kept.len], &taken), (&above[..], &above), "{isa:?} {n} {bar}");
                assert_eq!(rest.feature[..rest.len], below[..], "{isa:?} {n} {bar}");
                let bounds: Vec<f32> = below.iter().map(|&feature| upper[feature as usize]).collect();
                assert_eq!(rest.bounds(), bounds);
            }
        }
    }

    #[test]
    fn of_no_candidates_none_reaches() {
        for isa in Isa::available() {
            assert_eq!(Waiting::default().threshold(isa, 1), f32::NEG_INFINITY);
            assert_eq!(waiting(&[f32::NAN]).threshold(isa, 1), f32::NEG_INFINITY);
        }
    }
}
