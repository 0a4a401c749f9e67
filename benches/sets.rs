//! Overlap of bitsets, the top n of many scores, and the chance level of IoU.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64};

use criterion::{Criterion, criterion_group, criterion_main};
use microtome_core::metrics::circuit::chance::{Stratum, chance};
use microtome_core::metrics::circuit::intersection_and_union;
use microtome_core::metrics::circuit::top::top_n;
use microtome_core::scan::Context;

fn hash(i: u64) -> u64 {
    i.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

fn sets(criterion: &mut Criterion) {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 };
    let words = |seed: u64| (0..100_000_000 / 64).map(|i| hash(i + seed)).collect::<Vec<u64>>();
    let (a, b) = (words(1), words(1 << 40));
    criterion.bench_function("overlap of 1e8 nodes", |bencher| {
        bencher.iter(|| black_box(intersection_and_union(&a, &b, &context)));
    });
    let scores: Vec<f32> = (0..10_000_000).map(|i| (hash(i) >> 40) as f32).collect();
    criterion.bench_function("top 7 % of 1e7 scores", |bencher| {
        bencher.iter(|| black_box(top_n(&scores, 700_000, &context)));
    });
    let stratum = Stratum { n: 100_000_000, a: 7_000_000, b: 15_000_000 };
    criterion.bench_function("chance level among 1e8 nodes", |bencher| {
        bencher.iter(|| black_box(chance(&[stratum], None)));
    });
}

criterion_group!(benches, sets);
criterion_main!(benches);
