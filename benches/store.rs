//! Scan of a store with checksums against a plain read of the same bytes, and against the same scan unchecked.
//!
//! All three touch every byte in the page cache on one thread; the ratio between them is the figure.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use microtome_core::scan::{Buffer, Source, grid};
use microtome_core::store::format::{Column, Scalar, file_name};
use microtome_core::store::fs::{Fs, Os, read_full_at};
use microtome_core::store::{Backend, Manifest, Nonfinite, Store, Table, Verify, Writer};
use microtome_core::with_elements;

const HOOK: &str = "blocks.0.hook_resid_post";
const WIDTH: usize = 1024;
const ROWS: usize = 32_768;
const BLOCK_ROWS: usize = 4096;

fn write(root: &Path) {
    let hooks = vec![Table::hook(HOOK, "tokens", vec![Column::matrix("x", Scalar::Bf16, WIDTH as u64)])];
    let spaces = vec![Table::rows_of("tokens", vec![Column::vector("sample", Scalar::U64)])];
    let wanted = Manifest::new(serde_json::json!({}), hooks, spaces);
    let mut writer = Writer::open(Arc::new(Os), root, wanted, Nonfinite::Keep).expect("writer");
    let x: Vec<u8> = (0..ROWS * WIDTH * 2).map(|i| (i * 31 % 127) as u8).collect();
    writer.append("tokens", ROWS, &[&vec![0; ROWS * 8]], &[(HOOK, vec![&x])]).expect("append");
    writer.commit(b"").expect("commit");
}

/// Adds up the words of a block: what a plain reader of the bytes does at least.
fn touch(bytes: &[u8]) -> u64 {
    let words =
        bytes.chunks_exact(8).map(|w| u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]]));
    words.fold(0, u64::wrapping_add)
}

fn scan(store: &Arc<Store>) -> u64 {
    let rows = store.hook(HOOK, "x").expect("hook");
    let source = rows.activations().expect("activations");
    let mut buffer = Buffer::default();
    grid(source.n_rows(), BLOCK_ROWS)
        .map(|range| {
            let block = source.read(range, &mut buffer).expect("rows");
            with_elements!(block.data(), s => touch(bytemuck::cast_slice(s)))
        })
        .fold(0, u64::wrapping_add)
}

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("folder");
    let root = dir.path().join("store");
    write(&root);
    let mut group = c.benchmark_group("store");
    group.throughput(Throughput::Bytes((ROWS * WIDTH * 2) as u64));
    group.sample_size(20);
    group.bench_function("plain read(2)", |b| {
        let file = Os.open(&root, &["000000", &file_name(HOOK)]).expect("shard");
        let len = file.identity().expect("size").len;
        let mut buffer = vec![0; BLOCK_ROWS * WIDTH * 2];
        b.iter(|| {
            let starts = (0..len).step_by(buffer.len());
            starts.map(|at| read_full_at(&*file, &mut buffer, at).map_or(0, |n| touch(&buffer[..n]))).max()
        });
    });
    for (name, verify) in [("scan, checked", Verify::First), ("scan, unchecked", Verify::Never)] {
        for backend in [Backend::Mmap, Backend::Pread] {
            group.bench_function(format!("{name}, {backend:?}"), |b| {
                let open = || Arc::new(Store::open(&root, verify, backend).expect("store"));
                b.iter_batched(open, |store| black_box(scan(&store)), BatchSize::LargeInput);
            });
        }
    }
    group.bench_function("scan, checked before, Mmap", |b| {
        let store = Arc::new(Store::open(&root, Verify::First, Backend::Mmap).expect("store"));
        scan(&store);
        b.iter(|| black_box(scan(&store)));
    });
    group.finish();
}

criterion_group!(store, benches);
criterion_main!(store);
