//! `manifest.json`: what the store holds. A step exists if and only if the manifest names it.
#![deny(clippy::arithmetic_side_effects)]

mod rules;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::store::format::{Column, file_name, unsafe_kind};
use crate::store::fs::{Fs, Input, io_error, read_full_at, retry};
use crate::store::keys::{Unknown, unique};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// File name of the table of samples in a step.
pub const SAMPLES: &str = "samples.parquet";
/// Format this build writes; it reads every minor version of the same major one that asks for nothing unknown.
pub const FORMAT: Format = Format { major: 1, minor: 0 };

/// What stands between the text under the manifest's checksum and the eight digits, and what behind them.
const CRC_KEY: &[u8] = b"\"crc32c\": \"";
const CRC_END: &[u8] = b"\"\n}\n";
const CRC_DIGITS: usize = 8;
/// Rows of the largest shard whose header must fit: its numbers have the most digits.
const MANY_ROWS: u64 = 1 << 32;

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// Changes when an older reader would read wrong values.
    pub major: u32,
    /// Changes when something is added.
    pub minor: u32,
}

/// A hook, or the row table of a space: the columns of one shard per step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Hook name, or name of the row space.
    pub name: String,
    /// Row space; hooks of one space have the same rows. Absent for the row tables themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<String>,
    /// Tensors of the shard, in file order.
    pub columns: Vec<Column>,
    #[serde(flatten, deserialize_with = "unique")]
    unknown: Unknown,
}

impl Table {
    /// The table of the hook `name`, whose rows are those of `space`.
    pub fn hook(name: &str, space: &str, columns: Vec<Column>) -> Self {
        let (name, space) = (name.to_owned(), Some(space.to_owned()));
        Self { name, space, columns, unknown: Unknown::new() }
    }

    /// The row table of the space `name`.
    pub fn rows_of(name: &str, columns: Vec<Column>) -> Self {
        Self { name: name.to_owned(), space: None, columns, unknown: Unknown::new() }
    }

    /// The row space of this table's rows.
    pub fn row_space(&self) -> &str {
        self.space.as_deref().unwrap_or(&self.name)
    }

    /// The name of this table's file in a step.
    pub fn file_name(&self) -> String {
        match (&self.space, self.name.as_str()) {
            (Some(_), name) => file_name(name),
            (None, "tokens") => file_name("rows"),
            (None, space) => file_name(&format!("rows.{space}")),
        }
    }
}

/// One sealed file of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SealedFile {
    /// File name inside the step.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// CRC32C, as 8 hex digits. Of a shard: of its header followed by its tensor of block checksums. Else of the file.
    pub crc32c: String,
    #[serde(flatten, deserialize_with = "unique")]
    unknown: Unknown,
}

impl SealedFile {
    /// An entry for a file with this checksum.
    pub fn new(name: String, bytes: u64, crc32c: u32) -> Self {
        Self { name, bytes, crc32c: format!("{crc32c:08x}"), unknown: Unknown::new() }
    }
}

/// A committed range of rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Folder name: the step's number in six digits or more.
    pub name: String,
    /// Rows per row space.
    #[serde(deserialize_with = "unique")]
    pub rows: BTreeMap<String, u64>,
    /// Files in the order of [`Manifest::tables`], then the table of samples.
    pub files: Vec<SealedFile>,
    #[serde(flatten, deserialize_with = "unique")]
    unknown: Unknown,
}

impl Step {
    /// A step with these rows and files.
    pub fn new(name: String, rows: BTreeMap<String, u64>, files: Vec<SealedFile>) -> Self {
        Self { name, rows, files, unknown: Unknown::new() }
    }
}

/// The name of step number `index`.
pub fn step_name(index: usize) -> String {
    format!("{index:06}")
}

/// All that the manifest says.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Version the store was written with.
    pub format: Format,
    /// Facts of the run: model, revision, processor and the like.
    pub facts: Value,
    /// Hooks, in the order given by the writer.
    pub hooks: Vec<Table>,
    /// Row spaces with the columns of their row tables.
    pub spaces: Vec<Table>,
    /// Committed steps, in order.
    pub steps: Vec<Step>,
    /// Checksum that the text carried; the fingerprint of the store.
    pub crc32c: u32,
}

#[derive(Deserialize)]
struct Text {
    #[serde(deserialize_with = "unique")]
    format: Unknown,
    facts: Value,
    hooks: Vec<Table>,
    spaces: Vec<Table>,
    steps: Vec<Step>,
    #[allow(dead_code, reason = "checked on the bytes, before parsing")]
    crc32c: String,
    #[serde(flatten, deserialize_with = "unique")]
    unknown: Unknown,
}

#[derive(Deserialize)]
struct VersionOnly {
    #[serde(deserialize_with = "unique")]
    format: Unknown,
}

impl Manifest {
    /// A manifest without steps.
    pub fn new(facts: Value, hooks: Vec<Table>, spaces: Vec<Table>) -> Self {
        Self { format: FORMAT, facts, hooks, spaces, steps: Vec::new(), crc32c: 0 }
    }

    /// Hooks, then row tables: the shards of a step in order.
    pub fn tables(&self) -> impl Iterator<Item = &Table> {
        self.hooks.iter().chain(&self.spaces)
    }

