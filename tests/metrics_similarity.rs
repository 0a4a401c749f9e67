//! Matching is exact: the same as computing every cosine in `f64`.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicU64};

use microtome_core::kernels::gemm::dot::dot;
use microtome_core::kernels::isa::Isa;
use microtome_core::metrics::similarity::{Matches, match_rows, row_cosines};
use microtome_core::scan::Context;
use microtome_core::{Data, Rows};
use proptest::prelude::*;

const NAMES: [&str; 2] = ["W_a", "W_b"];

fn numbers(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n * d)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn with_context<T>(budget: usize, work: impl FnOnce(&Context<'_>) -> T) -> T {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    work(&Context { cancel: &cancel, done: &done, memory_budget: budget })
}

fn rows(x: &[f32], d: usize) -> Rows<'_> {
    Rows::new(Data::F32(x), d).unwrap()
}

fn matches(a: &[f32], b: &[f32], d: usize, k: usize, budget: usize) -> Matches {
    with_context(budget, |context| match_rows(rows(a, d), rows(b, d), k, NAMES, context)).unwrap()
}

fn exact(x: &[f32], y: &[f32]) -> f64 {
    dot(Isa::PLAIN, x, y)
}

/// Every cosine in f64, sorted, ties to the lower row.
fn definition(a: &[f32], b: &[f32], d: usize, k: usize) -> (Vec<i64>, Vec<f64>) {
    let best = |x: &[f32]| {
        let cosine = |y: &[f32]| exact(x, y) * (1.0 / exact(y, y).sqrt()) / exact(x, x).sqrt();
        let mut all: Vec<(f64, i64)> = b.chunks(d).zip(0..).map(|(y, j)| (cosine(y), j)).collect();
        all.sort_by(|p, q| q.0.total_cmp(&p.0).then(p.1.cmp(&q.1)));
        all.truncate(k);
        all
    };
    let all: Vec<(f64, i64)> = a.chunks(d).flat_map(best).collect();
    (all.iter().map(|m| m.1).collect(), all.iter().map(|m| m.0).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn matches_are_those_of_the_definition(
        n in 1_usize..90, m in 1_usize..150, d in 1_usize..40, k in 1_usize..5, seed in 0_u64..1000, ties in 0_usize..3,
    ) {
        let k = k.min(m);
        let (a, mut b) = (numbers(n, d, seed), numbers(m, d, seed + 7));
        for tie in 0..ties.min(m / 2) {
            b.copy_within(tie * d..(tie + 1) * d, (m - 1 - tie) * d);
        }
        let expected = definition(&a, &b, d, k);
        let found = matches(&a, &b, d, k, 1 << 28);
        prop_assert_eq!(&found.indices, &expected.0);
        for (found, expected) in found.cosines.iter().zip(&expected.1) {
            prop_assert!((found - expected).abs() < 1e-15);
        }
    }
}

#[test]
fn close_matches_of_large_dictionaries_are_those_of_the_definition_whatever_the_threads() {
    let (n, d) = (2200, 70);
    let (a, mut b) = (numbers(n, d, 11), numbers(n, d, 12));
    for (i, (x, y)) in a.chunks(d).zip(b.chunks_mut(d)).enumerate().filter(|(i, _)| i % 4 > 0) {
        x.iter().zip(y).for_each(|(x, y)| *y = x + *y * (i % 4) as f32 / 8.0);
    }
    b[..5 * d].copy_from_slice(&a[7 * d..12 * d]);
    let expected = definition(&a, &b, d, 1);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| matches(&a, &b, d, 1, 1 << 28))
    };
    let found = run(1);
    assert_eq!(found.indices, expected.0);
    assert!(found.cosines.iter().zip(&expected.1).all(|(p, q)| (p - q).abs() < 1e-15));
    for threads in [2, 5] {
        let again = run(threads);
        assert!(again.cosines.iter().zip(&found.cosines).all(|(p, q)| p.to_bits() == q.to_bits()));
        assert_eq!(again.indices, found.indices);
    }
}

