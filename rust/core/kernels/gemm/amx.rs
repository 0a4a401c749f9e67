//! The micro-kernel of Intel's matrix extension (AMX): 48 rows × 32 features of sums in six tile registers.
//!
//! A tile register holds 16 lines of 64 bytes. TDPBF16PS adds to a tile of f32 sums, 16 rows × 16 features, the products of
//! 16 rows × 32 bf16 and 32 bf16 × 16 features, in 16 cycles: 16 times the rate of two f32 multiply-adds of 512 bits a
//! cycle. Features lie in pairs along the input width, as in every packed panel; rows lie as they are.
//!
//! Three tiles of rows by two of features leave one register for either side. Lines of the panel come from the second-level
//! cache and serve 48 rows, so that it can follow: two tiles of rows are as fast in registers and slower in all.
#![allow(unsafe_code)]

use std::arch::asm;
use std::cell::Cell;
use std::marker::PhantomData;

use super::strips::{LINE, TILED_STRIPS, row_words};
use super::tile::{COLS, ROWS};
use crate::kernels::isa::{Isa, Path};

/// Rows of the strips that are multiplied at once.
const HEIGHT: usize = TILED_STRIPS * ROWS;
/// Lines of a tile register.
const LINES: usize = 16;

/// Sums of some strips with a panel.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Sums([[f32; COLS]; HEIGHT]);

impl Default for Sums {
    fn default() -> Self {
        Self([[0.0; COLS]; HEIGHT])
    }
}

impl Sums {
    /// The sums of each strip.
    pub fn strips(&self) -> &[[[f32; COLS]; ROWS]] {
        self.0.as_chunks().0
    }
}

/// Shapes of the tile registers: all are 16 lines of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    lines: [u8; 16],
}

