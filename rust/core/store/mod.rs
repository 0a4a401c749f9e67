#![doc = include_str!("FORMAT.md")]

pub mod bytes;
pub mod faulty;
pub mod format;
pub mod fs;
pub mod manifest;
pub mod map;
pub mod reader;
pub mod selection;
pub mod shard;
pub mod writer;

pub use bytes::Backend;
pub use format::{Column, Scalar};
pub use manifest::{Manifest, Table};
pub use reader::Store;
pub use selection::{RowIndex, Selection};
pub use shard::Verify;
pub use writer::{Nonfinite, Writer};
