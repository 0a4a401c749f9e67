//! A store that is open for reading: the manifest, and the shards it names, opened when first touched.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result, out_of_files};
use crate::scan::Context;
use crate::store::bytes::{Backend, PAGE, Window};
use crate::store::format::unsafe_kind;
use crate::store::fs::{Fs, Os, io_error, retry};
use crate::store::manifest::{MANIFEST, Manifest, Table, open_regular, read_range};
use crate::store::selection::Selection;
use crate::store::shard::{Damage, Expected, SealedShard, Verify};

/// A store as its manifest described it at the moment of opening.
#[derive(Debug)]
pub struct Store {
    fs: Arc<dyn Fs>,
    root: PathBuf,
    manifest: Manifest,
    verify: Verify,
    backend: Backend,
    /// Per table: the number of the first row of each step, and the number of rows at the end.
    starts: Vec<Vec<u64>>,
    /// Step by step, table by table.
    shards: Vec<OnceLock<SealedShard>>,
}

impl Store {
    /// Opens the store at `root`.
    ///
    /// # Errors
    /// [`Error::Store`] when there is none; [`Error::Unsafe`] for a pickle or an archive; as [`Manifest::read`].
    pub fn open(root: &Path, verify: Verify, backend: Backend) -> Result<Self> {
        Self::open_on(Arc::new(Os), root, verify, backend)
    }

    /// Opens the store at `root` of another file system.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(fs: Arc<dyn Fs>, root: &Path, verify: Verify, backend: Backend) -> Result<Self> {
        refuse_files(&*fs, root)?;
        let manifest = match Manifest::read(&*fs, root) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let reason = format!("not a store: expected a folder with {MANIFEST}, found none");
                return Err(Error::Store { path: root.into(), reason });
            }
            outcome => outcome?,
        };
        let backend = match backend {
            Backend::Direct if !can_bypass_cache(&*fs, root) => Backend::Pread,
            other => other,
        };
        let starts = manifest.tables().map(|table| row_starts(&manifest, table)).collect();
        let tables = manifest.tables().count();
        let shards = (0..manifest.steps.len() * tables).map(|_| OnceLock::new()).collect();
        Ok(Self { fs, root: root.into(), manifest, verify, backend, starts, shards })
    }

    /// Folder of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How the bytes are reached: [`Backend::Pread`] where [`Backend::Direct`] was asked for and cannot be.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// What the manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn fs(&self) -> &dyn Fs {
        &*self.fs
    }

    /// All rows of a column of a hook.
    ///
    /// # Errors
    /// [`Error::Store`] when there is no such hook or column.
    pub fn hook(self: &Arc<Self>, name: &str, column: &str) -> Result<Selection> {
        let table = self.manifest.hooks.iter().position(|h| h.name == name);
        self.column(table.ok_or_else(|| self.missing(&format!("no hook {name:?}")))?, column)
    }

    /// All rows of a column of the row table of `space`.
    ///
    /// # Errors
    /// [`Error::Store`] when there is no such space or column.
    pub fn row_column(self: &Arc<Self>, space: &str, column: &str) -> Result<Selection> {
        let table = self.manifest.spaces.iter().position(|s| s.name == space);
        let table = table.ok_or_else(|| self.missing(&format!("no row space {space:?}")))?;
        self.column(self.manifest.hooks.len() + table, column)
    }

    fn column(self: &Arc<Self>, table: usize, column: &str) -> Result<Selection> {
        let found = self.table(table).columns.iter().position(|c| c.name == column);
        let index = found
            .ok_or_else(|| self.missing(&format!("no column {column:?} in {:?}", self.table(table).name)))?;
        Ok(Selection::all(Arc::clone(self), table, index))
    }

    fn missing(&self, reason: &str) -> Error {
        Error::Store { path: self.root.clone(), reason: reason.to_owned() }
    }

    pub(crate) fn table(&self, index: usize) -> &Table {
        let hooks = &self.manifest.hooks;
        hooks.get(index).unwrap_or_else(|| &self.manifest.spaces[index - hooks.len()])
    }

    /// Row numbers at which the steps of a table begin; the last entry is the number of rows.
    pub(crate) fn starts(&self, table: usize) -> &[u64] {
        &self.starts[table]
    }

    /// Tables per step: hooks and row tables.
    pub fn tables(&self) -> usize {
        self.starts.len()
    }

    /// The shard of a table in a step, opened at the first call.
    ///
    /// # Errors
    /// As [`SealedShard::open`].
    pub fn shard(&self, step: usize, table: usize) -> Result<&SealedShard> {
        let slot = &self.shards[step * self.tables() + table];
        match slot.get() {
            Some(shard) => Ok(shard),
            // Of two threads that open the same shard one is kept.
            None => self.open_shard(step, table).map(|shard| slot.get_or_init(|| shard)),
        }
    }

    /// A shard of the caller's own, whose file is closed when it is dropped.
    fn open_shard(&self, step: usize, table: usize) -> Result<SealedShard> {
        let entry = &self.manifest.steps[step];
        let sealed = &entry.files[table];
        let expected = Expected {
            root: &self.root,
            parts: [&entry.name, &sealed.name],
            columns: &self.table(table).columns,
            sealed,
            rows: self.starts[table][step]..self.starts[table][step + 1],
        };
        SealedShard::open(&*self.fs, &expected, self.backend, self.verify)
    }

    /// The bytes of the table of samples of a step, held to their checksum.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Io`].
    pub fn samples(&self, step: usize) -> Result<Vec<u8>> {
        let entry = &self.manifest.steps[step];
        let sealed = &entry.files[self.tables()];
        let path = self.root.join(&entry.name).join(&sealed.name);
        let file = open_regular(&*self.fs, &self.root, &[&entry.name, &sealed.name])?;
        let len = file.identity().map_err(io_error("stat", &path))?.len;
        let corrupt = |reason: &str, expected: &str, found: &str| {
            Err(crate::store::format::damaged(&path, reason, expected, found))
        };
        if len != sealed.bytes {
            let reason = if len < sealed.bytes { "truncated table" } else { "bytes behind the table" };
            return corrupt(reason, &format!("{} bytes", sealed.bytes), &len.to_string());
        }
        let bytes = read_range(&*file, 0, len, &path)?;
        let crc = format!("{:08x}", crc32c::crc32c(&bytes));
        if crc != sealed.crc32c {
            return corrupt("damaged table", &format!("crc32c {}", sealed.crc32c), &crc);
        }
        Ok(bytes)
    }

    /// Rows of a table that lie under damage in step `step`: those under damaged blocks, or all of the step when its shard
    /// cannot be opened. No file stays open.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, which is no damage; [`Error::Cancelled`].
    pub fn damaged_rows(&self, table: usize, step: usize, context: &Context<'_>) -> Result<Vec<Range<u64>>> {
        let all = self.starts[table][step]..self.starts[table][step + 1];
        let damages = self.open_shard(step, table).and_then(|shard| shard.damages(&*self.fs, context));
        match damages {
            Ok(damages) => Ok(damages.into_iter().map(|d| d.rows).collect()),
            Err(Error::Corrupt { .. } | Error::Store { .. } | Error::Manifest { .. }) => Ok(vec![all]),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(vec![all]),
            Err(error) => Err(error),
        }
    }

    /// Checks one file of a step completely: a shard, or the table of samples (number [`Store::tables`]). No file stays open.
    ///
    /// Returns one line per problem.
    ///
    /// # Errors
    /// [`Error::Cancelled`], and what is wrong with this process and not with the store: too many open files, no memory.
    pub fn problems(&self, step: usize, file: usize, context: &Context<'_>) -> Result<Vec<String>> {
        let entry = &self.manifest.steps[step];
        if file == self.tables() {
            return self.samples(step).map(|_| Vec::new()).or_else(|e| Ok(vec![problem(e)?]));
        }
        let rows = &self.starts[file][step..=step + 1];
        let name = format!("{}/{}", entry.name, entry.files[file].name);
        let damages = self.open_shard(step, file).and_then(|shard| shard.damages(&*self.fs, context));
        match damages {
            Err(error) => Ok(vec![format!("{} (rows {}..{})", problem(error)?, rows[0], rows[1])]),
            Ok(damages) => Ok(damages.iter().map(|damage| line(damage, &name)).collect()),
        }
    }
}

