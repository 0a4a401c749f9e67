//! Circuit overlap: sizes of intersections over bitsets, and selection of the top n of a score array.
//! Its chance level is in [`chance`].

pub mod chance;

use crate::error::{Error, Result};
use crate::kernels::sets::{Survivors, count, insert, key, nodes, overlap, survivors, words};
use crate::scan::{Context, grid, map_ordered};

/// Words per block: half a megabyte of each set.
const BLOCK_WORDS: usize = 1 << 16;
/// Scores per block.
const BLOCK_SCORES: usize = 1 << 20;
/// Scores that the first guess of the threshold is taken from.
const SAMPLE: usize = 1 << 16;

/// Number of nodes of a set.
pub fn size(set: &[u64], context: &Context<'_>) -> Result<u64> {
    let blocks: Vec<&[u64]> = set.chunks(BLOCK_WORDS).collect();
    Ok(map_ordered(&blocks, context, |block| Ok(count(block)))?.into_iter().sum())
}

/// Sizes of the intersection and of the union.
///
/// # Errors
/// [`Error::Shape`] when the sets have different numbers of words.
pub fn intersection_and_union(a: &[u64], b: &[u64], context: &Context<'_>) -> Result<(u64, u64)> {
    if a.len() != b.len() {
        return Err(Error::shape("b", format!("{} words, as in a", a.len()), format!("{} words", b.len())));
    }
    let blocks: Vec<(&[u64], &[u64])> = a.chunks(BLOCK_WORDS).zip(b.chunks(BLOCK_WORDS)).collect();
    let sizes = map_ordered(&blocks, context, |(a, b)| Ok(overlap(a, b)))?;
    Ok(sizes.into_iter().fold((0, 0), |(i, u), (both, either)| (i + both, u + either)))
}

/// The set of `members` among `n` nodes.
///
/// # Errors
/// [`Error::Shape`] when a member is negative or not below `n`.
pub fn from_nodes(members: &[i64], n: usize) -> Result<Vec<u64>> {
    if let Some(bad) = members.iter().find(|&&m| m < 0 || m as u64 >= n as u64) {
        return Err(Error::shape("indices", format!("nodes in 0..{n}"), bad.to_string()));
    }
    let mut set = vec![0; words(n)];
    insert(&mut set, members);
    Ok(set)
}

/// The nodes of a set, ascending.
pub fn to_nodes(set: &[u64], context: &Context<'_>) -> Result<Vec<i64>> {
    let blocks: Vec<_> = grid(set.len(), BLOCK_WORDS).collect();
    let parts = map_ordered(&blocks, context, |range| {
        let mut out = Vec::new();
        nodes(&set[range.clone()], 64 * range.start, &mut out);
        Ok(out)
    })?;
    Ok(parts.concat())
}

/// The nodes with the `n` largest scores, ascending by node; of equal scores the lower node is taken, NaN counts as minus
/// infinity.
///
/// A sample gives a threshold that almost surely lets a little more than `n` scores through. One pass keeps those; the exact
/// threshold is found among them. A threshold that let too few through is lowered, and the pass repeated.
///
/// # Errors
/// [`Error::Shape`] when there are fewer than `n` scores.
pub fn top_n(scores: &[f32], n: usize, context: &Context<'_>) -> Result<Vec<i64>> {
    if n > scores.len() {
        return Err(Error::shape(
            "n",
            format!("at most {}, the number of scores", scores.len()),
            n.to_string(),
        ));
    }
    if n == 0 {
        return Ok(Vec::new());
    }
    let blocks: Vec<_> = grid(scores.len(), BLOCK_SCORES).collect();
    let mut slack = 1.0;
    let kept: Vec<Survivors> = loop {
        let least = guess(scores, n, slack);
        let kept = map_ordered(&blocks, context, |range| Ok(survivors(&scores[range.clone()], least)))?;
        if kept.iter().map(|block| block.keys.len()).sum::<usize>() >= n {
            break kept;
        }
        slack *= 8.0;
    };
    let mut keys: Vec<u32> = kept.iter().flat_map(|block| &block.keys).copied().collect();
    let (above, &mut threshold, _) = keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
    let mut ties = n - above.iter().filter(|&&key| key > threshold).count();
    let mut out = Vec::with_capacity(n);
    for (range, block) in blocks.iter().zip(&kept) {
        for (&position, &key) in block.positions.iter().zip(&block.keys) {
            let tie = key == threshold && ties > 0;
            ties -= usize::from(tie);
            if key > threshold || tie {
                out.push(range.start as i64 + i64::from(position));
            }
        }
    }
    Ok(out)
}

/// A key that about `n` scores reach, from an evenly spread sample, lower by `slack` times four standard errors.
fn guess(scores: &[f32], n: usize, slack: f64) -> u32 {
    let step = scores.len().div_ceil(SAMPLE);
    let mut sample: Vec<u32> = scores.iter().step_by(step).map(|score| key(*score)).collect();
    let share = n as f64 / scores.len() as f64;
    let expected = share * sample.len() as f64;
    let rank = (expected + slack * (4.0 * (expected * (1.0 - share)).sqrt() + 4.0)) as usize;
    if step == 1 || rank >= sample.len() {
        return if step == 1 { exact(&mut sample, n) } else { 0 };
    }
    exact(&mut sample, rank + 1)
}

/// The `n`-th largest key.
fn exact(keys: &mut [u32], n: usize) -> u32 {
    *keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a)).1
}
