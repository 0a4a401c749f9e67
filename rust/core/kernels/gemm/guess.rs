//! Thresholds guessed from a sample of the features.
//!
//! Bounds and scores prove a row's threshold late: of the first 512 features of 16,384, the 32 best say little of the 32 best of
//! all, and hundreds of candidates wait for a threshold that drops them. But the panels that are visited first, an eighth, are
//! spread over the dictionary, and so is every beginning of them: a sample. Of a set of which `k` reach some score, a
//! sample of a share `s` holds about a Poisson number of mean `k s` that do. A rank in the sample that such a number reaches
//! once in [`ONE_IN`] times is therefore taken for a threshold that `k` of all features reach.
//!
//! A wrong guess costs time, never a member: where the `k`-th best score of a row lies below what was guessed, the row is
//! screened again without a guess. Where that happens often, as it may with features in an order of their own, most passes do
//! without.

use std::sync::atomic::{AtomicU64, Ordering};

/// One panel in so many is of the sample.
const SAMPLE_ONE_IN: usize = 8;
/// How often a guess may be too high, in a sample that is one.
const ONE_IN: f64 = 1024.0;
/// One wrong guess in so many rows is still worth the others.
const WRONG_ONE_IN: u64 = 16;
/// Rows that are guessed before wrong ones count.
const TRIAL: u64 = 64;
/// Rows after which what was counted counts half.
const MEMORY: u64 = 1 << 16;
/// One pass in so many tries again after guesses were often wrong.
const RETRY_ONE_IN: u64 = 16;
/// Mean from which on `exp(-mean)` leaves the range of f64.
const LARGEST_MEAN: f64 = 700.0;

/// `0..n`: first a sample, one in [`SAMPLE_ONE_IN`], of which every beginning is spread; then the others as they come, since memory
/// is read fastest that way.
pub(super) fn sample_first(n: usize) -> Vec<usize> {
    let others = (0..n).filter(|i| i % SAMPLE_ONE_IN != 0);
    spread(sample_size(n)).map(|i| i * SAMPLE_ONE_IN).chain(others).collect()
}

/// How many of `n` are the sample.
pub(super) fn sample_size(n: usize) -> usize {
    n.div_ceil(SAMPLE_ONE_IN)
}

/// `0..n` in the order of their reversed bits.
fn spread(n: usize) -> impl Iterator<Item = usize> {
    let places = n.next_power_of_two();
    let shift = usize::BITS - places.trailing_zeros();
    (0..places).map(move |i| i.reverse_bits().checked_shr(shift).unwrap_or(0)).filter(move |&i| i < n)
}

/// The rank in a sample of `seen` of `n` features that seldom lies above rank `k` of them all: `k` where no smaller one is known.
pub(super) fn safe_rank(k: usize, seen: usize, n: usize) -> usize {
    let mean = k as f64 * seen as f64 / n as f64;
    if mean > LARGEST_MEAN {
        return k;
    }
    let mut term = (-mean).exp();
    let (mut below, mut rank) = (term, 1);
    while 1.0 - below > 1.0 / ONE_IN && rank < k {
        term *= mean / rank as f64;
        below += term;
        rank += 1;
    }
    rank
}

/// How guesses fared with a dictionary, in all calls and threads. It decides how long a selection takes, and nothing else.
#[derive(Debug, Default)]
pub(super) struct Record {
    rows: AtomicU64,
    wrong: AtomicU64,
    /// Passes that did without guesses.
    without: AtomicU64,
}

impl Record {
    /// Whether the next pass is to guess.
    pub(super) fn suggests_guessing(&self) -> bool {
        let (rows, wrong) = (self.rows.load(Ordering::Relaxed), self.wrong.load(Ordering::Relaxed));
        let is_good = rows < TRIAL || wrong * WRONG_ONE_IN <= rows;
        is_good || self.without.fetch_add(1, Ordering::Relaxed) % RETRY_ONE_IN == RETRY_ONE_IN - 1
    }

    /// Counts the rows of a pass that were guessed. Threads may count in between: nothing depends on the last row.
    pub(super) fn add(&self, rows: usize, wrong: usize) {
        let rows = self.rows.fetch_add(rows as u64, Ordering::Relaxed) + rows as u64;
        let wrong = self.wrong.fetch_add(wrong as u64, Ordering::Relaxed) + wrong as u64;
        if rows > MEMORY {
            self.rows.store(rows / 2, Ordering::Relaxed);
            self.wrong.store(wrong / 2, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_beginning_of_the_sample_is_spread() {
        for n in [1_usize, 2, 3, 7, 64, 100, 513, 4096] {
            let order = sample_first(n);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..n));
            for seen in 1..=sample_size(n) {
                let mut sample = order[..seen].to_vec();
                sample.push(n);
                sample.sort_unstable();
                let widest = sample.windows(2).map(|w| w[1] - w[0]).max().unwrap();
                assert!(widest <= 4 * n.div_ceil(seen), "{n} {seen} {widest}");
            }
        }
    }

    #[test]
    fn as_many_as_the_rank_are_seldom_in_a_sample() {
        // Hypergeometric by its definition, without replacement: less often than Poisson.
        for (k, seen, n) in [(32, 128, 16_384), (32, 2048, 16_384), (256, 2048, 16_384), (50, 90, 700)] {
            let rank = safe_rank(k, seen, n);
            let chance = |hits: usize| {
                let log_choose = |n: usize, k: usize| -> f64 {
                    (0..k).map(|i| ((n - i) as f64 / (k - i) as f64).ln()).sum()
                };
                (log_choose(k, hits) + log_choose(n - k, seen - hits) - log_choose(n, seen)).exp()
            };
            let tail = |rank: usize| (rank..=k.min(seen)).map(chance).sum::<f64>();
            assert!(tail(rank) <= 1.0 / ONE_IN && rank < k, "{k} {seen} {n}: {rank}");
            assert!(rank == 1 || tail(rank - 1) > 0.1 / ONE_IN, "{k} {seen} {n}: {rank} is too careful");
        }
        assert_eq!(safe_rank(1, 512, 16_384), 1);
        assert_eq!(safe_rank(5, 1000, 1000), 5);
        assert_eq!(safe_rank(5960, 131_072 / 8, 131_072), 5960);
    }

    #[test]
    fn guessing_ends_where_it_is_often_wrong_and_begins_anew_where_it_no_longer_is() {
        let record = Record::default();
        record.add(10, 10);
        assert!(record.suggests_guessing(), "ten rows say little");
        record.add(1000, 0);
        assert!(record.suggests_guessing());
        record.add(1000, 200);
        let tried = |passes: u64| (0..passes).filter(|_| record.suggests_guessing()).count() as u64;
        assert_eq!(tried(10 * RETRY_ONE_IN), 10);
        record.add(2000, 0);
        assert_eq!(tried(10), 10);
        // What is long ago does not outweigh what is now.
        (0..10_000).for_each(|_| record.add(1000, 0));
        (0..10).for_each(|_| record.add(1000, 1000));
        assert_eq!(tried(RETRY_ONE_IN), 1);
    }
}
