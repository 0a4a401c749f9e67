//! Feature statistics, top samples and FVU from codes: nanoseconds per slot at the sizes of real dictionaries.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use microtome_core::kernels::moments::{Moments, accumulate};
use microtome_core::kernels::residual::{Decoder, reconstruction_error};
use microtome_core::metrics::features::{Accumulator, Labelled};
use microtome_core::metrics::top::TopSamples;
use microtome_core::scan::Context;
use microtome_core::{Codes, Data, Rows};

const N: usize = 16_384;
const K: usize = 32;

/// A linear congruential sequence: features as good as random, the same in every run.
fn sequence(len: usize, below: usize) -> Vec<u32> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below as u64) as u32
    };
    (0..len).map(|_| next()).collect()
}

fn activations(len: usize) -> Vec<f32> {
    sequence(len, 1000).into_iter().map(|v| (v + 1) as f32 * 0.01).collect()
}

fn moments(c: &mut Criterion) {
    let values = activations(N * K);
    let mut group = c.benchmark_group("moments");
    group.throughput(Throughput::Elements((N * K) as u64));
    for d_sae in [16_384, 32_768, 131_072] {
        let indices = sequence(N * K, d_sae);
        let mut cells = vec![Moments::default(); d_sae];
        group.bench_function(format!("d_sae {d_sae}"), |b| {
            b.iter(|| assert!(accumulate(black_box(&mut cells), &indices, &values)));
        });
    }
}

fn top_samples(c: &mut Criterion) {
    let (indices, values) = (sequence(N * K, 16_384), activations(N * K));
    let samples: Vec<u64> = (0..N as u64).map(|r| r / 64).collect();
    let positions: Vec<u32> = (0..N as u32).map(|r| r % 64).collect();
    let codes = Codes::fixed(&indices, &values, K, 16_384).expect("lengths fit");
    let block = Labelled { codes, groups: None, samples: &samples, positions: &positions };
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 };
    let mut group = c.benchmark_group("top samples");
    group.throughput(Throughput::Elements((N * K) as u64));
    group.bench_function("20 of d_sae 16384", |b| {
        b.iter(|| {
            let fold = TopSamples::new(16_384, 20, true, 1).expect("n is positive");
            let mut state = Accumulator::new(fold);
            state.update(black_box(&block), &context).expect("codes are sound");
            state.finish(&context).expect("not cancelled")
        });
    });
}

fn residual(c: &mut Criterion) {
    let (n, d, d_sae) = (512, 1024, 16_384);
    let (indices, values) = (sequence(n * K, d_sae), activations(n * K));
    let codes = Codes::fixed(&indices, &values, K, d_sae).expect("lengths fit");
    let (x, w) = (activations(n * d), activations(d_sae * d));
    let x = Rows::new(Data::F32(&x), d).expect("lengths fit");
    let decoder = Decoder { weights: Rows::new(Data::F32(&w), d).expect("lengths fit"), bias: None };
    let mut group = c.benchmark_group("reconstruction error");
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("rows of d 1024, k 32", |b| {
        b.iter(|| reconstruction_error(black_box(x), &codes, 0, &decoder));
    });
}

criterion_group!(benches, moments, top_samples, residual);
criterion_main!(benches);