/// What an error says about the store, where it says something about the store.
fn problem(error: Error) -> Result<String> {
    match &error {
        Error::Io { source, .. } if out_of_files(source) => Err(error),
        Error::Cancelled | Error::Refused { .. } | Error::Internal(_) => Err(error),
        _ => Ok(error.to_string()),
    }
}

fn line(damage: &Damage, file: &str) -> String {
    let Damage { block, rows: Range { start, end }, crc32c: (stored, found) } = damage;
    format!(
        "damaged block {block}: {file}: expected crc32c {stored:08x}, found {found:08x} (rows {start}..{end})"
    )
}

fn row_starts(manifest: &Manifest, table: &Table) -> Vec<u64> {
    let mut starts = vec![0];
    let mut end = 0;
    for step in &manifest.steps {
        // `Manifest::validate` has shown that the sum does not overflow.
        end += step.rows.get(table.row_space()).copied().unwrap_or(0);
        starts.push(end);
    }
    starts
}

/// Whether files of the store can be read past the page cache, tried on the manifest.
fn can_bypass_cache(fs: &dyn Fs, root: &Path) -> bool {
    let Ok(file) = open_regular(fs, root, &[MANIFEST]) else { return false };
    let page = || retry(|| file.read_at(Window::default().claim(PAGE), 0));
    file.bypass_cache().unwrap_or(false) && page().is_ok()
}

/// Names what somebody may have given in place of a store, by its first bytes.
fn refuse_files(fs: &dyn Fs, root: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (root.parent(), root.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let Ok(file) = retry(|| fs.open(parent, &[name])) else { return Ok(()) };
    let start = read_range(&*file, 0, 8, root)?;
    match unsafe_kind(&start) {
        Some(kind) => {
            Err(Error::Unsafe { path: root.into(), reason: format!("is {kind}; convert it to safetensors") })
        }
        None => Err(Error::Store {
            path: root.into(),
            reason: "not a store: expected a folder, found a file".to_owned(),
        }),
    }
}