#[test]
fn matches_of_rows_of_any_length_are_the_same() {
    let (n, d) = (90, 40);
    let (a, b) = (numbers(n, d, 5), numbers(n, d, 6));
    let bits = |b: &[f32]| {
        let found = matches(&a, b, d, 3, 1 << 28);
        (found.indices, found.cosines.iter().map(|c| c.to_bits()).collect::<Vec<_>>())
    };
    // Numbers of 24 bits, which 2^-125 takes below the range of normal f32 and not out of f32.
    let scales = [2.0_f32.powi(-125), 1.0, 2.0_f32.powi(120), 2.0_f32.powi(-40)];
    let scaled: Vec<f32> = b
        .chunks(d)
        .zip(scales.iter().cycle())
        .flat_map(|(row, scale)| row.iter().map(move |v| v * scale))
        .collect();
    assert_eq!(bits(&scaled), bits(&b));
}

#[test]
fn bits_depend_on_neither_threads_nor_budget() {
    let (n, d, k) = (500, 24, 3);
    let (a, b) = (numbers(n, d, 1), numbers(2100, d, 2));
    let run = |threads: usize, budget: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| matches(&a, &b, d, k, budget));
        (found.indices, found.cosines.iter().map(|c| c.to_bits()).collect::<Vec<_>>())
    };
    let reference = run(1, 1 << 28);
    for (threads, budget) in [(2, 1 << 28), (3, 0), (7, 1 << 20), (16, 0)] {
        assert_eq!(run(threads, budget), reference);
    }
}

#[test]
fn zero_rows_match_nothing_and_are_listed() {
    let d = 5;
    let (mut a, mut b) = (numbers(4, d, 3), numbers(3, d, 4));
    a[2 * d..3 * d].fill(0.0);
    b[..d].fill(0.0);
    let found = matches(&a, &b, d, 3, 1 << 20);
    assert_eq!((found.zero_a, found.zero_b), (vec![2], vec![0]));
    assert_eq!(found.indices[6..9], [-1, -1, -1]);
    assert!(found.cosines[6..9].iter().all(|c| c.is_nan()));
    assert!(found.indices[..3].contains(&1) && found.indices[..3].contains(&2) && found.indices[2] == -1);
    let same = with_context(0, |c| row_cosines(rows(&a[..15], d), rows(&b, d), NAMES, c)).unwrap();
    assert!(same[0].is_nan() && same[2].is_nan() && same[1].abs() <= 1.0);
}

#[test]
fn cosines_of_equal_index_are_those_of_the_definition() {
    let (n, d) = (300, 77);
    let (a, b) = (numbers(n, d, 8), numbers(n, d, 9));
    let found = with_context(0, |c| row_cosines(rows(&a, d), rows(&b, d), NAMES, c)).unwrap();
    for ((x, y), found) in a.chunks(d).zip(b.chunks(d)).zip(found) {
        let expected = exact(x, y) / (exact(x, x).sqrt() * exact(y, y).sqrt());
        assert!((found - expected).abs() < 1e-15);
    }
    let error = with_context(0, |c| row_cosines(rows(&a, d), rows(&b[d..], d), NAMES, c)).unwrap_err();
    assert_eq!(error.to_string(), "W_b: expected shape (300, 77), as W_a, found shape (299, 77)");
}

#[test]
fn bad_input_is_refused_by_name() {
    let (a, mut b) = (numbers(6, 4, 5), numbers(6, 4, 6));
    let error = |b: &[f32], d: usize, k: usize| {
        with_context(0, |c| match_rows(rows(&a, 4), rows(b, d), k, NAMES, c)).unwrap_err().to_string()
    };
    assert_eq!(error(&b, 3, 1), "W_b: expected width 4, as W_a, found width 3");
    assert_eq!(error(&b, 4, 7), "k: expected 1 to 6, the rows of W_b, found 7");
    assert_eq!(error(&b, 4, 0), "k: expected 1 to 6, the rows of W_b, found 0");
    b[9] = f32::NAN;
    assert_eq!(error(&b, 4, 1), "W_b: expected finite values, found NaN at row 2, column 1");
}
