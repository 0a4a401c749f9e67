//! The nodes with the largest scores: a sample brackets the threshold, one pass sorts by the bracket, and an exact selection
//! decides among the few scores between.

use super::to_nodes;
use crate::error::{Error, Result};
use crate::kernels::isa::Isa;
use crate::kernels::sets::{count, words};
use crate::kernels::sieve::{Bracket, Doubtful, key, sift};
use crate::memory::zeros;
use crate::scan::{Context, map_pieces};

/// Words per block, of 64 scores each: four megabytes of scores.
const BLOCK_WORDS: usize = 1 << 14;
/// Scores that the bracket is taken from.
const SAMPLE: usize = 1 << 16;

/// The nodes with the `n` largest scores, ascending by node; of equal scores the lower node is taken, NaN counts as minus
/// infinity.
///
/// # Errors
/// [`Error::Shape`] when there are fewer than `n` scores; as [`Isa::choose`]; [`Error::Cancelled`].
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
    let mut set = zeros(words(scores.len()));
    // A bracket that misses the threshold is widened, and the pass repeated.
    let mut widths = std::iter::successors(Some(1.0), |width| Some(width * 8.0));
    while let Some(width) = widths.next()
        && !select(scores, n, bracket(scores, n, width), &mut set, context)?
    {}
    to_nodes(&set, context)
}

/// Makes `set` the n best, if the bracket holds the threshold.
fn select(
    scores: &[f32],
    n: usize,
    bracket: Bracket,
    set: &mut [u64],
    context: &Context<'_>,
) -> Result<bool> {
    let isa = Isa::choose()?;
    let blocks = map_pieces(set, BLOCK_WORDS, context, |i, set| {
        let first = i * BLOCK_WORDS * 64;
        let block = &scores[first..scores.len().min(first + 64 * BLOCK_WORDS)];
        let doubtful = sift(block, bracket, set);
        Ok((count(isa, set) as usize, doubtful))
    })?;
    let (inside, between) =
        blocks.iter().fold((0, 0), |(a, b), (inside, doubtful)| (a + inside, b + doubtful.len()));
    if !(inside..=inside + between).contains(&n) {
        return Ok(false);
    }
    if inside < n {
        let doubtful: Vec<&[Doubtful]> = blocks.iter().map(|(_, doubtful)| &doubtful[..]).collect();
        admit(n - inside, &doubtful, set);
    }
    Ok(true)
}

/// Adds the `n` best of the doubtful scores of each block, of equal ones the first.
fn admit(n: usize, blocks: &[&[Doubtful]], set: &mut [u64]) {
    let mut keys: Vec<u32> = blocks.iter().copied().flatten().map(|d| d.key).collect();
    let threshold = largest(&mut keys, n);
    let mut ties = n - keys[..n].iter().filter(|&&key| key > threshold).count();
    for (doubtful, set) in blocks.iter().zip(set.chunks_mut(BLOCK_WORDS)) {
        for Doubtful { position, key } in *doubtful {
            let tie = *key == threshold && ties > 0;
            ties -= usize::from(tie);
            if *key > threshold || tie {
                set[*position as usize / 64] |= 1 << (position % 64);
            }
        }
    }
}

/// Keys that hold the `n`-th largest between them, from an evenly spread sample: `width` times four standard errors of its
/// rank to both sides.
fn bracket(scores: &[f32], n: usize, width: f64) -> Bracket {
    let step = scores.len().div_ceil(SAMPLE);
    let mut sample: Vec<u32> = scores.iter().step_by(step).map(|score| key(*score)).collect();
    let share = n as f64 / scores.len() as f64;
    let expected = share * sample.len() as f64;
    let margin = width * (4.0 * (expected * (1.0 - share)).sqrt() + 4.0);
    let (first, last) = (expected - margin, expected + margin);
    let low = if last < sample.len() as f64 { largest(&mut sample, last as usize + 1) } else { 0 };
    let high = (first >= 1.0).then(|| largest(&mut sample, first as usize));
    // Where one score is so frequent that it is both ends, it is the threshold.
    Bracket { low, high: high.map(|high| high.max(low.saturating_add(1))) }
}

/// The `n`-th largest key, which leaves the `n` largest in front.
fn largest(keys: &mut [u32], n: usize) -> u32 {
    *keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a)).1
}
