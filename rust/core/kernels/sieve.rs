//! The order that selects nodes by score, and one pass that sorts most scores into "in" and "out" without writing them.
//!
//! Two thresholds are guessed around the true one. A comparison with each leaves one bit per score: the nodes above the
//! upper threshold are in, as bits of a set, those below the lower one are out, and only the few between them are written
//! down for an exact comparison. So the pass costs little more than reading the scores.

#![allow(unsafe_code)]

/// A number that orders as the score does: equal for -0 and +0, and for NaN and minus infinity.
#[inline]
pub fn key(score: f32) -> u32 {
    let bits = if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 }.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The score of a key.
pub fn score_of(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// The lowest key: that of minus infinity and of NaN.
const LOWEST: u32 = 0x007F_FFFF;

/// The keys between which the exact threshold is sought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bracket {
    /// Scores of a lower key are out.
    pub low: u32,
    /// Scores of at least this key are in; nothing, or the lowest key, for none.
    pub high: Option<u32>,
}

/// A score that only the exact threshold decides on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doubtful {
    /// Position within the block.
    pub position: u32,
    /// Key of the score.
    pub key: u32,
}

/// Sets the bits of the scores that are in, the first score being bit 0 of word 0, and returns the doubtful ones in order.
///
/// A block has at most 2^32 scores, and `set` a word for each 64 of them.
pub fn sift(scores: &[f32], bracket: Bracket, set: &mut [u64]) -> Vec<Doubtful> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi1") {
        #[target_feature(enable = "avx2,bmi1")]
        fn wide(scores: &[f32], bracket: Bracket, set: &mut [u64]) -> Vec<Doubtful> {
            sift_by(scores, bracket, set, |group, least| mask_avx2(group, least))
        }
        // SAFETY: the processor has both.
        return unsafe { wide(scores, bracket, set) };
    }
    sift_by(scores, bracket, set, mask)
}

/// Scores compared together: the bits of a word.
const GROUP: usize = 64;

#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "a body takes the instruction set of the function that it is inlined into"
)]
fn sift_by(
    scores: &[f32],
    bracket: Bracket,
    set: &mut [u64],
    mask: impl Fn(&[f32; GROUP], f32) -> u64,
) -> Vec<Doubtful> {
    // No score is at least NaN, and no comparison finds a NaN, whose key is the lowest.
    let high = bracket.high.filter(|&high| high > LOWEST).map_or(f32::NAN, score_of);
    let low = score_of(bracket.low.max(LOWEST));
    let everything = if bracket.low <= LOWEST { u64::MAX } else { 0 };
    let mut doubtful = Vec::new();
    let (groups, rest) = scores.as_chunks::<GROUP>();
    let mut padded = [f32::NAN; GROUP];
    padded[..rest.len()].copy_from_slice(rest);
    let partial = (!rest.is_empty()).then_some((&padded, (1 << rest.len()) - 1));
    let groups = groups.iter().map(|group| (group, u64::MAX)).chain(partial);
    for ((g, (group, present)), word) in groups.enumerate().zip(set) {
        *word = mask(group, high);
        let mut between = (mask(group, low) | everything) & !*word & present;
        while between != 0 {
            let i = between.trailing_zeros() as usize;
            doubtful.push(Doubtful { position: (g * GROUP + i) as u32, key: key(group[i]) });
            between &= between - 1;
        }
    }
    doubtful
}

/// Bit `i` says whether `group[i]` is at least `least`.
fn mask(group: &[f32; GROUP], least: f32) -> u64 {
    group.iter().enumerate().fold(0, |mask, (i, score)| mask | u64::from(*score >= least) << i)
}

/// [`mask`], a comparison of eight at a time.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn mask_avx2(group: &[f32; GROUP], least: f32) -> u64 {
    use std::arch::x86_64::{_CMP_GE_OQ, _mm256_cmp_ps, _mm256_loadu_ps, _mm256_movemask_ps, _mm256_set1_ps};
    let least = _mm256_set1_ps(least);
    let (eights, _) = group.as_chunks::<8>();
    eights.iter().enumerate().fold(0, |mask, (i, eight)| {
        // SAFETY: eight numbers lie there.
        let scores = unsafe { _mm256_loadu_ps(eight.as_ptr()) };
        let bits = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(scores, least));
        mask | (bits as u64) << (8 * i)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_scores_do() {
        let ascending = [f32::NEG_INFINITY, -1e30, -1.0, -1e-40, 0.0, 1e-40, 0.5, 1.0, 1e30, f32::INFINITY];
        assert!(ascending.windows(2).all(|w| key(w[0]) < key(w[1])));
        assert_eq!(key(-0.0), key(0.0));
        assert_eq!((key(f32::NAN), key(f32::NEG_INFINITY)), (LOWEST, LOWEST));
    }

    #[test]
    fn scores_are_sorted_by_their_keys() {
        let word = |i: u32| f32::from_bits(i.wrapping_mul(2_654_435_769).rotate_left(i % 31));
        let mut scores: Vec<f32> = (0..1003).map(word).collect();
        scores.extend([0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-40, 1e-40]);
        let thresholds = [f32::NEG_INFINITY, -3.0, -1e-40, -0.0, 0.0, 1e-40, 7.0, f32::INFINITY].map(key);
        for (i, &low) in thresholds.iter().enumerate() {
            for high in thresholds[i..].iter().copied().map(Some).chain([None]) {
                let mut set = vec![0; scores.len().div_ceil(64)];
                let found = sift(&scores, Bracket { low, high }, &mut set);
                let is_in = |key: u32| high.is_some_and(|high| key >= high && high > LOWEST);
                let expected: Vec<Doubtful> = (0..scores.len())
                    .map(|i| Doubtful { position: i as u32, key: key(scores[i]) })
                    .filter(|d| d.key >= low && !is_in(d.key))
                    .collect();
                assert_eq!(found, expected, "{low} {high:?}");
                for i in 0..64 * set.len() {
                    let expected = i < scores.len() && is_in(key(scores[i]));
                    assert_eq!(set[i / 64] >> (i % 64) & 1 == 1, expected, "{i} {low} {high:?}");
                }
            }
        }
    }
}
