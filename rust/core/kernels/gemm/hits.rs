//! Taking down what hits: of one row of a tile the bounds whose bits are set, and their features, one after the other.
//!
//! How many hits a row has nobody can foretell, so a loop over them costs a mispredicted branch each time. With AVX-512 two
//! registers are compressed and stored whole, hits first.
#![allow(unsafe_code)]

use super::tile::COLS;
use crate::kernels::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Path;

/// Writes the hits to the front of both arrays, in order, and says how many they are; `first` is the feature of bit 0. What lies
/// behind the hits, up to [`COLS`] of them, may be written too.
#[inline]
pub(super) fn take_down(
    isa: Isa,
    upper: &[f32; COLS],
    hits: u32,
    first: u32,
    bounds: &mut [f32; COLS],
    features: &mut [u32; COLS],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa.path() >= Path::Avx512 {
        // SAFETY: paths of AVX-512 ask for their instructions.
        return unsafe { avx512::take_down(upper, hits, first, bounds, features) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    let (count, mut hits) = (hits.count_ones() as usize, hits);
    for (bound, feature) in bounds.iter_mut().zip(features).take(count) {
        let c = hits.trailing_zeros();
        hits &= hits - 1;
        (*bound, *feature) = (upper[c as usize], first + c);
    }
    count
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_add_epi32, _mm512_loadu_ps, _mm512_mask_compress_epi32,
        _mm512_mask_compress_ps, _mm512_set1_epi32, _mm512_setr_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
    };

    use super::COLS;

    /// Lanes of a register.
    const LANES: usize = COLS / 2;

    /// See [`super::take_down`].
    ///
    /// # Safety
    /// The processor has the target features of this function.
    #[target_feature(enable = "avx512f,popcnt")]
    pub(super) unsafe fn take_down(
        upper: &[f32; COLS],
        hits: u32,
        first: u32,
        bounds: &mut [f32; COLS],
        features: &mut [u32; COLS],
    ) -> usize {
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let names = _mm512_add_epi32(lanes, _mm512_set1_epi32(first.cast_signed()));
        let (low, high) = (hits as u16, (hits >> LANES) as u16);
        let place = low.count_ones() as usize;
        // SAFETY: registers are read from both halves of `upper`, and stored at a place of at most 16 of 32.
        unsafe {
            compress(low, _mm512_loadu_ps(upper.as_ptr()), names, bounds.as_mut_ptr(), features.as_mut_ptr());
            let names = _mm512_add_epi32(names, _mm512_set1_epi32(LANES as i32));
            let half = _mm512_loadu_ps(upper.as_ptr().add(LANES));
            compress(high, half, names, bounds.as_mut_ptr().add(place), features.as_mut_ptr().add(place));
        }
        hits.count_ones() as usize
    }

    /// Stores lanes of both registers that hit, then others.
    ///
    /// # Safety
    /// A register may be stored at either address.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn compress(hits: u16, bounds: __m512, names: __m512i, to: *mut f32, to_names: *mut u32) {
        // Compressed over itself: where the rest is cleared instead, some processors wait for the last use of the register.
        let bounds = _mm512_mask_compress_ps(bounds, hits, bounds);
        let names = _mm512_mask_compress_epi32(names, hits, names);
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_ps(to, bounds);
            _mm512_storeu_si512(to_names.cast(), names);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_come_first_and_in_order() {
        let upper: [f32; COLS] = std::array::from_fn(|c| c as f32 / 3.0);
        for isa in Isa::available() {
            for hits in [0, 1, 1 << 31, 0x8001_8001, 0xffff, 0xffff_0000, 0xa5a5_5a5a, u32::MAX] {
                let (mut bounds, mut features) = ([0.0; COLS], [0; COLS]);
                let count = take_down(isa, &upper, hits, 64, &mut bounds, &mut features);
                let expected: Vec<u32> = (0..COLS as u32).filter(|c| hits >> c & 1 == 1).collect();
                let bounds = bounds[..count].iter().map(|b| (b * 3.0).round() as u32);
                assert!(bounds.eq(expected.iter().copied()), "{isa:?} {hits:x}");
                assert!(features[..count].iter().map(|f| f - 64).eq(expected), "{isa:?} {hits:x}");
            }
        }
    }
}
