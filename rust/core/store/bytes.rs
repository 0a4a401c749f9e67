//! How the bytes of a sealed file are reached: through a map, by `pread(2)`, or past the page cache.

use std::ops::Range;

use crate::store::fs::Input;
use crate::store::map::Map;

/// How the bytes of a shard are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A memory map: no copy, for local disks.
    Mmap,
    /// `pread(2)`: a copy, but an unreachable disk is an error and not a signal. For network disks.
    Pread,
    /// `pread(2)` past the page cache: for stores that exceed memory and are read once. A scan reads ahead itself.
    Direct,
}

/// An open file with its backend.
#[derive(Debug)]
pub enum Bytes {
    /// Mapped as a whole.
    Mapped(Map),
    /// Read through the page cache.
    Cached(Box<dyn Input>),
    /// Read past it, in whole pages.
    Direct(Box<dyn Input>),
}

impl Bytes {
    /// The file behind them, where they are read.
    pub fn input(&self) -> Option<&dyn Input> {
        match self {
            Self::Mapped(_) => None,
            Self::Cached(file) | Self::Direct(file) => Some(&**file),
        }
    }

    /// Asks for `range` of the file to be fetched from disk. Only a hint: what the system answers changes no result.
    pub fn will_need(&self, range: Range<usize>) {
        match self {
            Self::Mapped(map) => map.will_need(range),
            Self::Cached(file) => file.will_need(range.start as u64..range.end as u64),
            Self::Direct(_) => {}
        }
    }
}

/// Unit of reads past the page cache: at least the sector of any disk.
pub const PAGE: usize = 4096;

/// Space for one block of a file, on a page of memory; it remembers which block it holds, so that many short runs of rows
/// in one block are read and checked once.
#[derive(Debug, Default)]
pub struct Window {
    space: Vec<u8>,
    /// Shard (by the number of its first row) and block.
    held: Option<(u64, usize)>,
}

impl Window {
    /// Space for `len` bytes, rounded up to whole pages. What was held is forgotten.
    pub fn claim(&mut self, len: usize) -> &mut [u8] {
        self.held = None;
        let len = len.next_multiple_of(PAGE);
        if self.space.len() < len + PAGE {
            self.space.resize(len + PAGE, 0);
        }
        let start = self.start();
        &mut self.space[start..start + len]
    }

    /// Says which block the space holds.
    pub fn hold(&mut self, shard: u64, block: usize) {
        self.held = Some((shard, block));
    }

    /// Whether it holds this block.
    pub fn holds(&self, shard: u64, block: usize) -> bool {
        self.held == Some((shard, block))
    }

    /// The first `len` bytes of the space.
    pub fn bytes(&self, len: usize) -> &[u8] {
        let start = self.start();
        &self.space[start..start + len]
    }

    /// Where the first whole page of the space begins.
    fn start(&self) -> usize {
        self.space.as_ptr().addr().wrapping_neg() % PAGE
    }
}
