//! Linear CKA of twelve layers, in both forms.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64};

use criterion::{Criterion, criterion_group, criterion_main};
use microtome_core::metrics::cka::{Estimator, Form, Layer, cka_matrix};
use microtome_core::scan::Context;
use microtome_core::{Data, Rows};

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let hash =
        |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (0..len as u64).map(|i| (hash(i + (seed << 40)) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn cka(criterion: &mut Criterion) {
    for (form, n, d) in [(Form::Gram, 1024, 768), (Form::Feature, 8192, 256)] {
        let data: Vec<Vec<f32>> = (0..12).map(|l| numbers(n * d, l)).collect();
        let rows: Vec<Rows<'_>> = data.iter().filter_map(|x| Rows::new(Data::F32(x), d).ok()).collect();
        let layers: Vec<Layer<'_>> = rows.iter().map(|r| Layer { name: String::new(), source: r }).collect();
        let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 };
        criterion.bench_function(&format!("cka_matrix {form:?} 12 x {n} x {d}"), |bencher| {
            bencher.iter(|| black_box(cka_matrix(&layers, None, Estimator::Debiased, Some(form), &context)));
        });
    }
}

criterion_group!(benches, cka);
criterion_main!(benches);
