//! One sealed shard, open for reading: held to its layout when it is opened, to its checksums when it is touched.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::kernels::checksum::crc32c;
use crate::scan::Context;
use crate::store::bytes::{Backend, Bytes, Window};
use crate::store::format::{BLOCK, Column, HEADER, Shard, Tensor, check_of, damaged, parse_header};
use crate::store::fs::{Fs, Identity, io_error, read_full_at, retry};
use crate::store::manifest::{SealedFile, open_regular, read_range};
use crate::store::map::{Map, PrivateMap};

/// When the checksum of a block is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// At the first touch after opening.
    First,
    /// At every touch.
    Always,
    /// At no touch.
    Never,
}

/// Bytes per `pread(2)` through the page cache: less than the second-level cache of a core.
const PIECE: usize = 128 << 10;

/// Rows under a damaged block, and how it differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Number of the block.
    pub block: usize,
    /// Rows of the store that it touches.
    pub rows: Range<u64>,
    /// Checksum stored and checksum found.
    pub crc32c: (u32, u32),
}

/// A sealed shard.
#[derive(Debug)]
pub struct SealedShard {
    path: PathBuf,
    bytes: Bytes,
    identity: Identity,
    columns: Vec<Column>,
    layout: Shard,
    checks: Vec<u8>,
    /// One bit per block that has been found sound.
    sound: Vec<AtomicU64>,
    verify: Verify,
    /// Number of the first row in its space.
    first_row: u64,
    n: u64,
}

/// What the manifest says about a shard.
#[derive(Clone, Debug)]
pub struct Expected<'a> {
    /// Folder of the store.
    pub root: &'a std::path::Path,
    /// Step and file name.
    pub parts: [&'a str; 2],
    /// Columns of the table.
    pub columns: &'a [Column],
    /// Entry of the file.
    pub sealed: &'a SealedFile,
    /// Rows of the step in the table's space.
    pub rows: Range<u64>,
}

impl SealedShard {
    /// Opens a shard and holds size, header and checksums to the manifest. Touches no data.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for every difference; [`Error::Manifest`] when it is no regular file; [`Error::Io`].
    pub fn open(fs: &dyn Fs, expected: &Expected<'_>, backend: Backend, verify: Verify) -> Result<Self> {
        let Expected { root, parts, columns, sealed, rows } = expected;
        let path = root.join(parts[0]).join(parts[1]);
        let file = open_regular(fs, root, parts)?;
        let identity = file.identity().map_err(io_error("stat", &path))?;
        let n = rows.end - rows.start;
        let layout = Shard::new(columns, n)
            .ok_or_else(|| damaged(&path, "shape overflows", "a shape within the file", &n.to_string()))?;
        if identity.len != layout.file_len {
            let reason =
                if identity.len < layout.file_len { "truncated shard" } else { "bytes behind the data" };
            let expected = format!("{} bytes", layout.file_len);
            return Err(damaged(&path, reason, &expected, &identity.len.to_string()));
        }
        let page = read_range(&*file, 0, HEADER as u64, &path)?;
        layout.check(&parse_header(&page, identity.len, &path)?, &path)?;
        let behind = HEADER as u64 + layout.checked;
        let checks = read_range(&*file, behind, identity.len - behind, &path)?;
        let crc = format!("{:08x}", ::crc32c::crc32c_append(crc32c(&page), &checks));
        if crc != sealed.crc32c {
            let expected = format!("crc32c {}, as in the manifest", sealed.crc32c);
            return Err(damaged(&path, "damaged header or checksums", &expected, &crc));
        }
        let bytes = match (backend, file.file()) {
            (Backend::Mmap, Some(os)) => {
                Bytes::Mapped(Map::new(os, identity.len as usize).map_err(io_error("map", &path))?)
            }
            (Backend::Direct, _) if file.bypass_cache().map_err(io_error("open", &path))? => {
                Bytes::Direct(file)
            }
            _ => Bytes::Cached(file),
        };
        let sound = (0..(checks.len() / 4).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (columns, first_row) = (columns.to_vec(), rows.start);
        Ok(Self { path, bytes, identity, columns, layout, checks, sound, verify, first_row, n })
    }

    /// Blocks under checksums.
    pub fn blocks(&self) -> usize {
        self.checks.len() / 4
    }

    /// The bytes of `rows` (counted in the shard) of a column, borrowed from the map; `None` without a map.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a block under the rows is damaged; [`Error::Store`] when the file has been truncated.
    pub fn borrow(&self, column: usize, rows: Range<u64>) -> Result<Option<&[u8]>> {
        let Bytes::Mapped(map) = &self.bytes else { return Ok(None) };
        let span = self.span(column, rows);
        self.check_mapped(map, &span)?;
        Ok(Some(&map.bytes()[HEADER + span.start as usize..HEADER + span.end as usize]))
    }

    /// Copies the bytes of `rows` of a column into `out`, which has their size; `window` is of use to the next call.
    ///
    /// # Errors
    /// As [`SealedShard::borrow`].
    pub fn copy(&self, column: usize, rows: Range<u64>, out: &mut [u8], window: &mut Window) -> Result<()> {
        let span = self.span(column, rows);
        match &self.bytes {
            Bytes::Mapped(map) => {
                self.check_mapped(map, &span)?;
                out.copy_from_slice(&map.bytes()[HEADER + span.start as usize..HEADER + span.end as usize]);
                Ok(())
            }
            _ => self.copy_checked(&span, out, window),
        }
    }

    /// Asks for the bytes of `rows` of a column to be fetched from disk. Only a hint.
    pub fn will_need(&self, column: usize, rows: Range<u64>) {
        let span = self.span(column, rows);
        self.bytes.will_need(HEADER + span.start as usize..HEADER + span.end as usize);
    }

    /// A private map of the bytes of `rows`; `None` without a map, or when the name stands for another file by now.
    ///
    /// # Errors
    /// As [`SealedShard::borrow`].
    pub fn private_map(&self, fs: &dyn Fs, column: usize, rows: Range<u64>) -> Result<Option<PrivateMap>> {
        let Bytes::Mapped(map) = &self.bytes else { return Ok(None) };
        let span = self.span(column, rows);
        self.check_mapped(map, &span)?;
        let (root, name) = (self.path.parent(), self.path.file_name().and_then(|n| n.to_str()));
        let (Some(root), Some(name)) = (root, name) else { return Ok(None) };
        let Ok(file) = retry(|| fs.open(root, &[name])) else { return Ok(None) };
        let (Some(os), true) = (file.file(), file.identity().is_ok_and(|i| i == self.identity)) else {
            return Ok(None);
        };
        let offset = HEADER as u64 + span.start;
        let private = PrivateMap::new(os, offset, (span.end - span.start) as usize);
        private.map(Some).map_err(io_error("map", &self.path))
    }

    /// Refuses to go on when the file has been truncated while it was open: its pages would be gone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn unchanged(&self, fs: &dyn Fs) -> Result<()> {
        let now = match self.bytes.input() {
            Some(file) => file.identity(),
            None => fs.identity(&self.path),
        };
        match now {
            Ok(now) if now.inode == self.identity.inode && now.device == self.identity.device => {
                if now.len < self.identity.len { Err(self.changed(now.len)) } else { Ok(()) }
            }
            // Another file under the name, or none: the open one keeps its bytes.
            _ => Ok(()),
        }
    }

