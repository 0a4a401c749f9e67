//! Cosines between rows, in `f64`.

#![allow(clippy::inline_always)] // bodies of `per_isa`, which compiles each once per instruction set

use super::gemm::dot::fused;
use super::isa::per_isa;

/// Partial sums of each of the [`dots`]; part of the definition of their last bits.
const LANES: usize = 32;
/// Lanes that are added in one reading of the rows: those of all three sums fit the registers of 256-bit processors.
const HALF: usize = LANES / 2;

#[inline(always)]
fn dots_body<const FUSED: bool>(a: &[f32], b: &[f32]) -> (f64, f64, f64) {
    let (mut ab, mut aa, mut bb) = ([0.0_f64; LANES], [0.0_f64; LANES], [0.0_f64; LANES]);
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for half in 0..LANES / HALF {
        let mut sums = [[0.0_f64; HALF]; 3];
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (&a.as_chunks::<HALF>().0[half], &b.as_chunks::<HALF>().0[half]);
            for l in 0..HALF {
                let (a, b) = (f64::from(a[l]), f64::from(b[l]));
                sums[0][l] = fused::<FUSED>(a, b, sums[0][l]);
                sums[1][l] = fused::<FUSED>(a, a, sums[1][l]);
                sums[2][l] = fused::<FUSED>(b, b, sums[2][l]);
            }
        }
        for (lanes, sums) in [&mut ab, &mut aa, &mut bb].into_iter().zip(sums) {
            lanes.as_chunks_mut::<HALF>().0[half] = sums;
        }
    }
    for (l, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        let (a, b) = (f64::from(a), f64::from(b));
        ab[l] = fused::<FUSED>(a, b, ab[l]);
        aa[l] = fused::<FUSED>(a, a, aa[l]);
        bb[l] = fused::<FUSED>(b, b, bb[l]);
    }
    (ab.iter().sum(), aa.iter().sum(), bb.iter().sum())
}

per_isa! {
    /// `(a'b, a'a, b'b)` in `f64`, the same bits on every path.
    pub fn dots(a: &[f32], b: &[f32]) -> (f64, f64, f64) = dots_body;
}
