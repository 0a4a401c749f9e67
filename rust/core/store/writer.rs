//! The one writer of a store: append rows, seal the step, commit it; resume where the manifest ends.
//!
//! A step grows in a folder `<step>.tmp-<pid>` that no reader looks at. A commit makes every file durable, then the
//! folder, renames it to its final name, makes that durable, and replaces the manifest in the same way. What a kill or
//! a power cut leaves behind is either named by the manifest or garbage that the next writer removes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::store::finite::refuse_nonfinite;
use crate::store::fs::{Fs, Lock, durable_rename, failpoint, io_error, retry, write_all_at};
use crate::store::leftovers::{IN_FLIGHT, LOCK, is_leftover, refuse_foreign, refuse_unnamed_steps};
use crate::store::manifest::{MANIFEST, Manifest, SAMPLES, SealedFile, Step, Table, step_name};
use crate::store::open_shard::OpenShard;
use crate::store::same_run::same_run;

/// What to do with NaN and infinity in activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nonfinite {
    /// Refuse the rows.
    Error,
    /// Store them as they are.
    Keep,
}

/// Number of a table, and the bytes given for its columns.
type Matched<'a> = (usize, Vec<&'a [u8]>);

/// A store that is open for writing. There is one at a time.
#[derive(Debug)]
pub struct Writer {
    fs: Arc<dyn Fs>,
    root: PathBuf,
    manifest: Manifest,
    nonfinite: Nonfinite,
    step: Option<OpenStep>,
    failed: bool,
    pid: u32,
    lock: Box<dyn Lock>,
}

impl Writer {
    /// Creates the store `wanted` at `root`, or resumes it when it is there.
    ///
    /// # Errors
    /// [`Error::Locked`] while another writer holds it; [`Error::Store`] when the store at `root` has other facts or
    /// hooks, naming both sides, or when `root` holds something else or a step that its manifest should name.
    pub fn open(fs: Arc<dyn Fs>, root: &Path, wanted: Manifest, nonfinite: Nonfinite) -> Result<Self> {
        wanted.validate(root)?;
        create_folder(&*fs, root)?;
        let names = retry(|| fs.list(root)).map_err(io_error("list", root))?;
        if !has_manifest(&names) {
            refuse_foreign(&names, root)?;
        }
        let lock_path = root.join(LOCK);
        let lock = match retry(|| fs.lock(&lock_path)).map_err(io_error("lock", &lock_path))? {
            Ok(lock) => lock,
            Err(pid) => return Err(Error::Locked { path: root.into(), pid }),
        };
        let pid = std::process::id();
        let mut writer =
            Self { fs, root: root.into(), manifest: wanted, nonfinite, step: None, failed: false, pid, lock };
        writer.resume()?;
        Ok(writer)
    }

    /// Takes over what is committed and removes what is not. The lock is held, so the listing is final.
    fn resume(&mut self) -> Result<()> {
        let names = retry(|| self.fs.list(&self.root)).map_err(io_error("list", &self.root))?;
        let exists = has_manifest(&names);
        if exists {
            let found = Manifest::read(&*self.fs, &self.root)?;
            same_run(&found, &self.manifest, &self.root)?;
            refuse_unnamed_steps(&names, found.steps.len(), &self.root)?;
            self.manifest = found;
        } else {
            refuse_foreign(&names, &self.root)?;
        }
        for name in names.iter().filter(|n| is_leftover(n, self.manifest.steps.len())) {
            let path = self.root.join(name);
            retry(|| self.fs.remove(&path)).map_err(io_error("remove", &path))?;
        }
        if exists { Ok(()) } else { self.replace_manifest(&self.manifest) }
    }

    /// Folder of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is committed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Appends `n` rows to every hook of `space`. Nothing of the caller's memory is kept.
    ///
    /// `rows` holds one slice per column of the space's row table, `arrays` one entry per hook of the space with one
    /// slice per column. All slices are the little-endian bytes of `n` rows.
    ///
    /// # Errors
    /// [`Error::Shape`] for missing, unknown or doubled hooks and wrong sizes, [`Error::NonFinite`], both before
    /// anything is written. After an [`Error::Io`] the step is dropped and the writer refuses to go on.
    pub fn append(
        &mut self,
        space: &str,
        n: usize,
        rows: &[&[u8]],
        arrays: &[(&str, Vec<&[u8]>)],
    ) -> Result<()> {
        self.usable()?;
        let matched = self.matched(space, n, rows, arrays)?;
        if n == 0 {
            return Ok(());
        }
        let outcome = self.append_matched(space, n, &matched);
        self.poisoned_by(outcome)
    }

