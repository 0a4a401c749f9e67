//! Top-K selection: the order of scores, and how the best are kept without sorting the rest.

use std::cmp::Ordering;

/// A feature with its score.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scored {
    /// What features are ranked by: the activation, times the feature's weight where it has one.
    pub rank: f64,
    /// `x · w + b` in f64.
    pub activation: f64,
    /// Index of the feature.
    pub feature: u32,
}

impl Scored {
    /// Higher rank first, equal ranks by lower feature: a total order of a row's features.
    pub fn order(&self, other: &Self) -> Ordering {
        other.rank.total_cmp(&self.rank).then(self.feature.cmp(&other.feature))
    }
}

/// Shrinks `found` to its `k` best; the k-th best comes last.
pub fn keep_best(found: &mut Vec<Scored>, k: usize) {
    if found.len() > k {
        found.select_nth_unstable_by(k - 1, Scored::order);
        found.truncate(k);
    } else if found.len() == k {
        found.select_nth_unstable_by(k - 1, Scored::order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(rank: f64, feature: u32) -> Scored {
        Scored { rank, activation: rank, feature }
    }

    #[test]
    fn ties_go_to_the_lower_feature_and_the_kth_best_comes_last() {
        let mut found: Vec<_> =
            [(1.0, 4), (2.0, 3), (1.0, 1), (0.5, 0), (1.0, 2)].map(|(r, f)| scored(r, f)).into();
        keep_best(&mut found, 3);
        assert_eq!(found[2], scored(1.0, 2));
        found.sort_by(Scored::order);
        assert_eq!(found.iter().map(|s| s.feature).collect::<Vec<_>>(), [3, 1, 2]);
    }

    #[test]
    fn fewer_than_k_are_all_kept() {
        let mut found = vec![scored(1.0, 0)];
        keep_best(&mut found, 3);
        assert_eq!(found.len(), 1);
    }
}
