//! Circuits as bitsets: sizes of intersections and unions, nodes, and the [top n](top) of a score array as a circuit.
//! The chance level of an overlap is in [`chance`].

pub mod chance;
pub mod top;

use crate::error::{Error, Result};
use crate::kernels::isa::Isa;
use crate::kernels::sets::{count, insert, nodes, overlap, words};
use crate::memory::{try_zeros, zeros};
use crate::scan::{Context, fill_parts, grid, map_ordered};

/// Words per block: half a megabyte of each set.
const BLOCK_WORDS: usize = 1 << 16;

/// Number of nodes of a set.
///
/// # Errors
/// As [`Isa::choose`]; [`Error::Cancelled`].
pub fn size(set: &[u64], context: &Context<'_>) -> Result<u64> {
    let isa = Isa::choose()?;
    let blocks: Vec<&[u64]> = set.chunks(BLOCK_WORDS).collect();
    Ok(map_ordered(&blocks, context, |block| Ok(count(isa, block)))?.into_iter().sum())
}

/// Sizes of the intersection and of the union.
///
/// # Errors
/// [`Error::Shape`] when the sets have different numbers of words; as [`Isa::choose`]; [`Error::Cancelled`].
pub fn intersection_and_union(a: &[u64], b: &[u64], context: &Context<'_>) -> Result<(u64, u64)> {
    if a.len() != b.len() {
        return Err(Error::shape("b", format!("{} words, as in a", a.len()), format!("{} words", b.len())));
    }
    let isa = Isa::choose()?;
    let blocks: Vec<(&[u64], &[u64])> = a.chunks(BLOCK_WORDS).zip(b.chunks(BLOCK_WORDS)).collect();
    let sizes = map_ordered(&blocks, context, |(a, b)| Ok(overlap(isa, a, b)))?;
    Ok(sizes.into_iter().fold((0, 0), |(i, u), (both, either)| (i + both, u + either)))
}

/// The set of `members` among `n` nodes.
///
/// # Errors
/// [`Error::Shape`] when a member is negative or not below `n`; [`Error::Refused`] when memory has no room for `n` bits.
pub fn from_nodes(members: &[i64], n: usize) -> Result<Vec<u64>> {
    if let Some(bad) = members.iter().find(|&&m| m < 0 || m as u64 >= n as u64) {
        return Err(Error::shape("indices", format!("nodes in 0..{n}"), bad.to_string()));
    }
    let mut set = try_zeros(words(n), &format!("a set among {n} nodes"), "Number the nodes from 0")?;
    insert(&mut set, members);
    Ok(set)
}

/// The nodes of a set, ascending.
///
/// # Errors
/// As [`Isa::choose`]; [`Error::Cancelled`].
pub fn to_nodes(set: &[u64], context: &Context<'_>) -> Result<Vec<i64>> {
    let isa = Isa::choose()?;
    let blocks: Vec<_> = grid(set.len(), BLOCK_WORDS).collect();
    let sizes = map_ordered(&blocks, context, |range| Ok(count(isa, &set[range.clone()]) as usize))?;
    let mut members = zeros(sizes.iter().sum());
    fill_parts(&mut members, &sizes, context, |i, part| {
        let range = blocks[i].clone();
        nodes(&set[range.clone()], 64 * range.start, part);
        Ok(())
    })?;
    Ok(members)
}
