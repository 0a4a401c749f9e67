//! The border to the file system: a trait with what the store needs and nothing more, and the real one, [`Os`].
//!
//! No other file calls `std::fs`. [`Faulty`](crate::store::faulty::Faulty) is the twin that fails on demand and shows
//! what a power cut would leave.
#![allow(clippy::disallowed_methods, reason = "this file is the border")]

use std::fmt::Debug;
pub use std::fs::File;
use std::fs::{OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

#[cfg(target_os = "linux")]
use rustix::fs::{Advice, fadvise, fcntl_getfl, fcntl_setfl};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, openat};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// What the store asks of a file system. Every method maps to one system call that can fail.
pub trait Fs: Debug + Send + Sync {
    /// Creates a new file for writing. An existing one, or a link in its place, is an error.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Opens a regular file below `root` for reading; anything else on the way down, a link too, is `InvalidInput`.
    fn open(&self, root: &Path, parts: &[&str]) -> io::Result<Box<dyn Input>>;
    /// Which file a path stands for at this moment.
    fn identity(&self, path: &Path) -> io::Result<Identity>;
    /// Creates a folder.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Renames a file or folder; an existing file at `to` is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file, or a folder with all that it holds.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the entries of a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Takes the lock file at `path` without waiting; the error is the text that its holder left there.
    fn lock(&self, path: &Path) -> io::Result<std::result::Result<Box<dyn Lock>, String>>;
}

/// A file that is being written.
pub trait Output: Debug + Send + Sync {
    /// Writes some of `bytes` at `offset` and says how many.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Reserves space for `len` bytes at `offset`, where the file system can.
    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Takes away the permission to write.
    fn seal(&mut self) -> io::Result<()>;
    /// Makes the content durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is being read.
pub trait Input: Debug + Send + Sync {
    /// Reads some bytes at `offset` and says how many; zero at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Which file this is, and its size at this moment.
    fn identity(&self) -> io::Result<Identity>;
    /// The file itself, for a map; `None` where there is none.
    fn file(&self) -> Option<&File>;
    /// Reads past the page cache from here on, whole pages at offsets of whole pages; `false` where the file system cannot.
    fn bypass_cache(&self) -> io::Result<bool> {
        Ok(false)
    }
    /// Asks for `range` to be fetched from disk. Only a hint.
    fn will_need(&self, _range: Range<u64>) {}
}

/// A held lock; it is gone with its process, and with the children that the process forked.
pub trait Lock: Debug + Send + Sync {
    /// Lets go of the lock, in forked children too, and leaves an empty file: a closed store holds no trace of its writer.
    fn release(&mut self) -> io::Result<()>;
}

/// Which file a name stands for, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub len: u64,
}

/// The file system of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Os;

const SEALED: u32 = 0o444;

impl Fs for Os {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }

    fn open(&self, root: &Path, parts: &[&str]) -> io::Result<Box<dyn Input>> {
        let mut dir: rustix::fd::OwnedFd = OpenOptions::new().read(true).open(root)?.into();
        // Without NONBLOCK, opening a FIFO waits for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        for (i, part) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let flags = if last { flags } else { flags | OFlags::DIRECTORY };
            dir = openat(&dir, *part, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::LOOP | Errno::NOTDIR | Errno::NXIO => irregular(),
                _ => errno.into(),
            })?;
        }
        let file = File::from(dir);
        if !file.metadata()?.is_file() {
            return Err(irregular());
        }
        Ok(Box::new(file))
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        let data = path.symlink_metadata()?;
        Ok(Identity { device: data.dev(), inode: data.ino(), len: data.len() })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(dir)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if path.symlink_metadata()?.is_dir() {
            std::fs::remove_dir_all(path)
        } else {
            std::fs::remove_file(path)
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<std::result::Result<Box<dyn Lock>, String>> {
        let no_links = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(no_links)
            .open(path)?;
        // flock(2) on Unix: held by this open file, not by the process, and gone when the process is.
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                FileExt::write_all_at(&file, std::process::id().to_string().as_bytes(), 0)?;
                Ok(Ok(Box::new(file)))
            }
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut text = [0; 20];
                let len = FileExt::read_at(&file, &mut text, 0)?;
                Ok(Err(String::from_utf8_lossy(&text[..len]).into_owned()))
            }
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// A link, a folder, a FIFO or a device where a file was expected.
fn irregular() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

