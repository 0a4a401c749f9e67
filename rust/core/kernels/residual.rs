//! Means, centred squares and squared errors of a block of rows, in f64; reconstruction from sparse codes fused with
//! its error, so that no reconstruction is ever stored.
//!
//! Sums run over eight lanes that are added in a fixed order at the end of a row. The compiler turns lanes into vector
//! registers of whatever width the machine has, and the bits stay the same.
//!
//! Decoding is bound by memory: k rows of the decoder, anywhere in an array larger than the caches, for each row. While
//! one is added the next is fetched.

#![allow(unsafe_code)] // one dispatch by instruction set
#![allow(clippy::inline_always)] // a body takes the instruction set of the function that it is inlined into

use crate::codes::Codes;
use crate::dtype::Element;
use crate::kernels::prefetch::fetch;
use crate::rows::{Data, Rows};
use crate::with_elements;

const LANES: usize = 8;

fn total(lanes: [f64; LANES]) -> f64 {
    let pairs = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    (pairs[0] + pairs[2]) + (pairs[1] + pairs[3])
}

/// `Σ_j (a_j − b_j)²` with `b_j` given by a function of the column.
#[inline(always)]
pub fn squared_distance<A: Element>(a: &[A], b: impl Fn(usize) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for (c, chunk) in chunks.iter().enumerate() {
        for (l, lane) in lanes.iter_mut().enumerate() {
            let difference = f64::from(chunk[l].widen()) - b(c * LANES + l);
            *lane += difference * difference;
        }
    }
    let first = chunks.len() * LANES;
    for (l, (lane, x)) in lanes.iter_mut().zip(rest).enumerate() {
        let difference = f64::from(x.widen()) - b(first + l);
        *lane += difference * difference;
    }
    total(lanes)
}

/// The first row `x_0`, and the mean of the rows relative to it, `Σ (x − x_0) / n`. The latter is exactly zero where
/// rows are equal, and keeps its digits where they are far from zero.
pub fn shifted_mean(rows: Rows<'_>) -> (Vec<f64>, Vec<f64>) {
    let (n, d) = (rows.n() as f64, rows.d());
    let mut offset = vec![0.0; d];
    let first: Vec<f64> = with_elements!(rows.data(), x => {
        let first: Vec<f64> = x.iter().take(d).map(|v| f64::from(v.widen())).collect();
        for row in x.chunks_exact(d) {
            for ((s, v), f) in offset.iter_mut().zip(row).zip(&first) {
                *s += f64::from(v.widen()) - f;
            }
        }
        first
    });
    for s in &mut offset {
        *s /= n;
    }
    (first, offset)
}

/// Σ ‖x − centre‖² over the rows.
pub fn centred_squares(rows: Rows<'_>, centre: &[f64]) -> f64 {
    with_elements!(rows.data(), x => {
        x.chunks_exact(rows.d()).map(|row| squared_distance(row, |j| centre[j])).sum()
    })
}

/// Σ ‖x − y‖² over the rows of two matrices of one shape.
pub fn squared_error(x: Rows<'_>, y: Rows<'_>) -> f64 {
    fn typed<A: Element, B: Element>(x: &[A], y: &[B], d: usize) -> f64 {
        x.chunks_exact(d)
            .zip(y.chunks_exact(d))
            .map(|(x, y)| squared_distance(x, |j| f64::from(y[j].widen())))
            .sum()
    }
    with_elements!(x.data(), a => with_elements!(y.data(), b => typed(a, b, x.d())))
}

/// A decoder: `x̂ = Σ_f h_f W_dec[f] + b_dec`.
#[derive(Clone, Copy, Debug)]
pub struct Decoder<'a> {
    /// `(d_sae, d_in)`.
    pub weights: Rows<'a>,
    /// `(d_in,)`; zero where missing.
    pub bias: Option<&'a [f32]>,
}

/// Adds `h_f W_dec[f]` over the slots of one row. `false` at a feature outside the dictionary.
#[inline(always)]
fn add_rows<W: Element>(weights: &[W], indices: &[u32], values: &[f32], out: &mut [f64]) -> bool {
    let d = out.len();
    let row_of = |slot: usize| {
        let first = *indices.get(slot)? as usize * d;
        weights.get(first..first + d)
    };
    for (slot, &h) in values.iter().enumerate() {
        if let Some(next) = row_of(slot + 1) {
            prefetch(next);
        }
        if h == 0.0 {
            continue;
        }
        let Some(row) = row_of(slot) else { return false };
        let h = f64::from(h);
        for (o, w) in out.iter_mut().zip(row) {
            *o += h * f64::from(w.widen());
        }
    }
    true
}

/// Asks for the cache lines of `row`.
#[inline(always)]
fn prefetch<W>(row: &[W]) {
    for first in (0..row.len()).step_by(64 / size_of::<W>()) {
        fetch(row, first);
    }
}

/// Σ ‖x − x̂‖² over the rows, where row `r` of `x` is decoded from row `first_row + r` of `codes`. `None` at a feature
/// outside the dictionary.
pub fn reconstruction_error(
    x: Rows<'_>,
    codes: &Codes<'_>,
    first_row: usize,
    decoder: &Decoder<'_>,
) -> Option<f64> {
    with_elements!(x.data(), x_data => with_elements!(decoder.weights.data(), weights => {
        Residual { x: x_data, d: x.d(), codes, first_row, weights, bias: decoder.bias }.error()
    }))
}

/// Rows, their codes, and a decoder, with their element types known.
struct Residual<'a, X, W> {
    x: &'a [X],
    d: usize,
    codes: &'a Codes<'a>,
    first_row: usize,
    weights: &'a [W],
    bias: Option<&'a [f32]>,
}

impl<X: Element, W: Element> Residual<'_, X, W> {
    fn error(&self) -> Option<f64> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            #[target_feature(enable = "avx2")]
            fn wide<X: Element, W: Element>(residual: &Residual<'_, X, W>) -> Option<f64> {
                residual.by_rows()
            }
            // SAFETY: the processor has AVX2.
            return unsafe { wide(self) };
        }
        self.by_rows()
    }

    /// One source for every instruction set: no operation is reordered or fused, so neither are the bits.
    #[inline(always)]
    fn by_rows(&self) -> Option<f64> {
        let mut x_hat = vec![0.0; self.d];
        let mut sum = 0.0;
        for (r, row) in self.x.chunks_exact(self.d).enumerate() {
            match self.bias {
                Some(bias) => x_hat.iter_mut().zip(bias).for_each(|(o, &b)| *o = f64::from(b)),
                None => x_hat.fill(0.0),
            }
            let (indices, values) = self.codes.row(self.first_row + r);
            if !add_rows(self.weights, indices, values, &mut x_hat) {
                return None;
            }
            let x_hat = &x_hat[..row.len()];
            sum += squared_distance(row, |j| x_hat[j]);
        }
        Some(sum)
    }
}

/// Row, column and value of the first element that is not finite.
pub fn first_non_finite(rows: Rows<'_>) -> Option<(usize, usize, f32)> {
    fn typed<A: Element>(x: &[A], d: usize) -> Option<(usize, usize, f32)> {
        x.iter().position(|v| !v.widen().is_finite()).map(|i| (i / d, i % d, x[i].widen()))
    }
    match rows.data() {
        Data::F32(x) => typed(x, rows.d()),
        Data::F16(x) => typed(x, rows.d()),
        Data::Bf16(x) => typed(x, rows.d()),
    }
}
