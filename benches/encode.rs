//! Top-K encode of one block, per instruction path and screen.
//!
//! `cargo bench --bench encode`; rows per second count, ratios between the lines are what is stable.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use microtome_core::kernels::gemm::{Certificate, Dictionary, Plan, Space, Terms, Wanted};
use microtome_core::kernels::isa::Isa;
use microtome_core::metrics::decode::{CsrCodes, decode_rows};
use microtome_core::{Data, Rows};

const ROWS: usize = 120;

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        let sum: f32 = (0..4)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 24) as f32 - 0.5
            })
            .sum();
        sum * 1.732
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn dictionary(isa: Isa, w: &[f32], d: usize, certificate: Certificate) -> Dictionary {
    let plan = Plan::with_isa(isa, d, certificate, None);
    Dictionary::of(&plan, w, |_| Terms::default()).expect("some mebibytes")
}

fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    group.sample_size(10).throughput(Throughput::Elements(ROWS as u64));
    for (d, f, k) in [(512, 16_384, 32), (2048, 16_384, 50)] {
        let (x, w) = (noise(ROWS * d, 1), noise(f * d, 2));
        for isa in Isa::available().skip(1) {
            for certificate in [Certificate::Deterministic, Certificate::Dithered] {
                let dictionary = dictionary(isa, &w, d, certificate);
                let mut space = Space::default();
                group.bench_function(format!("{}/{certificate:?}/{d}x{f}", isa.path().name()), |b| {
                    b.iter(|| {
                        dictionary.select(black_box(&x), Wanted::Best { k, positive: true }, &mut space);
                    });
                });
            }
        }
    }
}

fn decode(c: &mut Criterion) {
    let (n, k, d, f) = (1024, 32, 1024, 16_384);
    let w = noise(f * d, 3);
    let indices: Vec<u32> = (0..n * k).map(|i| (i * 7919 % f) as u32).collect();
    let indptr: Vec<i64> = (0..=n as i64).map(|i| i * k as i64).collect();
    let values = vec![0.5; n * k];
    let codes = CsrCodes { indptr: &indptr, indices: &indices, values: &values };
    let rows = Rows::new(Data::F32(&w), d).expect("whole rows");
    let mut out = vec![0.0; n * d];
    c.bench_function("decode/1024x32x1024", |b| b.iter(|| decode_rows(&codes, 0, rows, None, &mut out)));
}

criterion_group!(benches, encode, decode);
criterion_main!(benches);