    /// Committed rows of `space`.
    pub fn n_rows(&self, space: &str) -> u64 {
        // `validate` has shown that the sum does not overflow.
        self.steps.iter().filter_map(|s| s.rows.get(space)).fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The text of the manifest, with its checksum at the end.
    ///
    /// # Errors
    /// [`Error::Internal`] when a value has no JSON form, which no value of these types lacks.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (format, facts) = (line(&self.format)?, &self.facts);
        let (hooks, spaces, steps) = (lines(&self.hooks)?, lines(&self.spaces)?, lines(&self.steps)?);
        let text = format!(
            "{{\n\"format\": {format},\n\"facts\": {facts},\n\"hooks\": [\n{hooks}\n],\n\
             \"spaces\": [\n{spaces}\n],\n\"steps\": [\n{steps}\n],\n"
        );
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(CRC_KEY);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(format!("{crc:08x}").as_bytes());
        bytes.extend_from_slice(CRC_END);
        Ok(bytes)
    }

    /// Reads and validates the text of a manifest.
    ///
    /// # Errors
    /// [`Error::Manifest`] for damage and unsafe names, [`Error::Version`] for a format that this build does not
    /// read, [`Error::Unsafe`] for a pickle or an archive in place of the text.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        if let Some(kind) = unsafe_kind(bytes) {
            let reason = format!("is {kind}; a manifest is JSON");
            return Err(Error::Unsafe { path: path.into(), reason });
        }
        let crc32c = checksum_of(bytes, path)?;
        // The version decides before anything else is looked at: a later major version may look otherwise.
        let value: VersionOnly = parse(bytes, path)?;
        supported(&value.format, path)?;
        let text: Text = parse(bytes, path)?;
        let format = serde_json::from_value(Value::Object(text.format.into_iter().collect()))
            .map_err(|e| broken(path, &e.to_string()))?;
        let manifest = Self {
            format,
            facts: text.facts,
            hooks: text.hooks,
            spaces: text.spaces,
            steps: text.steps,
            crc32c,
        };
        manifest.refuse_unknown(&text.unknown, path)?;
        manifest.validate(path)?;
        Ok(manifest)
    }

    /// Reads the manifest of the store at `root`.
    ///
    /// # Errors
    /// As [`Manifest::from_bytes`]; [`Error::Io`] when there is none.
    pub fn read(fs: &dyn Fs, root: &Path) -> Result<Self> {
        let path = root.join(MANIFEST);
        let file = open_regular(fs, root, &[MANIFEST])?;
        let len = file.identity().map_err(io_error("stat", &path))?.len;
        // A file that does not end as a manifest does costs nothing, however long it is.
        let tail = read_range(&*file, len.saturating_sub(CRC_END.len() as u64), CRC_END.len() as u64, &path)?;
        let head = read_range(&*file, 0, len.min(8), &path)?;
        if tail != CRC_END && unsafe_kind(&head).is_none() {
            return Err(broken(&path, "truncated or damaged: expected a checksum at the end"));
        }
        Self::from_bytes(&read_range(&*file, 0, len, &path)?, &path)
    }
}

/// Opens a file of the store, which is a regular one and no link.
///
/// # Errors
/// [`Error::Manifest`] for anything but a regular file, [`Error::Io`] otherwise.
pub fn open_regular(fs: &dyn Fs, root: &Path, parts: &[&str]) -> Result<Box<dyn Input>> {
    let path = parts.iter().fold(root.to_path_buf(), |path, part| path.join(part));
    retry(|| fs.open(root, parts)).map_err(|e| match e.kind() {
        io::ErrorKind::InvalidInput => {
            broken(&path, "unsafe shard name: expected a regular file, not a link")
        }
        _ => io_error("open", &path)(e),
    })
}

/// The `len` bytes at `offset`, or those that there are.
///
/// # Errors
/// [`Error::Io`].
pub fn read_range(file: &dyn Input, offset: u64, len: u64, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    let filled = read_full_at(file, &mut bytes, offset).map_err(io_error("read", path))?;
    bytes.truncate(filled);
    Ok(bytes)
}

/// Holds the text to the checksum in its last field and returns it.
fn checksum_of(bytes: &[u8], path: &Path) -> Result<u32> {
    let parts = bytes.strip_suffix(CRC_END).and_then(|text| text.split_last_chunk::<CRC_DIGITS>());
    let Some((text, digits)) = parts.filter(|(text, _)| text.ends_with(CRC_KEY)) else {
        return Err(broken(path, "truncated or damaged: expected a checksum at the end"));
    };
    let crc = crc32c::crc32c(text);
    if format!("{crc:08x}").as_bytes() == digits {
        Ok(crc)
    } else {
        let found = String::from_utf8_lossy(digits);
        Err(broken(path, &format!("damaged manifest: expected crc32c {crc:08x}, found {found}")))
    }
}

fn supported(format: &Unknown, path: &Path) -> Result<()> {
    let number = |key: &str| format.get(key).and_then(Value::as_u64);
    match (number("major"), number("minor")) {
        (Some(major), Some(_)) if major == u64::from(FORMAT.major) => Ok(()),
        (Some(major), Some(minor)) => Err(Error::Version {
            path: path.into(),
            found: format!("format {major}.{minor}"),
            supported: format!("{}.x", FORMAT.major),
        }),
        _ => Err(broken(path, "expected a format with major and minor")),
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| broken(path, &format!("not a manifest: {e}")))
}

/// [`Error::Manifest`] with this reason.
pub fn broken(path: &Path, reason: &str) -> Error {
    Error::Manifest { path: path.into(), reason: reason.replace(['\n', '\r'], " ") }
}

fn line(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Internal(format!("manifest: {e}")))
}

fn lines(values: &[impl Serialize]) -> Result<String> {
    Ok(values.iter().map(line).collect::<Result<Vec<_>>>()?.join(",\n"))
}
