//! Dividing candidates by whether they reach a bar: those that stay move to the front, in their order.
//!
//! Every candidate is written, and the next one over those that do not stay: no branch that could be mispredicted. With AVX2 a
//! register of eight goes at a time, put in order by a table of the 256 sets of its lanes.
#![allow(unsafe_code)]

use super::waiting::reaches;
use crate::kernels::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Path;

/// How far a division has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sifted {
    /// Candidates read.
    read: usize,
    /// Those that stay.
    pub(super) kept: usize,
    /// Those that were taken.
    pub(super) taken: usize,
}

/// Keeps the candidates that reach `bar`, or the others, whose features it then leaves out and writes to `taken`, which has room
/// for all.
pub(super) fn sift<const REACHING_STAY: bool>(
    isa: Isa,
    upper: &mut [f32],
    feature: &mut [u32],
    bar: f32,
    taken: &mut [u32],
) -> Sifted {
    let mut sifted = Sifted::default();
    #[cfg(target_arch = "x86_64")]
    if isa.path() >= Path::Avx2 {
        // SAFETY: every path of x86-64 from this one on has its instructions.
        sifted = unsafe { avx2::registers::<REACHING_STAY>(upper, feature, bar, taken) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    for i in sifted.read..upper.len() {
        let (bound, j, reaching) = (upper[i], feature[i], reaches(upper[i], bar));
        (upper[sifted.kept], feature[sifted.kept]) = (bound, j);
        sifted.kept += usize::from(reaching == REACHING_STAY);
        if !REACHING_STAY {
            taken[sifted.taken] = j;
            sifted.taken += usize::from(reaching);
        }
    }
    sifted
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _CMP_NLT_UQ, _mm_loadl_epi64, _mm256_cmp_ps, _mm256_cvtepu8_epi32, _mm256_loadu_ps,
        _mm256_loadu_si256, _mm256_movemask_ps, _mm256_permutevar8x32_epi32, _mm256_permutevar8x32_ps,
        _mm256_set1_ps, _mm256_storeu_ps, _mm256_storeu_si256,
    };

    use super::Sifted;

    /// Lanes of a register.
    const LANES: usize = 8;

    /// For every set of lanes, given by its bits, the lanes in it, one after the other.
    static MEMBERS: [[u8; LANES]; 1 << LANES] = {
        let mut members = [[0; LANES]; 1 << LANES];
        let mut set = 0;
        while set < members.len() {
            let (mut rest, mut place) = (set, 0);
            while rest > 0 {
                members[set][place] = rest.trailing_zeros() as u8;
                rest &= rest - 1;
                place += 1;
            }
            set += 1;
        }
        members
    };

    /// The candidates that fill whole registers.
    ///
    /// # Safety
    /// The processor has the target features of this function.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn registers<const REACHING_STAY: bool>(
        upper: &mut [f32],
        feature: &mut [u32],
        bar: f32,
        taken: &mut [u32],
    ) -> Sifted {
        let read = upper.len() / LANES * LANES;
        assert!(feature.len() >= read && (REACHING_STAY || taken.len() >= read));
        let mut sifted = Sifted { read, ..Sifted::default() };
        for i in (0..read).step_by(LANES) {
            // SAFETY: a register is read at `i` and stored behind what stays and behind what is taken, which are at most `i`
            // each; the arrays hold `read`, a multiple of the lanes.
            unsafe {
                let bounds = _mm256_loadu_ps(upper.as_ptr().add(i));
                let features = _mm256_loadu_si256(feature.as_ptr().add(i).cast());
                // Not less than: what is not a number counts as reaching.
                let reach =
                    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(bounds, _mm256_set1_ps(bar))) as u8;
                let stay = if REACHING_STAY { reach } else { !reach };
                let order = members(stay);
                let front = _mm256_permutevar8x32_epi32(features, order);
                _mm256_storeu_ps(
                    upper.as_mut_ptr().add(sifted.kept),
                    _mm256_permutevar8x32_ps(bounds, order),
                );
                _mm256_storeu_si256(feature.as_mut_ptr().add(sifted.kept).cast(), front);
                sifted.kept += stay.count_ones() as usize;
                if !REACHING_STAY {
                    let front = _mm256_permutevar8x32_epi32(features, members(reach));
                    _mm256_storeu_si256(taken.as_mut_ptr().add(sifted.taken).cast(), front);
                    sifted.taken += reach.count_ones() as usize;
                }
            }
        }
        sifted
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn members(set: u8) -> __m256i {
        // SAFETY: eight bytes are read where eight are.
        _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(MEMBERS[usize::from(set)].as_ptr().cast()) })
    }
}
