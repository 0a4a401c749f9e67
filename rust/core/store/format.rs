//! A shard as bytes: a safetensors header of exactly one page, then tensors side by side, then their checksums.
//!
//! A shard is a table of `n` rows whose columns are tensors; its layout follows from its columns and `n` alone. So
//! reading checks twice: [`parse_header`] holds the bytes to the rules of safetensors, and [`Shard::check`] holds
//! the result to the one layout that the manifest allows. Pure functions of byte slices; every sum is checked.
#![deny(clippy::arithmetic_side_effects)]

use std::fmt;
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::store::keys::{Unknown, unique};

/// Bytes of a header with its length word: one page, so that data starts on a page.
pub const HEADER: usize = 4096;
/// Bytes under one checksum.
pub const BLOCK: usize = 1 << 20;
/// Name of the tensor of checksums, the last of every shard.
pub const CHECKS: &str = "block_crc32c";
/// Name of the zero bytes that align the checksums, where the columns end off a multiple of four.
pub const PADDING: &str = "padding";

/// Length word at the start of a safetensors file, in bytes.
const LENGTH_WORD: usize = 8;
/// Value of the length word of every shard.
const JSON_LEN: usize = HEADER.saturating_sub(LENGTH_WORD);

/// Element type of a tensor on disk, named by its safetensors code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the codes of safetensors")]
pub enum Scalar {
    F32,
    F16,
    #[serde(rename = "BF16")]
    Bf16,
    U8,
    U32,
    U64,
}

impl Scalar {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::U64 => 8,
        }
    }

    /// Code in a safetensors header.
    pub const fn code(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::U8 => "U8",
            Self::U32 => "U32",
            Self::U64 => "U64",
        }
    }

    /// The type of activations that this is, if it is one.
    pub fn dtype(self) -> Option<Dtype> {
        Dtype::parse(self.code())
    }
}

impl From<Dtype> for Scalar {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// One column of a shard: a tensor `(n, width)`, or `(n,)` without a width.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name of the tensor.
    pub name: String,
    /// Its element type.
    pub dtype: Scalar,
    /// Elements per row; `None` for a vector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u64>,
    #[serde(flatten, deserialize_with = "unique")]
    pub(super) unknown: Unknown,
}

impl Column {
    /// A matrix column `(n, width)`.
    pub fn matrix(name: &str, dtype: Scalar, width: u64) -> Self {
        Self { name: name.to_owned(), dtype, width: Some(width), unknown: Unknown::new() }
    }

    /// A vector column `(n,)`.
    pub fn vector(name: &str, dtype: Scalar) -> Self {
        Self { name: name.to_owned(), dtype, width: None, unknown: Unknown::new() }
    }

    /// Bytes per row, unless they overflow.
    pub fn row_bytes(&self) -> Option<u64> {
        self.width.unwrap_or(1).checked_mul(self.dtype.size() as u64)
    }

    fn shape(&self, n: u64) -> Vec<u64> {
        std::iter::once(n).chain(self.width).collect()
    }
}

/// One tensor of a file: where its bytes lie in the data section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Code of the element type.
    pub dtype: Scalar,
    /// Shape.
    pub shape: Vec<u64>,
    /// First byte in the data section.
    pub begin: u64,
    /// First byte behind the tensor.
    pub end: u64,
}

/// The layout of a shard: its tensors in file order and its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Columns, then padding where needed, then checksums.
    pub tensors: Vec<Tensor>,
    /// Bytes under checksums: columns and padding.
    pub checked: u64,
    /// Bytes of the whole file.
    pub file_len: u64,
}

