//! The sum of all words of the rows: the cheapest computation that touches every byte. What a scan takes beyond it is the
//! cost of reading.

use super::Fold;
use crate::error::Result;
use crate::rows::Rows;
use crate::with_elements;

/// Bytes per block: those under one checksum of a store.
const BLOCK_BYTES: usize = 1 << 20;

/// Sum of the rows taken as little-endian words of eight bytes, modulo 2^64; bytes behind the last whole word of a block count
/// as a word of their own.
#[derive(Clone, Copy, Debug, Default)]
pub struct WordSum;

impl WordSum {
    /// Rows per block of the grid for rows of `d` elements of `size` bytes.
    pub fn block_rows(d: usize, size: usize) -> usize {
        // A multiple of eight rows has whole words, whatever their width.
        (BLOCK_BYTES / (d * size).max(1)).max(8) / 8 * 8
    }
}

impl Fold for WordSum {
    type Partial = u64;

    fn init(&self) -> u64 {
        0
    }

    fn update(&self, partial: &mut u64, block: &[Rows<'_>], _first_row: usize) -> Result<()> {
        for rows in block {
            with_elements!(rows.data(), s => {
                let (words, rest) = bytemuck::cast_slice::<_, u8>(s).as_chunks::<8>();
                let sum = words.iter().fold(0, |sum: u64, word| sum.wrapping_add(u64::from_le_bytes(*word)));
                let mut last = [0; 8];
                last[..rest.len()].copy_from_slice(rest);
                *partial = partial.wrapping_add(sum).wrapping_add(u64::from_le_bytes(last));
            });
        }
        Ok(())
    }

    fn merge(&self, into: &mut u64, later: u64) -> Result<()> {
        *into = into.wrapping_add(later);
        Ok(())
    }
}
