//! Products of rows with a packed dictionary whose epilogue selects: no matrix of scores is ever written.
//!
//! 1. Every feature is rounded once ([`features`]), and every block of rows ([`strips`]), to integers of 8 or 16 bits or to
//!    bf16, as the [`plan`] says for the processor and the width, and what the rounding leaves out is measured
//!    ([`quantize`]).
//! 2. A micro-kernel ([`amx`], [`avx512`], [`avx2`], `neon`, or [`dot`] in f32 elsewhere) makes a [`tile`] of upper bounds of
//!    scores.
//! 3. [`select`] keeps the features whose bound reaches the row's threshold, scores those in f64 ([`dot::dot`]) and raises
//!    the threshold to the k-th best real score so far. What was dropped is provably no member.
//!
//! So the result never depends on the screen, the instruction set or the blocking: it is that of the f64 scores alone.
//!
//! # Use from other kernels
//!
//! [`Dictionary`] is packed panel by panel (32 features each, see [`Blank`]), or by one thread as here;
//! [`Dictionary::select`] then finds, for each row of a block, the k best features, also of negative score:
//!
//! ```
//! use microtome_core::kernels::gemm::{Certificate, Dictionary, Plan, Space, Terms, Wanted};
//!
//! let features = vec![1.0_f32, 0.0, 0.0, 1.0, 0.6, 0.8]; // three of width 2
//! let plan = Plan::new(2, Certificate::Deterministic, None)?;
//! let dictionary = Dictionary::of(&plan, &features, |_| Terms::default())?;
//! let mut space = Space::default();
//! dictionary.select(&[3.0, 4.0], Wanted::Best { k: 2, positive: false }, &mut space);
//! let best: Vec<_> = space.found(0).iter().map(|s| (s.feature, s.rank)).collect();
//! assert_eq!((best[0].0, best[1].0), (2, 1));
//! # Ok::<(), microtome_core::Error>(())
//! ```

// Bodies are inlined into one function per instruction set: that is what compiles them for it.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bars;
#[cfg(test)]
mod certificates;
pub mod dictionary;
pub mod dot;
#[cfg(test)]
mod exact;
pub mod features;
mod guess;
mod hits;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pairs;
mod pass;
pub mod plan;
pub mod quantize;
pub mod rotate;
pub mod select;
mod sift;
pub mod strips;
pub mod tile;
mod waiting;

pub use dictionary::{Blank, Dictionary};
pub use features::Terms;
pub use plan::{Certificate, Plan, Screen};
pub use select::{Scored, Space, Wanted};
