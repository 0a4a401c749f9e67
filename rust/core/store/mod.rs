#![doc = include_str!("FORMAT.md")]

pub mod bytes;
pub mod faulty;
mod finite;
pub mod format;
pub mod fs;
mod keys;
mod leftovers;
pub mod manifest;
pub mod map;
mod open_shard;
pub mod reader;
mod same_run;
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
