//! A file system in memory that fails on demand, and shows what a power cut would leave.
//!
//! Every file has *live* bytes, which its readers see, and *durable* ones, which a sync made safe; every folder has live
//! and durable entries likewise. [`Faulty::after_power_cut`] builds a disk from the durable state and a seeded choice of
//! what else survived: content whole, torn or not at all, and any subset of the unsynced renames. This is the model of
//! `SQLite`'s `test6` and of redb's crash tests.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::store::fs::{File, Fs, Identity, Input, Lock, Output};

/// What happens at the chosen call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error number.
    Errno(i32),
    /// It fails as if a signal had come; repeating it helps.
    Interrupted,
    /// A write writes half of its bytes, at least one. Other calls do not notice.
    ShortWrite,
    /// It and all later calls fail: the power is gone.
    PowerCut,
    /// A sync that claims success and does nothing. Other calls do not notice.
    IgnoredSync,
}

#[derive(Clone, Debug)]
enum Node {
    File { live: Vec<u8>, durable: Vec<u8> },
    Folder { live: Entries, durable: Entries, pending: Vec<Change> },
}

type Entries = BTreeMap<String, usize>;
/// Entries set or removed as one.
type Change = Vec<(String, Option<usize>)>;

#[derive(Debug)]
struct Disk {
    nodes: Vec<Node>,
    locked: HashSet<PathBuf>,
    calls: usize,
    syncs: Vec<usize>,
    faults: Vec<(usize, Fault)>,
    off: bool,
}

/// The file system. Clones share one disk.
#[derive(Clone, Debug)]
pub struct Faulty(Arc<Mutex<Disk>>);

impl Default for Faulty {
    fn default() -> Self {
        Self::with_nodes(vec![Node::folder(Entries::new())])
    }
}

impl Node {
    fn folder(entries: Entries) -> Self {
        Self::Folder { live: entries.clone(), durable: entries, pending: Vec::new() }
    }
}

impl Faulty {
    fn with_nodes(nodes: Vec<Node>) -> Self {
        let (locked, syncs) = (HashSet::new(), Vec::new());
        Self(Arc::new(Mutex::new(Disk { nodes, locked, calls: 0, syncs, faults: Vec::new(), off: false })))
    }

    /// Lets `fault` happen at call number `call`, counted from 0.
    pub fn fail_at(&self, call: usize, fault: Fault) {
        self.disk().faults.push((call, fault));
    }

    /// Replaces the bytes of a file, live and durable, behind the back of whoever has it open.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn damage(&self, path: &Path, bytes: Vec<u8>) -> io::Result<()> {
        let mut disk = self.disk();
        let id = disk.find(path)?;
        disk.nodes[id] = Node::File { live: bytes.clone(), durable: bytes };
        Ok(())
    }

    /// Calls made so far.
    pub fn calls(&self) -> usize {
        self.disk().calls
    }

    /// Numbers of the calls that were syncs.
    pub fn syncs(&self) -> Vec<usize> {
        self.disk().syncs.clone()
    }

    /// The disk after a power cut at this moment. Pattern 0 keeps what is durable, 1 all; others choose by seed.
    #[must_use]
    pub fn after_power_cut(&self, pattern: u64) -> Self {
        let disk = self.disk();
        let mut dice = Dice(pattern);
        let nodes = disk.nodes.iter().map(|node| node.survivor(pattern, &mut dice)).collect();
        Self::with_nodes(nodes)
    }

    /// Live bytes of all files, by path.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(nodes: &[Node], at: usize, path: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
            match &nodes[at] {
                Node::File { live, .. } => {
                    files.insert(path.to_path_buf(), live.clone());
                }
                Node::Folder { live, .. } => {
                    for (name, id) in live {
                        walk(nodes, *id, &path.join(name), files);
                    }
                }
            }
        }
        let mut files = BTreeMap::new();
        walk(&self.disk().nodes, 0, Path::new("/"), &mut files);
        files
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call and lets the fault happen when it is this one's turn.
    fn call(&self) -> io::Result<(MutexGuard<'_, Disk>, Option<Fault>)> {
        let mut disk = self.disk();
        let number = disk.calls;
        disk.calls += 1;
        let fault = disk.faults.iter().find(|(at, _)| *at == number).map(|(_, fault)| *fault);
        disk.off |= fault == Some(Fault::PowerCut);
        match fault {
            _ if disk.off => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(Fault::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Interrupted) => Err(io::Error::from_raw_os_error(libc::EINTR)),
            other => Ok((disk, other)),
        }
    }
}

impl Node {
    fn survivor(&self, pattern: u64, dice: &mut Dice) -> Self {
        match self {
            Self::File { live, durable } => {
                let kept = match (pattern, dice.roll(4)) {
                    (0, _) => durable.clone(),
                    (1, _) => live.clone(),
                    _ if live == durable => live.clone(),
                    (_, 0) => durable.clone(),
                    (_, 1) => live.clone(),
                    // Torn: the size may be there before the bytes, or some of the bytes alone.
                    (_, 2) => live[..dice.roll(live.len() + 1)].to_vec(),
                    _ => {
                        let mut torn = live.clone();
                        let from = dice.roll(live.len() + 1);
                        torn[from..].fill(0);
                        torn
                    }
                };
                Self::File { live: kept.clone(), durable: kept }
            }
            Self::Folder { durable, pending, .. } => {
                let mut entries = durable.clone();
                for change in pending {
                    if pattern == 1 || (pattern > 1 && dice.roll(2) == 1) {
                        apply(&mut entries, change);
                    }
                }
                Self::folder(entries)
            }
        }
    }
}