impl Output for File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match fallocate(&*self, FallocateFlags::KEEP_SIZE, offset, len).map_err(io::Error::from) {
            // A file system without reservation reports a full disk at the write, which is checked as well.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            outcome => outcome,
        }
    }

    fn seal(&mut self) -> io::Result<()> {
        self.set_permissions(Permissions::from_mode(SEALED))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Input for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        let data = self.metadata()?;
        Ok(Identity { device: data.dev(), inode: data.ino(), len: data.len() })
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }

    #[cfg(target_os = "linux")]
    fn bypass_cache(&self) -> io::Result<bool> {
        let flags = fcntl_getfl(self)?;
        match fcntl_setfl(self, flags | OFlags::DIRECT) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    #[cfg(target_os = "linux")]
    fn will_need(&self, range: Range<u64>) {
        let len = std::num::NonZeroU64::new(range.end.saturating_sub(range.start));
        if len.is_some() {
            let _ = fadvise(self, range.start, len, Advice::WillNeed);
        }
    }
}

impl Lock for File {
    fn release(&mut self) -> io::Result<()> {
        let emptied = self.set_len(0);
        // Closing would not do: a forked child has the same open file.
        self.unlock().and(emptied)
    }
}

/// Writes all of `bytes` at `offset`: short writes go on, interrupted ones are repeated.
pub fn write_all_at(file: &mut dyn Output, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry(|| file.write_at(bytes, offset))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// Fills `buffer` from `offset`, as far as the file goes, and says how far.
pub fn read_full_at(file: &dyn Input, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match retry(|| file.read_at(&mut buffer[filled..], offset + filled as u64))? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Repeats a call that a signal interrupted.
pub fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Renames so that a power cut leaves the old state or the new one. What moves is synced already; the only rename here.
pub fn durable_rename(fs: &dyn Fs, from: &Path, to: &Path) -> Result<()> {
    retry(|| fs.rename(from, to)).map_err(io_error("rename", from))?;
    failpoint("renamed");
    let parent = to.parent().unwrap_or(Path::new("."));
    retry(|| fs.sync_dir(parent)).map_err(io_error("sync", parent))
}

/// Wraps the error of the call `op` on `path`.
pub fn io_error<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { path: PathBuf::from(path), op, source }
}

/// Aborts the process at the named point when `MICROTOME_FAIL_AT=name:count` asks for it.
#[cfg(feature = "failpoints")]
pub fn failpoint(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    // Read at every point, for a forked child gets its own wish.
    let wanted = std::env::var("MICROTOME_FAIL_AT").unwrap_or_default();
    if let Some((point, count)) = wanted.split_once(':')
        && point == name
        && count.parse() == Ok(SEEN.fetch_add(1, Ordering::Relaxed) + 1)
    {
        std::process::abort();
    }
}

/// Nothing: fail points exist with the feature `failpoints` only.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn failpoint(_name: &str) {}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panic")]
mod tests {
    use super::*;

    #[test]
    fn a_released_lock_is_free_while_a_copy_of_its_file_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("LOCK");
        let mut held = File::create(&path).unwrap();
        held.try_lock().unwrap();
        // What a forked child has: another descriptor of the same open file.
        let copy = held.try_clone().unwrap();
        let refused = Os.lock(&path).unwrap().unwrap_err();
        let error = Error::Locked { path: path.clone(), pid: refused }.to_string();
        assert!(error.contains("is being written by another process. Wait"), "{error}");
        held.release().unwrap();
        drop(held);
        drop(Os.lock(&path).unwrap().unwrap());
        drop(copy);
    }
}
