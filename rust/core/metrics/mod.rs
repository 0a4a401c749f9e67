//! Metrics as folds over blocks of rows. A fold keeps partial results that merge; it opens no file and starts no thread.

pub mod bootstrap;
pub mod circuit;
pub mod cka;
pub mod decode;
pub mod encode;
pub mod features;
pub mod firing;
pub mod fvu;
pub mod similarity;
pub mod top;
pub mod words;

pub use crate::scan::Fold;