    fn append_matched(&mut self, space: &str, n: usize, matched: &[Matched<'_>]) -> Result<()> {
        let step = match &mut self.step {
            Some(step) => step,
            None => self.step.insert(OpenStep::create(&*self.fs, &self.root, &self.manifest, self.pid)?),
        };
        // Space for all first: a disk that is nearly full refuses the append as a whole.
        for (table, _) in matched {
            step.shards[*table].reserve(n as u64)?;
        }
        for (table, columns) in matched {
            step.shards[*table].append(n as u64, columns)?;
            failpoint("appended");
        }
        *step.rows.entry(space.to_owned()).or_default() += n as u64;
        Ok(())
    }

    /// Pairs what was given with the tables of the space, in the order of the manifest.
    fn matched<'a>(
        &self,
        space: &str,
        n: usize,
        rows: &[&'a [u8]],
        arrays: &[(&str, Vec<&'a [u8]>)],
    ) -> Result<Vec<Matched<'a>>> {
        let spaces: Vec<&str> = self.manifest.spaces.iter().map(|s| s.name.as_str()).collect();
        if !spaces.contains(&space) {
            return Err(Error::shape("space", format!("one of {spaces:?}"), format!("{space:?}")));
        }
        let of_space = |t: &Table| t.space.as_deref() == Some(space);
        if let Some((name, _)) = arrays
            .iter()
            .find(|(name, _)| !self.manifest.hooks.iter().any(|t| of_space(t) && t.name == *name))
        {
            return Err(Error::shape("arrays", format!("hooks of space {space:?}"), format!("{name:?}")));
        }
        let mut matched = Vec::with_capacity(arrays.len() + 1);
        for (index, table) in self.manifest.tables().enumerate().filter(|(_, t)| t.row_space() == space) {
            let columns = if table.space.is_none() {
                rows.to_vec()
            } else {
                let mut given = arrays.iter().filter(|(name, _)| *name == table.name);
                match (given.next(), given.next()) {
                    (Some((_, columns)), None) => columns.clone(),
                    (None, _) => {
                        return Err(Error::shape("arrays", format!("hook {:?}", table.name), "nothing"));
                    }
                    _ => return Err(Error::shape("arrays", format!("{:?} once", table.name), "it twice")),
                }
            };
            self.check_columns(table, n, &columns)?;
            matched.push((index, columns));
        }
        Ok(matched)
    }

    fn check_columns(&self, table: &Table, n: usize, columns: &[&[u8]]) -> Result<()> {
        let name = &table.name;
        if columns.len() != table.columns.len() {
            let expected = format!("{} columns", table.columns.len());
            return Err(Error::shape(name, expected, columns.len().to_string()));
        }
        for (column, bytes) in table.columns.iter().zip(columns) {
            let expected = column.row_bytes().and_then(|b| b.checked_mul(n as u64));
            if expected != Some(bytes.len() as u64) {
                let expected = format!("{n} rows of {:?}", column.width.unwrap_or(1));
                return Err(Error::shape(
                    format!("{name}, {}", column.name),
                    expected,
                    format!("{} bytes", bytes.len()),
                ));
            }
            if self.nonfinite == Nonfinite::Error && table.space.is_some() {
                refuse_nonfinite(name, column, bytes)?;
            }
        }
        Ok(())
    }

    /// Rows appended to `space` since the last commit.
    pub fn pending(&self, space: &str) -> u64 {
        self.step.as_ref().and_then(|s| s.rows.get(space)).copied().unwrap_or(0)
    }

    /// Seals the open step and commits it, with `samples` as its table of samples. Without rows this does nothing.
    ///
    /// # Errors
    /// [`Error::Io`]; the step is then dropped (or, at the very end, in doubt) and the writer refuses to go on.
    pub fn commit(&mut self, samples: &[u8]) -> Result<()> {
        self.usable()?;
        let Some(step) = self.step.take() else { return Ok(()) };
        let folder = step.folder.clone();
        let outcome = self.seal(step, samples);
        if outcome.is_err() {
            // Best effort: the next writer removes it in any case.
            let _ = self.fs.remove(&folder);
        }
        self.poisoned_by(outcome)
    }

    fn seal(&mut self, step: OpenStep, samples: &[u8]) -> Result<()> {
        let name = step_name(self.manifest.steps.len());
        let (folder, rows) = (step.folder.clone(), step.rows.clone());
        let mut files = Vec::with_capacity(step.shards.len() + 1);
        for shard in step.shards {
            files.push(shard.seal()?);
            failpoint("sealed");
        }
        files.push(self.write_samples(&folder, samples)?);
        retry(|| self.fs.sync_dir(&folder)).map_err(io_error("sync", &folder))?;
        failpoint("synced");
        durable_rename(&*self.fs, &folder, &self.root.join(&name))?;
        failpoint("step-in-place");
        let mut next = self.manifest.clone();
        next.steps.push(Step::new(name, rows, files));
        self.replace_manifest(&next)?;
        failpoint("committed");
        self.manifest = next;
        Ok(())
    }

    fn write_samples(&self, folder: &Path, samples: &[u8]) -> Result<SealedFile> {
        let path = folder.join(SAMPLES);
        self.write_whole(&path, samples, true)?;
        Ok(SealedFile::new(SAMPLES.to_owned(), samples.len() as u64, crc32c::crc32c(samples)))
    }

    fn write_whole(&self, path: &Path, bytes: &[u8], seal: bool) -> Result<()> {
        let mut file = retry(|| self.fs.create(path)).map_err(io_error("create", path))?;
        retry(|| file.reserve(0, bytes.len() as u64)).map_err(io_error("reserve", path))?;
        write_all_at(&mut *file, bytes, 0).map_err(io_error("write", path))?;
        if seal {
            retry(|| file.seal()).map_err(io_error("seal", path))?;
        }
        retry(|| file.sync()).map_err(io_error("sync", path))
    }

    fn replace_manifest(&self, next: &Manifest) -> Result<()> {
        let path = self.root.join(format!("{MANIFEST}{IN_FLIGHT}{}", self.pid));
        let written = self.write_whole(&path, &next.to_bytes()?, false).and_then(|()| {
            failpoint("manifest-written");
            durable_rename(&*self.fs, &path, &self.root.join(MANIFEST))
        });
        if written.is_err() {
            // Best effort: the next writer removes it in any case.
            let _ = self.fs.remove(&path);
        }
        written
    }

    /// Drops the rows appended since the last commit.
    ///
    /// # Errors
    /// [`Error::Io`] when their folder cannot be removed.
    pub fn discard(&mut self) -> Result<()> {
        match self.step.take() {
            Some(OpenStep { folder, .. }) => {
                retry(|| self.fs.remove(&folder)).map_err(io_error("remove", &folder))
            }
            None => Ok(()),
        }
    }

    fn usable(&self) -> Result<()> {
        if self.failed {
            let reason = "the writer has failed before; open the store again to go on from the last commit";
            return Err(Error::Store { path: self.root.clone(), reason: reason.to_owned() });
        }
        Ok(())
    }

    fn poisoned_by<T>(&mut self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err() {
            self.failed = true;
            // Best effort, for the same reason as in `commit`; the error that counts is the first.
            let _ = self.discard();
        }
        outcome
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A forked child holds a copy of this object; the files belong to its parent.
        if std::process::id() == self.pid {
            let _ = self.discard();
            let _ = self.lock.release();
        }
    }
}

/// The step that grows: one shard per table of the manifest.
#[derive(Debug)]
struct OpenStep {
    folder: PathBuf,
    rows: BTreeMap<String, u64>,
    shards: Vec<OpenShard>,
}

impl OpenStep {
    fn create(fs: &dyn Fs, root: &Path, manifest: &Manifest, pid: u32) -> Result<Self> {
        let folder = root.join(format!("{}{IN_FLIGHT}{pid}", step_name(manifest.steps.len())));
        retry(|| fs.create_dir(&folder)).map_err(io_error("create", &folder))?;
        let rows = manifest.spaces.iter().map(|s| (s.name.clone(), 0)).collect();
        let shards = manifest.tables().map(|table| OpenShard::create(fs, &folder, table));
        match shards.collect::<Result<_>>() {
            Ok(shards) => Ok(Self { folder, rows, shards }),
            Err(error) => {
                // Best effort: the next writer removes it in any case.
                let _ = fs.remove(&folder);
                Err(error)
            }
        }
    }
}

/// Creates the folder, and those above it where missing, durably.
fn create_folder(fs: &dyn Fs, path: &Path) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match retry(|| fs.create_dir(path)) {
        Ok(()) => retry(|| fs.sync_dir(parent)).map_err(io_error("sync", parent)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound && parent != path => {
            create_folder(fs, parent)?;
            retry(|| fs.create_dir(path)).map_err(io_error("create", path))?;
            retry(|| fs.sync_dir(parent)).map_err(io_error("sync", parent))
        }
        Err(e) => Err(io_error("create", path)(e)),
    }
}

fn has_manifest(names: &[String]) -> bool {
    names.iter().any(|name| name == MANIFEST)
}
