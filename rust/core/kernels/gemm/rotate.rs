//! A random rotation that spreads outlier dimensions, so that one step size fits all elements of a row.
//!
//! `R = H · D`: `D` flips signs by a fixed seed, `H` is the Hadamard transform over the index bits from 16 upward, so that
//! all butterflies are whole vectors. `R` is orthogonal: `Rx · Rw = x · w`. A width that is no power of two is covered by
//! two overlapping transforms, of the first and of the last `16 · 2^p` elements. Outliers without it: one dimension a
//! hundred times the others costs every other dimension its resolution. (Randomised Hadamard: Ailon & Chazelle 2009.)

use crate::kernels::isa::{Isa, per_isa};

/// Elements that stay side by side in every butterfly.
const SIDE: usize = 16;

/// The sign of element `i`, from a fixed seed.
fn sign(i: usize) -> f32 {
    let mut z = (i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    if z >> 63 == 0 { 1.0 } else { -1.0 }
}

/// Rotation of vectors of one width.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Of the first transform, then of the second: the second would gather again what the first has spread evenly.
    signs: [Vec<f32>; 2],
    span: usize,
    norm: f32,
}

impl Rotation {
    /// The rotation of vectors of width `d`.
    pub fn new(d: usize) -> Self {
        let span = if d < SIDE { 1 } else { SIDE << (d / SIDE).ilog2() };
        let norm = (1.0 / (span / SIDE).max(1) as f64).sqrt() as f32;
        Self { signs: [(0..d).map(sign).collect(), (d..d + span).map(sign).collect()], span, norm }
    }

    /// Bound on the rounding of [`apply`](Self::apply): the norm of the error per unit of norm of the vector.
    ///
    /// Each butterfly and each normalisation rounds every element once; the constant itself is rounded too.
    pub fn rounding(&self) -> f64 {
        let stages = f64::from((self.span / SIDE).max(1).ilog2());
        2.0 * (stages + 4.0) * 2.0_f64.powi(-23)
    }

    /// Rotates `x` in place.
    pub fn apply(&self, isa: Isa, x: &mut [f32]) {
        rotate(isa, x, &self.signs, self.norm);
    }
}

#[inline(always)]
fn rotate_body<const FUSED: bool>(x: &mut [f32], signs: &[Vec<f32>; 2], norm: f32) {
    let span = signs[1].len();
    flip(x, &signs[0]);
    if span <= SIDE {
        return;
    }
    hadamard(&mut x[..span], norm);
    if span < x.len() {
        let start = x.len() - span;
        flip(&mut x[start..], &signs[1]);
        hadamard(&mut x[start..], norm);
    }
}

#[inline(always)]
fn flip(x: &mut [f32], signs: &[f32]) {
    for (x, sign) in x.iter_mut().zip(signs) {
        *x *= sign;
    }
}

#[inline(always)]
fn hadamard(x: &mut [f32], norm: f32) {
    let mut stride = SIDE;
    while stride < x.len() {
        let factor = if stride * 2 == x.len() { norm } else { 1.0 };
        for pair in x.chunks_exact_mut(stride * 2) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = ((*a + *b) * factor, (*a - *b) * factor);
            }
        }
        stride *= 2;
    }
}

per_isa! {
    fn rotate(x: &mut [f32], signs: &[Vec<f32>; 2], norm: f32) = rotate_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn a_rotation_keeps_inner_products_and_spreads_an_outlier() {
        for d in [1, 15, 16, 48, 100, 768, 2304] {
            let rotation = Rotation::new(d);
            let mut x: Vec<f32> = (0..d).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
            let mut w: Vec<f32> = (0..d).map(|i| ((i * 61 + 7) % 97) as f32 / 48.0 - 1.0).collect();
            x[d / 2] = 1000.0;
            let inner = |x: &[f32], w: &[f32]| -> f64 {
                x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let (before, size) = (inner(&x, &w), (inner(&x, &x) * inner(&w, &w)).sqrt());
            rotation.apply(Isa::PLAIN, &mut x);
            rotation.apply(Isa::PLAIN, &mut w);
            assert!((inner(&x, &w) - before).abs() <= 2.0 * rotation.rounding() * size, "d={d}");
            if d >= 768 {
                assert!(x.iter().all(|v| v.abs() < 400.0), "d={d}");
            }
        }
    }
}
