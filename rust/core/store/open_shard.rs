//! A shard that is being written: columns, block checksums and header of one table of a step.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::store::format::{BLOCK, Column, HEADER, PADDING, Shard};
use crate::store::fs::{Fs, Output, failpoint, io_error, retry, write_all_at};
use crate::store::manifest::{SealedFile, Table};

/// A shard that grows: its first column goes to disk at once, the others wait for the end of the step.
///
/// The second column starts where the first one ends, which only the last append tells. So row tables and the values of
/// sparse codes, both a few bytes per row, are held in memory for one step; activations never are.
#[derive(Debug)]
pub struct OpenShard {
    file: Box<dyn Output>,
    path: PathBuf,
    name: String,
    columns: Vec<Column>,
    rows: u64,
    written: u64,
    waiting: Vec<Vec<u8>>,
    checks: Checks,
}

impl OpenShard {
    /// Creates the file of `table` in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(fs: &dyn Fs, folder: &Path, table: &Table) -> Result<Self> {
        let name = table.file_name();
        let path = folder.join(&name);
        let file = retry(|| fs.create(&path)).map_err(io_error("create", &path))?;
        let columns = table.columns.clone();
        let waiting = vec![Vec::new(); columns.len().saturating_sub(1)];
        Ok(Self { file, path, name, columns, rows: 0, written: 0, waiting, checks: Checks::default() })
    }

    /// Reserves space for `n` more rows of the column that goes to disk at once.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn reserve(&mut self, n: u64) -> Result<()> {
        let bytes = self.columns[0].row_bytes().and_then(|b| b.checked_mul(n)).unwrap_or(0);
        let offset = HEADER as u64 + self.written;
        retry(|| self.file.reserve(offset, bytes)).map_err(io_error("reserve", &self.path))
    }

    /// Appends `n` rows, one slice per column.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, n: u64, columns: &[&[u8]]) -> Result<()> {
        if let Some((first, others)) = columns.split_first() {
            self.put(first)?;
            for (waiting, bytes) in self.waiting.iter_mut().zip(others) {
                waiting.extend_from_slice(bytes);
            }
        }
        self.rows += n;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let offset = HEADER as u64 + self.written;
        write_all_at(&mut *self.file, bytes, offset).map_err(io_error("write", &self.path))?;
        self.checks.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Writes columns that waited, padding, checksums and header; then nothing changes this file again.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Shape`] for a shard beyond 2^64 bytes.
    pub fn seal(mut self) -> Result<SealedFile> {
        let layout = Shard::new(&self.columns, self.rows)
            .ok_or_else(|| Error::shape(self.name.as_str(), "a shard below 2^64 bytes", "more"))?;
        for column in std::mem::take(&mut self.waiting) {
            self.put(&column)?;
        }
        let padding = layout.tensors.iter().find(|t| t.name == PADDING);
        self.put(&[0; 4][..padding.map_or(0, |t| (t.end - t.begin) as usize)])?;
        let checks = std::mem::take(&mut self.checks).finish();
        self.put(&checks)?;
        let header = layout.header()?;
        write_all_at(&mut *self.file, &header, 0).map_err(io_error("write", &self.path))?;
        failpoint("header-written");
        retry(|| self.file.seal()).map_err(io_error("seal", &self.path))?;
        retry(|| self.file.sync()).map_err(io_error("sync", &self.path))?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header), &checks);
        Ok(SealedFile::new(self.name, layout.file_len, crc))
    }
}

/// CRC32C of every block of a stream.
#[derive(Debug, Default)]
struct Checks {
    crc: u32,
    filled: usize,
    done: Vec<u8>,
}

impl Checks {
    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.crc = crc32c::crc32c_append(self.crc, part);
            self.filled += part.len();
            bytes = rest;
            if self.filled == BLOCK {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.done.extend_from_slice(&self.crc.to_le_bytes());
        (self.crc, self.filled) = (0, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        if self.filled > 0 {
            self.close();
        }
        self.done
    }
}
