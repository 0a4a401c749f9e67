//! Tile registers against the definition of their products.
#![allow(clippy::unwrap_used, missing_docs)]

mod program;

use emulated_avx512::cpu::Cpu;
use emulated_avx512::execute::{Refusal, execute};
use iced_x86::code_asm::*;
use program::Random;

/// Runs a few instructions; `r8` to `r15` hold `general`.
fn run(general: [u64; 8], write: impl FnOnce(&mut CodeAssembler)) -> Result<(), Refusal> {
    let (mut cpu, mut assembler) = (Cpu::ZERO, CodeAssembler::new(64).unwrap());
    cpu.gpr[8..].copy_from_slice(&general);
    write(&mut assembler);
    assembler.instructions().iter().try_for_each(|instruction| execute(&mut cpu, instruction))
}

/// What LDTILECFG reads for registers of so many lines and words of a line.
fn shapes(of: &[(usize, usize)]) -> [u8; 64] {
    let mut shapes = [0; 64];
    shapes[0] = 1;
    for (t, (lines, words)) in of.iter().enumerate() {
        (shapes[48 + t], shapes[16 + 2 * t]) = (*lines as u8, 4 * *words as u8);
    }
    shapes
}

/// Pairs of small integers, and the same as pairs of bf16.
fn pairs(n: usize, random: &mut Random) -> (Vec<[i32; 2]>, Vec<u32>) {
    let values: Vec<_> = (0..n).map(|_| [0; 2].map(|_| (random.bits() % 31) as i32 - 15)).collect();
    let half = |v: i32| (v as f32).to_bits() >> 16;
    let words = values.iter().map(|[low, high]| half(*high) << 16 | half(*low)).collect();
    (values, words)
}

fn address<T>(of: &[T]) -> u64 {
    of.as_ptr().expose_provenance() as u64
}

#[test]
fn products_of_tiles_are_those_of_matrices() {
    let mut random = Random(5);
    for (m, k, n) in [(16, 16, 16), (12, 16, 16), (3, 5, 7), (1, 1, 1)] {
        let shapes = shapes(&[(m, n), (m, k), (k, n)]);
        let ((a, a_words), (b, b_words)) = (pairs(m * k, &mut random), pairs(k * n, &mut random));
        // Lines of sums are further apart than they are long.
        let stride = n + 3;
        let mut sums: Vec<f32> = (0..m * stride).map(|i| i as f32).collect();
        let before = sums.clone();
        let lines = [k, n, stride].map(|words| 4 * words as u64);
        let sums_address = sums.as_mut_ptr().expose_provenance() as u64;
        let general = [
            address(&shapes),
            address(&a_words),
            lines[0],
            address(&b_words),
            lines[1],
            sums_address,
            lines[2],
            0,
        ];
        run(general, |p| {
            p.ldtilecfg(ptr(r8)).unwrap();
            p.tileloadd(tmm0, ptr(r13 + r14)).unwrap();
            p.tileloadd(tmm1, ptr(r9 + r10)).unwrap();
            p.tileloadd(tmm2, ptr(r11 + r12)).unwrap();
            p.tdpbf16ps(tmm0, tmm1, tmm2).unwrap();
            p.tilestored(ptr(r13 + r14), tmm0).unwrap();
            p.tilerelease().unwrap();
        })
        .unwrap();
        for (i, (sum, before)) in sums.iter().zip(before).enumerate() {
            let (row, column) = (i / stride, i % stride);
            let product = |k_: usize| {
                let (a, b) = (a[row * k + k_], b[k_ * n + column]);
                a[0] * b[0] + a[1] * b[1]
            };
            let added = if column < n { (0..k).map(product).sum::<i32>() } else { 0 };
            assert_eq!(sum.to_bits(), (before + added as f32).to_bits(), "{m} {k} {n}: ({row}, {column})");
        }
    }
}

#[test]
fn registers_without_shapes_and_shapes_that_do_not_fit_are_refused() {
    let words = [0_u32; 256];
    let fine = shapes(&[(16, 16), (16, 16), (16, 16)]);
    let product = |shapes: &[u8; 64]| {
        run([address(shapes), address(&words), 64, 0, 0, 0, 0, 0], |p| {
            p.ldtilecfg(ptr(r8)).unwrap();
            p.tileloadd(tmm1, ptr(r9 + r10)).unwrap();
            p.tdpbf16ps(tmm0, tmm1, tmm2).unwrap();
        })
    };
    assert_eq!(product(&fine), Ok(()));
    assert_eq!(product(&shapes(&[(16, 16), (16, 16)])), Err(Refusal::Form));
    assert_eq!(product(&shapes(&[(12, 16), (16, 16), (16, 16)])), Err(Refusal::Form));
    assert_eq!(product(&shapes(&[(17, 16), (16, 16), (16, 16)])), Err(Refusal::Form));
    let mut palette = fine;
    palette[0] = 2;
    assert_eq!(product(&palette), Err(Refusal::Form));
    assert_eq!(run([0; 8], |p| p.tilezero(tmm0).unwrap()), Err(Refusal::Form));
}