fn apply(entries: &mut Entries, change: &Change) {
    for (name, id) in change {
        match id {
            Some(id) => entries.insert(name.clone(), *id),
            None => entries.remove(name),
        };
    }
}

/// `SplitMix64`.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

impl Disk {
    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = 0;
        for part in path.components().filter_map(|c| match c {
            std::path::Component::Normal(part) => part.to_str(),
            _ => None,
        }) {
            at = match &self.nodes[at] {
                Node::Folder { live, .. } => *live.get(part).ok_or(io::ErrorKind::NotFound)?,
                Node::File { .. } => return Err(io::ErrorKind::NotADirectory.into()),
            };
        }
        Ok(at)
    }

    fn parent(&self, path: &Path) -> io::Result<(usize, String)> {
        let name = path.file_name().and_then(|n| n.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.find(path.parent().unwrap_or(Path::new("/")))?, name.to_owned()))
    }

    fn change(&mut self, folder: usize, change: Change) {
        if let Node::Folder { live, pending, .. } = &mut self.nodes[folder] {
            apply(live, &change);
            pending.push(change);
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let (folder, name) = self.parent(path)?;
        if self.find(path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.nodes.push(node);
        let id = self.nodes.len() - 1;
        self.change(folder, vec![(name, Some(id))]);
        Ok(id)
    }

    fn sync(&mut self, id: usize, fault: Option<Fault>) {
        let number = self.calls - 1;
        self.syncs.push(number);
        if fault == Some(Fault::IgnoredSync) {
            return;
        }
        match &mut self.nodes[id] {
            Node::File { live, durable } => durable.clone_from(live),
            Node::Folder { live, durable, pending } => {
                durable.clone_from(live);
                pending.clear();
            }
        }
    }

    fn identity(&self, id: usize) -> Identity {
        let len = match &self.nodes[id] {
            Node::File { live, .. } => live.len() as u64,
            Node::Folder { .. } => 0,
        };
        Identity { device: 0, inode: id as u64, len }
    }
}

impl Fs for Faulty {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let (mut disk, _) = self.call()?;
        let id = disk.add(path, Node::File { live: Vec::new(), durable: Vec::new() })?;
        Ok(Box::new(Handle { disk: self.clone(), id }))
    }

    fn open(&self, root: &Path, parts: &[&str]) -> io::Result<Box<dyn Input>> {
        let (disk, _) = self.call()?;
        let id = disk.find(&parts.iter().fold(root.to_path_buf(), |path, part| path.join(part)))?;
        match disk.nodes[id] {
            Node::File { .. } => Ok(Box::new(Handle { disk: self.clone(), id })),
            Node::Folder { .. } => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        let (disk, _) = self.call()?;
        disk.find(path).map(|id| disk.identity(id))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let (mut disk, _) = self.call()?;
        disk.add(path, Node::folder(Entries::new())).map(|_| ())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let (disk, _) = self.call()?;
        match &disk.nodes[disk.find(dir)?] {
            Node::Folder { live, .. } => Ok(live.keys().cloned().collect()),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (mut disk, _) = self.call()?;
        let id = disk.find(from)?;
        if let Ok(old) = disk.find(to)
            && matches!(&disk.nodes[old], Node::Folder { live, .. } if !live.is_empty())
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let ((folder, old), (_, new)) = (disk.parent(from)?, disk.parent(to)?);
        disk.change(folder, vec![(old, None), (new, Some(id))]);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (mut disk, _) = self.call()?;
        disk.find(path)?;
        let (folder, name) = disk.parent(path)?;
        disk.change(folder, vec![(name, None)]);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let (mut disk, fault) = self.call()?;
        let id = disk.find(dir)?;
        disk.sync(id, fault);
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Result<Box<dyn Lock>, String>> {
        let (mut disk, _) = self.call()?;
        if disk.find(path).is_err() {
            disk.add(path, Node::File { live: Vec::new(), durable: Vec::new() })?;
        }
        if !disk.locked.insert(path.to_path_buf()) {
            return Ok(Err("another".to_owned()));
        }
        Ok(Ok(Box::new(HeldLock { disk: self.clone(), path: path.to_path_buf() })))
    }
}

#[derive(Debug)]
struct Handle {
    disk: Faulty,
    id: usize,
}

impl Output for Handle {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let (mut disk, fault) = self.disk.call()?;
        let len = if fault == Some(Fault::ShortWrite) { bytes.len().div_ceil(2) } else { bytes.len() };
        let (start, end) = (offset as usize, offset as usize + len);
        if let Node::File { live, .. } = &mut disk.nodes[self.id] {
            live.resize(live.len().max(end), 0);
            live[start..end].copy_from_slice(&bytes[..len]);
        }
        Ok(len)
    }

    fn reserve(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        self.disk.call().map(|_| ())
    }

    fn seal(&mut self) -> io::Result<()> {
        self.disk.call().map(|_| ())
    }

    fn sync(&mut self) -> io::Result<()> {
        let (mut disk, fault) = self.disk.call()?;
        disk.sync(self.id, fault);
        Ok(())
    }
}

impl Input for Handle {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let (disk, _) = self.disk.call()?;
        let Node::File { live, .. } = &disk.nodes[self.id] else { return Ok(0) };
        let bytes = live.get(offset as usize..).unwrap_or(&[]);
        let len = bytes.len().min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn identity(&self) -> io::Result<Identity> {
        let (disk, _) = self.disk.call()?;
        Ok(disk.identity(self.id))
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

#[derive(Debug)]
struct HeldLock {
    disk: Faulty,
    path: PathBuf,
}

impl Lock for HeldLock {
    fn release(&mut self) -> io::Result<()> {
        self.disk.call().map(|_| ())
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        self.disk.disk().locked.remove(&self.path);
    }
}