    fn changed(&self, found: u64) -> Error {
        let reason = format!("shard changed while open: expected {} bytes, found {found}", self.identity.len);
        Error::Store { path: self.path.clone(), reason }
    }

    /// Bytes of `rows` of a column, counted in the data section.
    fn span(&self, column: usize, rows: Range<u64>) -> Range<u64> {
        // The layout has been computed without overflow, and rows lie within it.
        let width = self.columns[column].row_bytes().unwrap_or(0);
        let begin = self.layout.tensors[column].begin;
        begin + rows.start * width..begin + rows.end * width
    }

    fn blocks_of(span: &Range<u64>) -> Range<usize> {
        if span.is_empty() {
            return 0..0;
        }
        (span.start / BLOCK as u64) as usize..(span.end.div_ceil(BLOCK as u64)) as usize
    }

    fn block_span(&self, block: usize) -> Range<u64> {
        let start = block as u64 * BLOCK as u64;
        start..self.layout.checked.min(start + BLOCK as u64)
    }

    fn must_check(&self, block: usize) -> bool {
        match self.verify {
            Verify::Always => true,
            Verify::Never => false,
            Verify::First => self.sound[block / 64].load(Ordering::Relaxed) & 1 << (block % 64) == 0,
        }
    }

    fn check_mapped(&self, map: &Map, span: &Range<u64>) -> Result<()> {
        let blocks = Self::blocks_of(span);
        if blocks.clone().any(|b| self.must_check(b)) {
            map.will_need(HEADER + span.start as usize..HEADER + span.end as usize);
        }
        for block in blocks.filter(|b| self.must_check(*b)) {
            let bytes = self.block_span(block);
            self.check_block(
                block,
                &map.bytes()[HEADER + bytes.start as usize..HEADER + bytes.end as usize],
            )?;
        }
        Ok(())
    }

