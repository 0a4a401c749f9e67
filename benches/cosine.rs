//! Best matches between dictionaries, and cosines of equal index.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64};

use criterion::{Criterion, criterion_group, criterion_main};
use microtome_core::metrics::similarity::{match_rows, row_cosines};
use microtome_core::scan::Context;
use microtome_core::{Data, Rows};

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let hash =
        |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (0..len as u64).map(|i| (hash(i + (seed << 40)) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn cosine(criterion: &mut Criterion) {
    let (n, d) = (4096, 512);
    let (a, b) = (numbers(n * d, 1), numbers(n * d, 2));
    let (Ok(a), Ok(b)) = (Rows::new(Data::F32(&a), d), Rows::new(Data::F32(&b), d)) else { return };
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 };
    let names = ["a", "b"];
    criterion.bench_function("match_rows 4096 x 4096 x 512", |bencher| {
        bencher.iter(|| black_box(match_rows(a, b, 1, names, &context)));
    });
    criterion.bench_function("row_cosines 4096 x 512", |bencher| {
        bencher.iter(|| black_box(row_cosines(a, b, names, &context)));
    });
}

criterion_group!(benches, cosine);
criterion_main!(benches);
