#![doc = include_str!("FORMAT.md")]

pub mod faulty;
pub mod format;
pub mod fs;
pub mod manifest;
pub mod map;
pub mod reader;
pub mod selection;
pub mod shard;
pub mod writer;

pub use format::{Column, Scalar};
pub use manifest::{Manifest, Table};
pub use reader::Store;
pub use selection::{RowIndex, Selection};
pub use shard::{Backend, Verify};
pub use writer::{Nonfinite, Writer};
