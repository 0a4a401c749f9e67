//! Bitsets over nodes.
//!
//! A set over `n` nodes is `ceil(n / 64)` words, node `i` being bit `i % 64` of word `i / 64`; bits beyond `n` are zero.
//! Intersections and unions are never written: their popcounts are all that `IoU` needs. Shuffles count the bits of a register
//! at a time where there are any: compilers know how.

#![allow(clippy::inline_always)] // bodies of `per_isa`, which compiles each once per instruction set

use super::isa::per_isa;

/// Words that hold `n` bits.
pub fn words(n: usize) -> usize {
    n.div_ceil(64)
}

#[inline(always)]
fn count_body<const FUSED: bool>(a: &[u64]) -> u64 {
    a.iter().map(|w| u64::from(w.count_ones())).sum()
}

#[inline(always)]
fn overlap_body<const FUSED: bool>(a: &[u64], b: &[u64]) -> (u64, u64) {
    let (mut both, mut either) = (0, 0);
    for (a, b) in a.iter().zip(b) {
        both += u64::from((a & b).count_ones());
        either += u64::from((a | b).count_ones());
    }
    (both, either)
}

per_isa! {
    /// Number of bits set.
    pub fn count(a: &[u64]) -> u64 = count_body;
}

per_isa! {
    /// Sizes of the intersection and of the union of two sets of equal length.
    pub fn overlap(a: &[u64], b: &[u64]) -> (u64, u64) = overlap_body;
}

/// Sets the bits of `nodes`, all of which lie below `64 * words.len()`.
pub fn insert(words: &mut [u64], nodes: &[i64]) {
    for &node in nodes {
        words[node as usize / 64] |= 1 << (node % 64);
    }
}

/// Writes the nodes of a set in ascending order to `out`, which has an entry for each; `first` is the number of the first
/// bit of `words`.
pub fn nodes(words: &[u64], first: usize, out: &mut [i64]) {
    let mut out = out.iter_mut();
    for (i, &word) in words.iter().enumerate() {
        let base = (first + 64 * i) as i64;
        let mut rest = word;
        while rest != 0
            && let Some(node) = out.next()
        {
            *node = base + i64::from(rest.trailing_zeros());
            rest &= rest - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

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
            for isa in Isa::available() {
                assert_eq!(overlap(isa, &a, &b), (bits(&|a, b| a & b), bits(&|a, b| a | b)), "{isa:?}");
                assert_eq!(count(isa, &a), bits(&|a, _| a), "{isa:?}");
            }
        }
    }
}
