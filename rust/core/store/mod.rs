#![doc = include_str!("FORMAT.md")]

pub mod format;
pub mod fs;
pub mod manifest;
pub mod writer;

pub use format::{Column, Scalar};
pub use manifest::{Manifest, Table};
pub use writer::{Nonfinite, Writer};