    /// Reads whole blocks where they must be checked, and checks the very bytes that are handed on.
    fn copy_checked(&self, span: &Range<u64>, out: &mut [u8], window: &mut Window) -> Result<()> {
        let direct = matches!(self.bytes, Bytes::Direct(_));
        for block in Self::blocks_of(span) {
            let whole = self.block_span(block);
            let wanted = whole.start.max(span.start)..whole.end.min(span.end);
            let target = &mut out[(wanted.start - span.start) as usize..(wanted.end - span.start) as usize];
            let within = (wanted.start - whole.start) as usize..(wanted.end - whole.start) as usize;
            if window.holds(self.first_row, block) {
                target.copy_from_slice(&window.bytes(within.end)[within]);
            } else if wanted == whole && !direct {
                self.fill(target, whole.start)?;
                if self.must_check(block) {
                    self.check_block(block, target)?;
                }
            } else if direct || self.must_check(block) {
                target.copy_from_slice(&self.read_block(block, window)?[within]);
            } else {
                self.fill(target, wanted.start)?;
            }
        }
        Ok(())
    }

    /// Reads a whole block into `window`, and checks it where it must be.
    fn read_block<'w>(&self, block: usize, window: &'w mut Window) -> Result<&'w [u8]> {
        let span = self.block_span(block);
        let len = (span.end - span.start) as usize;
        self.fill_pages(window.claim(len), len, span.start)?;
        if self.must_check(block) {
            self.check_block(block, window.bytes(len))?;
        }
        window.hold(self.first_row, block);
        Ok(window.bytes(len))
    }

    /// Fills `out` from the data section at `offset`, a piece at a time: a copy that stays in cache is several times
    /// faster than one that does not.
    fn fill(&self, out: &mut [u8], mut offset: u64) -> Result<()> {
        for piece in out.chunks_mut(PIECE) {
            let len = piece.len();
            self.read(piece, len, offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Fills at least `len` bytes of `out`, which has whole pages: in one read past the page cache, else as [`Self::fill`].
    fn fill_pages(&self, out: &mut [u8], len: usize, offset: u64) -> Result<()> {
        match self.bytes {
            Bytes::Direct(_) => self.read(out, len, offset),
            _ => self.fill(&mut out[..len], offset),
        }
    }

    /// Reads into `out`, at least `len` bytes of it.
    fn read(&self, out: &mut [u8], len: usize, offset: u64) -> Result<()> {
        let Some(file) = self.bytes.input() else { return Err(Error::Internal("read".to_owned())) };
        let offset = HEADER as u64 + offset;
        let filled = read_full_at(file, out, offset).map_err(io_error("read", &self.path))?;
        if filled < len { Err(self.changed(offset + filled as u64)) } else { Ok(()) }
    }

    fn check_block(&self, block: usize, bytes: &[u8]) -> Result<()> {
        let found = crc32c(bytes);
        let stored = check_of(&self.checks, block).unwrap_or(!found);
        if found == stored {
            self.sound[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
            return Ok(());
        }
        let rows = self.rows_under(block);
        Err(Error::Corrupt {
            path: self.path.clone(),
            reason: format!("damaged block {block}, rows {}..{}", rows.start, rows.end),
            expected: format!("crc32c {stored:08x}"),
            found: format!("{found:08x}"),
        })
    }

    /// Rows of the store with a byte in `block`, whichever column it belongs to.
    fn rows_under(&self, block: usize) -> Range<u64> {
        let block = self.block_span(block);
        let rows_of = |(column, tensor): (&Column, &Tensor)| {
            let width = column.row_bytes().filter(|w| *w > 0)?;
            let (start, end) = (block.start.max(tensor.begin), block.end.min(tensor.end));
            (start < end).then(|| (start - tensor.begin) / width..(end - tensor.begin).div_ceil(width))
        };
        let touched: Vec<_> = self.columns.iter().zip(&self.layout.tensors).filter_map(rows_of).collect();
        let start = touched.iter().map(|r| r.start).min().unwrap_or(0);
        let end = touched.iter().map(|r| r.end).max().unwrap_or(self.n).min(self.n);
        self.first_row + start..self.first_row + end
    }

    /// Checks every block, whatever has been checked before, and lists the damaged ones.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Store`] when the file cannot be read to its end; [`Error::Cancelled`].
    pub fn damages(&self, fs: &dyn Fs, context: &Context<'_>) -> Result<Vec<Damage>> {
        let mut damages = Vec::new();
        let mut window = Window::default();
        for block in 0..self.blocks() {
            context.check()?;
            self.unchanged(fs)?;
            let span = self.block_span(block);
            let bytes = if let Bytes::Mapped(map) = &self.bytes {
                let range = HEADER + span.start as usize..HEADER + span.end as usize;
                map.will_need(range.start..(range.end + BLOCK).min(map.bytes().len()));
                &map.bytes()[range]
            } else {
                let len = (span.end - span.start) as usize;
                self.fill_pages(window.claim(len), len, span.start)?;
                window.bytes(len)
            };
            let crc32c = (check_of(&self.checks, block).unwrap_or(0), crc32c(bytes));
            if crc32c.0 != crc32c.1 {
                damages.push(Damage { block, rows: self.rows_under(block), crc32c });
            }
        }
        Ok(damages)
    }
}