impl Shard {
    /// The layout of `n` rows of `columns`; `None` when a size overflows.
    pub fn new(columns: &[Column], n: u64) -> Option<Self> {
        let mut tensors = Vec::with_capacity(columns.len().checked_add(2)?);
        let mut end = 0_u64;
        for column in columns {
            let begin = end;
            end = begin.checked_add(column.row_bytes()?.checked_mul(n)?)?;
            let (name, shape) = (column.name.clone(), column.shape(n));
            tensors.push(Tensor { name, dtype: column.dtype, shape, begin, end });
        }
        let gap = end.next_multiple_of(4).checked_sub(end)?;
        if gap > 0 {
            let begin = end;
            end = end.checked_add(gap)?;
            tensors.push(Tensor { name: PADDING.into(), dtype: Scalar::U8, shape: vec![gap], begin, end });
        }
        let (checked, blocks) = (end, end.div_ceil(BLOCK as u64));
        end = end.checked_add(blocks.checked_mul(4)?)?;
        tensors.push(Tensor {
            name: CHECKS.into(),
            dtype: Scalar::U32,
            shape: vec![blocks],
            begin: checked,
            end,
        });
        Some(Self { tensors, checked, file_len: end.checked_add(HEADER as u64)? })
    }

    /// The header of this layout: length word, JSON, spaces up to one page.
    ///
    /// # Errors
    /// [`Error::Shape`] when the names of the columns do not fit into one page.
    pub fn header(&self) -> Result<[u8; HEADER]> {
        let mut json = String::from(r#"{"__metadata__":{"format":"microtome","version":"1"}"#);
        for t in &self.tensors {
            let entry = serde_json::json!({
                "dtype": t.dtype.code(), "shape": t.shape, "data_offsets": [t.begin, t.end],
            });
            let name = serde_json::Value::from(t.name.as_str());
            json.extend([",", &name.to_string(), ":", &entry.to_string()]);
        }
        json.push('}');
        let mut page = [b' '; HEADER];
        page[..LENGTH_WORD].copy_from_slice(&(JSON_LEN as u64).to_le_bytes());
        match page[LENGTH_WORD..].get_mut(..json.len()) {
            Some(space) => space.copy_from_slice(json.as_bytes()),
            None => {
                return Err(Error::shape(
                    "columns",
                    format!("a header of {JSON_LEN} bytes"),
                    format!("{} bytes", json.len()),
                ));
            }
        }
        Ok(page)
    }

    /// Holds the parsed tensors of a file to this layout.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first tensor that differs.
    pub fn check(&self, found: &[Tensor], path: &Path) -> Result<()> {
        let pairs = self.tensors.iter().map(Some).chain(std::iter::repeat(None));
        for (wanted, tensor) in pairs.zip(found.iter().map(Some).chain([None])) {
            if wanted != tensor {
                return Err(damaged(
                    path,
                    "header differs from the manifest",
                    &describe(wanted),
                    &describe(tensor),
                ));
            }
        }
        Ok(())
    }
}

fn describe(tensor: Option<&Tensor>) -> String {
    tensor.map_or_else(
        || "no further tensor".to_owned(),
        |t| format!("{:?} {} {:?} at {}..{}", t.name, t.dtype.code(), t.shape, t.begin, t.end),
    )
}

/// The bytes of the checksum of block `index`, given the bytes of the tensor of checksums.
pub fn check_of(checks: &[u8], index: usize) -> Option<u32> {
    let begin = index.checked_mul(4)?;
    let word = checks.get(begin..begin.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

/// Reads the header of a shard of `file_len` bytes; `page` holds its first [`HEADER`] bytes, or all if it is shorter.
///
/// # Errors
/// [`Error::Unsafe`] for a pickle or an archive; [`Error::Corrupt`] for everything else that is not a header whose
/// tensors cover the file from the first byte of data to the last, in order and without a hole.
pub fn parse_header(page: &[u8], file_len: u64, path: &Path) -> Result<Vec<Tensor>> {
    if let Some(kind) = unsafe_kind(page) {
        return Err(Error::Unsafe {
            path: path.into(),
            reason: format!("is {kind}; convert it to safetensors"),
        });
    }
    let Some((length, json)) = page.split_at_checked(LENGTH_WORD).filter(|_| page.len() == HEADER) else {
        return Err(damaged(path, "truncated shard", &format!("{HEADER} bytes"), &page.len().to_string()));
    };
    if length != (JSON_LEN as u64).to_le_bytes() {
        let found = length.try_into().map_or(0, u64::from_le_bytes);
        return Err(damaged(path, "header length", &JSON_LEN.to_string(), &found.to_string()));
    }
    let Entries(entries) = serde_json::from_slice(json)
        .map_err(|e| damaged(path, "header", "the JSON of a safetensors header", &one_line(&e)))?;
    contiguous(entries, file_len, path)
}

/// Orders the entries by offset and holds them to: sizes agree with shapes, no hole, no overlap, the file covered.
fn contiguous(mut entries: Vec<(String, Entry)>, file_len: u64, path: &Path) -> Result<Vec<Tensor>> {
    entries.sort_by_key(|(_, e)| e.data_offsets);
    let mut tensors = Vec::with_capacity(entries.len());
    let mut end = 0_u64;
    for (name, Entry { dtype, shape, data_offsets: (begin, stop) }) in entries {
        let bytes = shape.iter().try_fold(dtype.size() as u64, |bytes, &side| bytes.checked_mul(side));
        let Some(bytes) = bytes else {
            return Err(damaged(path, "shape overflows", "a shape within the file", &format!("{shape:?}")));
        };
        if begin != end || stop.checked_sub(begin) != Some(bytes) {
            let expected = format!("{name:?} of {bytes} bytes at {end}");
            return Err(damaged(path, "offsets not contiguous", &expected, &format!("{begin}..{stop}")));
        }
        end = stop;
        tensors.push(Tensor { name, dtype, shape, begin, end });
    }
    match end.checked_add(HEADER as u64) {
        Some(expected) if expected == file_len => Ok(tensors),
        Some(expected) => {
            let reason = if file_len < expected { "truncated shard" } else { "bytes behind the data" };
            Err(damaged(path, reason, &format!("{expected} bytes"), &file_len.to_string()))
        }
        None => Err(damaged(path, "offsets overflow", "offsets within the file", &end.to_string())),
    }
}

/// What a file is that could run code when loaded, told by its first bytes.
pub fn unsafe_kind(start: &[u8]) -> Option<&'static str> {
    match start {
        [0x80, 2..=5, ..] => Some("a pickle"),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => Some("a zip archive, as torch.save writes"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Some("an npy file, which may hold pickled objects"),
        _ => None,
    }
}

/// [`Error::Corrupt`] with its four parts.
pub fn damaged(path: &Path, reason: &str, expected: &str, found: &str) -> Error {
    Error::Corrupt {
        path: path.into(),
        reason: reason.into(),
        expected: expected.into(),
        found: found.into(),
    }
}

fn one_line(error: &serde_json::Error) -> String {
    error.to_string().replace(['\n', '\r'], " ")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Scalar,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The tensors of a header in file order of its JSON; a name that stands twice is refused.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
        let mut entries: Vec<(String, Entry)> = Vec::new();
        let mut metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let twice = if name == "__metadata__" {
                map.next_value::<std::collections::BTreeMap<String, String>>()?;
                std::mem::replace(&mut metadata, true)
            } else {
                let twice = entries.iter().any(|(known, _)| *known == name);
                entries.push((name.clone(), map.next_value()?));
                twice
            };
            if twice {
                return Err(serde::de::Error::custom(format!("{name:?} stands twice")));
            }
        }
        Ok(Entries(entries))
    }
}

/// The file name of a hook or row table: everything outside `[A-Za-z0-9._-]` percent-encoded.
pub fn file_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-') {
            out.push(char::from(byte));
        } else {
            out.extend(["%", &format!("{byte:02X}")]);
        }
    }
    out.push_str(".safetensors");
    out
}
