//! Memory maps of sealed files. The only `unsafe` of the store.
//!
//! A map is sound as long as nobody changes the mapped bytes. Only sealed shards are mapped: the store writes them once,
//! takes away the permission to write and replaces nothing in place. Another program that edits a sealed shard breaks
//! this, and no reader can prevent it; see "What is not promised" in `FORMAT.md`.
#![allow(unsafe_code, reason = "this file holds the maps")]

use std::io;
use std::ops::Range;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};

use crate::store::fs::File;

/// Bytes that are fetched from disk together.
const STRETCH: usize = 1 << 20;
/// A multiple of the page size of every system.
const LARGEST_PAGE: usize = 64 << 10;

/// A shared, read-only map of a whole sealed file.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// Maps `len` bytes of `file`, which the caller has found to be at least that long.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: `file` is a sealed shard, opened read-only: this crate never writes to it again, see above.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        Ok(Self(map))
    }

    /// The mapped bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Asks the kernel to start reading what it does not hold of `range`. Only a hint: what it answers changes no result.
    ///
    /// To ask for pages in memory costs a fifth of reading them, so the first page of each stretch is probed.
    pub fn will_need(&self, range: Range<usize>) {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + STRETCH);
            if !self.resident(start) {
                let _ = self.0.advise_range(Advice::WillNeed, start, end - start);
            }
            start = end;
        }
    }

    /// Whether the page at `offset` is in memory; `true` where the system does not tell.
    fn resident(&self, offset: usize) -> bool {
        let mut answer = 1_u8;
        let page = self.0.as_ptr().wrapping_add(offset / LARGEST_PAGE * LARGEST_PAGE);
        // SAFETY: `mincore` reads no memory of ours; of one byte in the map it answers with one byte.
        let refused = unsafe { libc::mincore(page.cast_mut().cast(), 1, (&raw mut answer).cast()) };
        refused != 0 || answer & 1 == 1
    }
}

/// A private copy-on-write map of a range of a sealed file: whoever holds it may write to it, and changes neither the
/// file nor any other map. Pages cost memory once they are written.
#[derive(Debug)]
pub struct PrivateMap(MmapMut);

impl PrivateMap {
    /// Maps `len` bytes at `offset` of `file`, which is at least that long.
    pub fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: as in `Map::new`; the writable pages belong to this map alone.
        let map = unsafe { MmapOptions::new().offset(offset).len(len).map_copy(file)? };
        Ok(Self(map))
    }

    /// Address of the first byte, valid as long as this map lives.
    pub fn address(&self) -> usize {
        self.0.as_ptr().addr()
    }
}
