//! Activation analytics of vision-language models, in rooms along the way the data takes:
//!
//! ```text
//! store (bytes on disk) ──blocks──▶ scan (parallel, ordered) ──▶ metrics (folds) ──▶ kernels (one block in, numbers out)
//! ```
//!
//! * [`rows`]: the one view that crosses all rooms, a borrowed matrix of f32, f16 or bf16.
//! * [`codes`]: its counterpart after encoding, borrowed sparse codes.
//! * [`kernels`]: pure arithmetic on one block. No I/O, no threads, no names of files.
//! * [`metrics`]: accumulators over blocks: `init`, `update`, `merge`, finish.
//! * [`scan`]: runs a fold over a source of rows, in parallel, with the same bits for any thread count.
//! * [`memory`]: zeros on large pages, for what is large.
//! * [`store`]: writes and reads the files; normative text in `store/FORMAT.md`.

pub mod codes;
pub mod dtype;
pub mod error;
pub mod kernels;
pub mod memory;
pub mod metrics;
pub mod rows;
pub mod scan;
pub mod store;

pub use codes::Codes;
pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use rows::{Data, Rows};