static SHAPES: Shapes = Shapes {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    line_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    lines: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

thread_local! {
    static SHAPED: Cell<bool> = const { Cell::new(false) };
}

/// The tile registers of this thread, shaped until this is dropped: the proof that [`Registers::multiply`] may use them.
#[derive(Debug)]
pub struct Registers(PhantomData<*const ()>);

impl Registers {
    /// Shapes the registers.
    ///
    /// # Panics
    /// Where the path is not [`Path::Amx`], or the registers of this thread are shaped already.
    pub fn shape(isa: Isa) -> Self {
        assert_eq!(isa.path(), Path::Amx, "a path with tile registers");
        assert!(!SHAPED.replace(true), "one owner of the tile registers of a thread");
        // SAFETY: the path is there, so the system permits the registers, and nobody else here uses them; the shapes are 64 readable
        // bytes of a valid palette.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, preserves_flags)) };
        Self(PhantomData)
    }

    /// The sums of products of the first `rows` rows of [`TILED_STRIPS`] strips with a panel. The panel has whole lines of steps, a row
    /// of the strips [`row_words`] of as many words. Sums of rows beyond may be anything.
    #[allow(clippy::unused_self, reason = "it is the proof that the registers are shaped")]
    pub fn multiply(&self, strips: &[u32], rows: usize, panel: &[u32], sums: &mut Sums) {
        let words = panel.len() / COLS;
        let row = row_words(words);
        assert!(words > 0 && words.is_multiple_of(LINE), "whole lines: {words} words");
        assert!(
            strips.len() == HEIGHT * row && panel.len() == words * COLS,
            "{TILED_STRIPS} strips and a panel"
        );
        assert!(rows <= HEIGHT, "at most {HEIGHT} rows");
        // SAFETY: `self` proves that the registers are shaped. Rows of the strips, steps of the panel and rows of sums are there for
        // as many tiles as are multiplied.
        unsafe {
            if rows > HEIGHT - LINES {
                multiply_three(strips.as_ptr(), row, panel.as_ptr(), words, sums.0.as_mut_ptr());
                return;
            }
            for first in (0..rows).step_by(LINES) {
                let strip = strips.as_ptr().add(first * row);
                multiply_one(strip, row, panel.as_ptr(), words, sums.0.as_mut_ptr().add(first));
            }
        }
    }
}

/// Bytes from step to step of a panel, and from row to row of sums.
const PANEL_LINE: usize = COLS * size_of::<u32>();

/// Three tiles of rows, `row` words from each to the next, by two of features.
///
/// # Safety
/// The registers are shaped. There are 48 rows of `words` words, `words` steps of a panel and 48 rows of sums.
unsafe fn multiply_three(a: *const u32, row: usize, panel: *const u32, words: usize, sums: *mut [f32; COLS]) {
    // SAFETY: the caller's promise: a step reads a line of every row and 16 steps of both halves of the panel; at the end 48 rows
    // of sums are written.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "2:",
            "tileloadd tmm7, [{b} + {b_line}]",
            "tileloadd tmm6, [{a0} + {a_line}]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "tileloadd tmm6, [{a1} + {a_line}]",
            "tdpbf16ps tmm1, tmm6, tmm7",
            "tileloadd tmm6, [{a2} + {a_line}]",
            "tdpbf16ps tmm2, tmm6, tmm7",
            "tileloadd tmm7, [{b} + {b_line} + 64]",
            "tdpbf16ps tmm5, tmm6, tmm7",
            "tileloadd tmm6, [{a1} + {a_line}]",
            "tdpbf16ps tmm4, tmm6, tmm7",
            "tileloadd tmm6, [{a0} + {a_line}]",
            "tdpbf16ps tmm3, tmm6, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {a2}, 64",
            "add {b}, {tile}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {b_line}], tmm0",
            "tilestored [{sums} + {b_line} + {tile}], tmm1",
            "tilestored [{sums} + {b_line} + 2 * {tile}], tmm2",
            "tilestored [{sums} + {b_line} + 64], tmm3",
            "tilestored [{sums} + {b_line} + {tile} + 64], tmm4",
            "tilestored [{sums} + {b_line} + 2 * {tile} + 64], tmm5",
            a0 = inout(reg) a => _,
            a1 = inout(reg) a.add(LINES * row) => _,
            a2 = inout(reg) a.add(2 * LINES * row) => _,
            b = inout(reg) panel => _,
            steps = inout(reg) words / LINE => _,
            sums = in(reg) sums,
            a_line = in(reg) row * size_of::<u32>(),
            b_line = in(reg) PANEL_LINE,
            tile = const LINES * PANEL_LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// One tile of rows, for what is left of a block.
///
/// # Safety
/// As [`multiply_three`], for 16 rows.
unsafe fn multiply_one(a: *const u32, row: usize, panel: *const u32, words: usize, sums: *mut [f32; COLS]) {
    // SAFETY: as in `multiply_three`.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm5, [{a} + {a_line}]",
            "tileloadd tmm6, [{b} + {b_line}]",
            "tdpbf16ps tmm0, tmm5, tmm6",
            "tileloadd tmm7, [{b} + {b_line} + 64]",
            "tdpbf16ps tmm1, tmm5, tmm7",
            "add {a}, 64",
            "add {b}, {tile}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {b_line}], tmm0",
            "tilestored [{sums} + {b_line} + 64], tmm1",
            a = inout(reg) a => _,
            b = inout(reg) panel => _,
            steps = inout(reg) words / LINE => _,
            sums = in(reg) sums,
            a_line = in(reg) row * size_of::<u32>(),
            b_line = in(reg) PANEL_LINE,
            tile = const LINES * PANEL_LINE,
            out("tmm0") _, out("tmm1") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the registers are shaped, so they are there. Released, they are not saved at every change of threads.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
        SHAPED.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two bf16 of small integers, whose products are exact.
    fn pair(i: usize) -> (u32, [f32; 2]) {
        let values = [(i * 7 % 13) as f32 - 6.0, (i * 5 % 11) as f32 - 4.0];
        let [low, high] = values.map(|v| v.to_bits() >> 16);
        (high << 16 | low, values)
    }

    #[test]
    fn tiles_add_up_every_product_once() {
        let Some(isa) = Isa::new(Path::Amx) else { return };
        for words in [LINE, 3 * LINE] {
            let (a, b) =
                (|r: usize, k: usize| pair(r * words + k), |k: usize, c: usize| pair(1000 + k * COLS + c));
            let mut strips = vec![u32::MAX; HEIGHT * row_words(words)];
            for (r, row) in strips.chunks_mut(row_words(words)).enumerate() {
                row[..words].iter_mut().enumerate().for_each(|(k, word)| *word = a(r, k).0);
            }
            let panel: Vec<u32> = (0..words * COLS).map(|i| b(i / COLS, i % COLS).0).collect();
            let registers = Registers::shape(isa);
            for rows in [1, 16, 17, 32, 33, HEIGHT] {
                let mut sums = Sums([[f32::NAN; COLS]; HEIGHT]);
                registers.multiply(&strips, rows, &panel, &mut sums);
                for (r, row) in sums.strips().iter().flatten().enumerate().take(rows) {
                    for (c, sum) in row.iter().enumerate() {
                        let product =
                            |k| a(r, k).1.into_iter().zip(b(k, c).1).map(|(a, b)| a * b).sum::<f32>();
                        let expected = (0..words).map(product).sum::<f32>();
                        assert_eq!(sum.to_bits(), expected.to_bits(), "({r}, {c}) of {rows} rows");
                    }
                }
            }
        }
    }
}
