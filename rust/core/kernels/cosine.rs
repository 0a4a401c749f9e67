//! Cosines between rows, in `f64`.

#![allow(clippy::inline_always)] // bodies of `per_isa`, which compiles each once per instruction set

use super::gemm::isa::per_isa;

/// Partial sums of each of the [`dots`]; part of the definition of their last bits.
const LANES: usize = 32;

/// Products of `f32` are exact in `f64`, so fusing them with the addition changes nothing.
#[inline(always)]
fn dots_body<const FUSED: bool>(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let (mut ab, mut aa, mut bb) = ([0.0_f64; LANES], [0.0_f64; LANES], [0.0_f64; LANES]);
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut add = |l: usize, a: f32, b: f32| {
        let (a, b) = (f64::from(a), f64::from(b));
        if FUSED {
            (ab[l], aa[l], bb[l]) = (a.mul_add(b, ab[l]), a.mul_add(a, aa[l]), b.mul_add(b, bb[l]));
        } else {
            (ab[l], aa[l], bb[l]) = (a * b + ab[l], a * a + aa[l], b * b + bb[l]);
        }
    };
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            add(l, a[l], b[l]);
        }
    }
    for (l, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        add(l, *a, *b);
    }
    (ab.iter().sum(), aa.iter().sum(), bb.iter().sum())
}

per_isa! {
    /// `(a'b, a'a, b'b)` in `f64`, the same bits on every path.
    pub fn dots(a: &[f32], b: &[f32]) -> (f64, f64, f64) = dots_body;
}
