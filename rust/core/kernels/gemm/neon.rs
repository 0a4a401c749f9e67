//! The micro-kernel of aarch64 processors with dot products: 12 rows × 32 features of byte products, summed exactly.
//!
//! SDOT multiplies 16 signed bytes and adds them four by four in 32 bits, for the price of a multiply-add of four floats. The
//! second factor is one word of a register, the same for all lanes: four rows share a register, and nothing is broadcast.
//!
//! Four register tiles of 12 × 8 make a tile: 24 accumulators, two registers of the panel, three of the strip.
#![allow(unsafe_code)]

use std::arch::aarch64::{int32x4_t, vdupq_n_s32, vld1q_u32, vreinterpretq_s32_u32, vst1q_s32};
use std::arch::asm;

use super::tile::{self, COLS, Columns, Lines, ROWS, Tile};
use crate::kernels::isa::Isa;

/// Lanes of a register.
const LANES: usize = 4;
/// Registers of a row of a register tile.
const WIDTH: usize = 2;
/// Registers that hold the words of a step of the strip.
const HEIGHT: usize = ROWS / LANES;

type Sums = [[[i32; LANES]; COLS / LANES]; ROWS];

/// Bounds of a tile from signed bytes of rows and features.
///
/// `strip` holds [`ROWS`] words of four bytes per step, `panel` [`COLS`]; both have the same number of steps.
///
/// # Safety
/// The processor has the target features of this function.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn bytes(strip: &[u32], panel: &[u32], lines: &Lines, columns: &Columns, tile: &mut Tile) {
    let sums = products(strip, panel);
    for ((upper, sums), scale) in tile.upper.iter_mut().zip(&sums).zip(lines.scale) {
        for (upper, &sum) in upper.iter_mut().zip(sums.as_flattened()) {
            *upper = sum as f32 * scale;
        }
    }
    tile::bound(Isa::NEON, lines, columns, tile);
}

/// The sums of products of a tile.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn products(strip: &[u32], panel: &[u32]) -> Sums {
    let (a_steps, b_steps) = (strip.as_chunks::<ROWS>().0, panel.as_chunks::<COLS>().0);
    debug_assert_eq!(a_steps.len(), b_steps.len());
    let mut sums = Sums::default();
    add::<0>(a_steps, b_steps, &mut sums);
    add::<WIDTH>(a_steps, b_steps, &mut sums);
    add::<{ 2 * WIDTH }>(a_steps, b_steps, &mut sums);
    add::<{ 3 * WIDTH }>(a_steps, b_steps, &mut sums);
    sums
}

/// The sums of a register tile, from register `LEFT` on.
#[inline(never)] // as in `avx2`
#[target_feature(enable = "neon,dotprod")]
fn add<const LEFT: usize>(a: &[[u32; ROWS]], b: &[[u32; COLS]], sums: &mut Sums) {
    let mut registers = [[[vdupq_n_s32(0); WIDTH]; LANES]; HEIGHT];
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
        let b = [load(&b[LEFT]), load(&b[LEFT + 1])];
        for h in 0..HEIGHT {
            let a = load(&a[h]);
            for v in 0..WIDTH {
                registers[h][0][v] = dot::<0>(registers[h][0][v], b[v], a);
                registers[h][1][v] = dot::<1>(registers[h][1][v], b[v], a);
                registers[h][2][v] = dot::<2>(registers[h][2][v], b[v], a);
                registers[h][3][v] = dot::<3>(registers[h][3][v], b[v], a);
            }
        }
    }
    for (row, registers) in sums.iter_mut().zip(registers.as_flattened()) {
        for (v, &register) in registers.iter().enumerate() {
            // SAFETY: the sum is 16 writable bytes; the store has no alignment of its own.
            unsafe { vst1q_s32(row[LEFT + v].as_mut_ptr(), register) };
        }
    }
}

/// Adds the products of the four bytes of every lane of `b` with those of lane `LANE` of `a`.
///
/// The intrinsic is not stable in all compilers that this is built with.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const LANE: u8>(mut sum: int32x4_t, b: int32x4_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes the registers that are named, and the function has the features it needs.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {b:v}.16b, {a:v}.4b[{lane}]",
            sum = inlateout(vreg) sum, b = in(vreg) b, a = in(vreg) a, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &[u32; LANES]) -> int32x4_t {
    // SAFETY: `from` is 16 readable bytes; the load has no alignment of its own.
    vreinterpretq_s32_u32(unsafe { vld1q_u32(from.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::super::exact::{check, interleave, sequence};
    use super::*;
    use crate::kernels::isa::Path;

    #[test]
    fn sums_of_byte_products_are_those_of_64_bit_arithmetic() {
        if Isa::new(Path::NeonDot).is_none() {
            return;
        }
        let mut word = sequence();
        for steps in [1, 7, 128, 129] {
            let d = steps * 4;
            let mut bytes = |n: usize| -> Vec<i8> { (0..n * d).map(|_| (word() >> 8) as i8).collect() };
            let (rows, features) = (bytes(ROWS), bytes(COLS));
            let strip = interleave::<ROWS>(&bytemuck::pod_collect_to_vec(&rows));
            let panel = interleave::<COLS>(&bytemuck::pod_collect_to_vec(&features));
            // SAFETY: the processor was asked for dot products above.
            let sums = unsafe { products(&strip, &panel) };
            check(sums.as_flattened().as_flattened(), &rows, &features, d);
        }
    }
}
