//! Bitsets over nodes, and the order that selects them.
//!
//! A set over `n` nodes is `ceil(n / 64)` words, node `i` being bit `i % 64` of word `i / 64`; bits beyond `n` are zero.
//! Intersections and unions are never written: their popcounts are all that `IoU` needs.

#![allow(unsafe_code)]

/// Words that hold `n` bits.
pub fn words(n: usize) -> usize {
    n.div_ceil(64)
}

/// Compiles `$body`, safe and inlined, with and without vector popcounts, and picks at run time.
macro_rules! with_popcount {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:ident) => {
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vpopcntdq,popcnt")]
                fn vector($($arg: $ty),*) -> $ret {
                    $body($($arg),*)
                }
                #[target_feature(enable = "popcnt")]
                fn scalar($($arg: $ty),*) -> $ret {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx512vpopcntdq") && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the features are there.
                    return unsafe { vector($($arg),*) };
                }
                if is_x86_feature_detected!("popcnt") {
                    // SAFETY: the feature is there.
                    return unsafe { scalar($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

#[inline]
fn count_body(a: &[u64]) -> u64 {
    a.iter().map(|w| u64::from(w.count_ones())).sum()
}

#[inline]
fn overlap_body(a: &[u64], b: &[u64]) -> (u64, u64) {
    let (mut both, mut either) = (0, 0);
    for (a, b) in a.iter().zip(b) {
        both += u64::from((a & b).count_ones());
        either += u64::from((a | b).count_ones());
    }
    (both, either)
}

with_popcount! {
    /// Number of bits set.
    pub fn count(a: &[u64]) -> u64 = count_body
}

with_popcount! {
    /// Sizes of the intersection and of the union of two sets of equal length.
    pub fn overlap(a: &[u64], b: &[u64]) -> (u64, u64) = overlap_body
}

/// Sets the bits of `nodes`, all of which lie below `64 * words.len()`.
pub fn insert(words: &mut [u64], nodes: &[i64]) {
    for &node in nodes {
        words[node as usize / 64] |= 1 << (node % 64);
    }
}

/// Appends the nodes of a set in ascending order; `first` is the number of the first bit of `words`.
pub fn nodes(words: &[u64], first: usize, out: &mut Vec<i64>) {
    for (i, &word) in words.iter().enumerate() {
        let mut rest = word;
        while rest != 0 {
            out.push((first + 64 * i) as i64 + i64::from(rest.trailing_zeros()));
            rest &= rest - 1;
        }
    }
}

/// A number that orders as the score does: equal for -0 and +0, and for NaN and minus infinity.
#[inline]
pub fn key(score: f32) -> u32 {
    let bits = if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 }.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Positions and keys of the scores whose key is at least `least`, in order.
#[derive(Clone, Debug, Default)]
pub struct Survivors {
    /// Positions within the block.
    pub positions: Vec<u32>,
    /// Their keys.
    pub keys: Vec<u32>,
}

/// The score of a key; minus infinity for those of NaN.
fn score_of(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// Scores compared together: the bits of a mask.
const GROUP: usize = 32;

/// The scores of a block of at most 2^32 whose key is at least `least`.
pub fn survivors(scores: &[f32], least: u32) -> Survivors {
    if least <= key(f32::NEG_INFINITY) {
        return Survivors {
            positions: (0..scores.len() as u32).collect(),
            keys: scores.iter().map(|score| key(*score)).collect(),
        };
    }
    let least = score_of(least);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi1") {
        #[target_feature(enable = "avx2,bmi1")]
        fn wide(scores: &[f32], least: f32) -> Survivors {
            at_least(scores, least)
        }
        // SAFETY: the processor has both.
        return unsafe { wide(scores, least) };
    }
    at_least(scores, least)
}

/// The scores of at least `least`, which is not NaN: a comparison leaves one bit per score, and few are set.
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "a body takes the instruction set of the function that it is inlined into"
)]
fn at_least(scores: &[f32], least: f32) -> Survivors {
    let mut out = Survivors::default();
    let mut keep = |position: usize, score: f32| {
        out.positions.push(position as u32);
        out.keys.push(key(score));
    };
    let (groups, rest) = scores.as_chunks::<GROUP>();
    for (g, group) in groups.iter().enumerate() {
        let mut mask = 0_u32;
        for (i, score) in group.iter().enumerate() {
            mask |= u32::from(*score >= least) << i;
        }
        while mask != 0 {
            let i = mask.trailing_zeros() as usize;
            keep(g * GROUP + i, group[i]);
            mask &= mask - 1;
        }
    }
    for (i, score) in rest.iter().enumerate().filter(|(_, score)| **score >= least) {
        keep(groups.len() * GROUP + i, *score);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_scores_do() {
        let ascending = [f32::NEG_INFINITY, -1e30, -1.0, -1e-40, 0.0, 1e-40, 0.5, 1.0, 1e30, f32::INFINITY];
        assert!(ascending.windows(2).all(|w| key(w[0]) < key(w[1])));
        assert_eq!(key(-0.0), key(0.0));
        assert_eq!(key(f32::NAN), key(f32::NEG_INFINITY));
    }

    #[test]
    fn survivors_are_the_scores_whose_key_is_at_least_the_threshold() {
        let word = |i: u32| f32::from_bits(i.wrapping_mul(2_654_435_769).rotate_left(i % 31));
        let mut scores: Vec<f32> = (0..1003).map(word).collect();
        scores.extend([0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-40, 1e-40]);
        for threshold in [f32::NEG_INFINITY, -3.0, -1e-40, -0.0, 0.0, 1e-40, 7.0, f32::INFINITY] {
            let found = survivors(&scores, key(threshold));
            let expected: Vec<u32> =
                (0..scores.len() as u32).filter(|i| key(scores[*i as usize]) >= key(threshold)).collect();
            assert_eq!(found.positions, expected, "{threshold}");
            assert!(found.keys.iter().zip(&expected).all(|(k, i)| *k == key(scores[*i as usize])));
        }
        assert_eq!(survivors(&scores, 0).positions.len(), scores.len());
    }

    #[test]
    fn overlap_equals_counting_bit_by_bit() {
        let word =
            |i: u64, seed: u64| (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17) ^ (i * i);
        for len in [0, 1, 7, 64, 1001] {
            let (a, b): (Vec<u64>, Vec<u64>) = (0..len).map(|i| (word(i, 1), word(i, 77))).unzip();
            let bits = |f: &dyn Fn(u64, u64) -> u64| -> u64 {
                (0..len as usize)
                    .flat_map(|i| (0..64).map(move |j| (i, j)))
                    .map(|(i, j)| f(a[i], b[i]) >> j & 1)
                    .sum()
            };
            assert_eq!(overlap(&a, &b), (bits(&|a, b| a & b), bits(&|a, b| a | b)));
            assert_eq!(count(&a), bits(&|a, _| a));
        }
    }
}
