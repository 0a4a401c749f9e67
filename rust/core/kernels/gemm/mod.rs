//! Products of rows with a packed dictionary whose epilogue selects: no matrix of scores is ever written.
//!
//! 1. [`pack`] rounds every feature once, and every block of rows once, to 8-bit integers (or bf16), and measures what
//!    the rounding leaves out ([`quantize`]).
//! 2. A micro-kernel ([`avx512`], or [`dot`] in f32 elsewhere) makes a [`tile`] of upper bounds of scores.
//! 3. [`select`] keeps the features whose bound reaches the row's threshold, scores those in f64 ([`dot::dot`]) and raises
//!    the threshold to the k-th best real score so far. What was dropped is provably no member.
//!
//! So the result never depends on the screen, the instruction set or the blocking: it is that of the f64 scores alone.
//!
//! # Use from other kernels
//!
//! [`select::Dictionary`] is packed from [`Panel`]s (one per 32 features, see [`Plan::panel`]);
//! [`select::Dictionary::select`] then finds, for each row of a block, the k best features, also of negative score:
//!
//! ```
//! use microtome_core::kernels::gemm::select::{Dictionary, Space, Wanted};
//! use microtome_core::kernels::gemm::pack::{Certificate, Plan, Terms};
//!
//! let features = vec![1.0_f32, 0.0, 0.0, 1.0, 0.6, 0.8]; // three of width 2
//! let plan = Plan::new(2, Certificate::Deterministic, None)?;
//! let panels = vec![plan.panel(0, features, &Terms::default())];
//! let dictionary = Dictionary::new(plan, panels);
//! let mut space = Space::default();
//! dictionary.select(&[3.0, 4.0], Wanted::Best { k: 2, positive: false }, &mut space);
//! let best: Vec<_> = space.found(0).iter().map(|s| (s.feature, s.rank)).collect();
//! assert_eq!((best[0].0, best[1].0), (2, 1));
//! # Ok::<(), microtome_core::Error>(())
//! ```

// Bodies are inlined into one function per instruction set: that is what compiles them for it.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod dot;
pub mod isa;
pub mod pack;
pub mod quantize;
pub mod rotate;
pub mod select;
pub mod tile;

pub use isa::Isa;
pub use pack::{Certificate, Panel, Plan, Screen, Terms};
pub use select::{Dictionary, Scored, Space, Wanted};
