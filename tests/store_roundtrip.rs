//! What is written is read: any rows, steps and selections; by this crate and by the safetensors crate.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod sample_store;

use std::path::Path;
use std::sync::Arc;

use microtome_core::scan::{Buffer, Source};
use microtome_core::store::format::{BLOCK, Column, HEADER, Scalar, Shard, file_name, parse_header};
use microtome_core::store::fs::{Fs, Os};
use microtome_core::store::{Backend, Manifest, Nonfinite, RowIndex, Store, Table, Verify, Writer};
use microtome_core::{Data, Error};
use proptest::prelude::*;
use sample_store::{
    CODES, HOOK, bytes_of, in_memory, manifest, open, problems, read_all, within, write, x_of,
};

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

fn columns() -> impl Strategy<Value = Vec<Column>> {
    let scalar = prop_oneof![
        Just(Scalar::U64),
        Just(Scalar::F32),
        Just(Scalar::U32),
        Just(Scalar::Bf16),
        Just(Scalar::F16),
        Just(Scalar::U8)
    ];
    prop::collection::vec((scalar, prop::option::of(1_u64..600)), 1..5).prop_map(|list| {
        let mut list: Vec<_> = list.into_iter().enumerate().collect();
        // Wide elements first, as the format wants it.
        list.sort_by_key(|(_, (scalar, _))| std::cmp::Reverse(scalar.size()));
        list.iter()
            .map(|(i, (s, w))| {
                let name = format!("c{i}");
                w.map_or_else(|| Column::vector(&name, *s), |w| Column::matrix(&name, *s, w))
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn header_is_read_as_written_and_has_no_hole(columns in columns(), n in 0_u64..100_000) {
        let layout = Shard::new(&columns, n).unwrap();
        let page = layout.header().unwrap();
        prop_assert_eq!(page.len(), HEADER);
        let found = parse_header(&page, layout.file_len, Path::new("x")).unwrap();
        layout.check(&found, Path::new("x")).unwrap();
        prop_assert_eq!(&found, &layout.tensors);
        for tensor in &found {
            prop_assert!(tensor.begin % tensor.dtype.size() as u64 == 0, "{tensor:?} is not aligned");
        }
        let other = Shard::new(&columns, n + 1).unwrap();
        prop_assert!(other.check(&found, Path::new("x")).is_err());
        prop_assert!(parse_header(&page, layout.file_len + 1, Path::new("x")).is_err());
    }

    #[test]
    fn file_names_are_plain_and_injective(a in ".{1,40}", b in ".{1,40}") {
        prop_assert!(file_name(&a).bytes().all(|c| c.is_ascii_alphanumeric() || b"._-%".contains(&c)));
        prop_assert_eq!(a == b, file_name(&a) == file_name(&b));
    }

    #[test]
    fn row_index_is_the_list_of_its_rows(
        rows in prop::collection::vec(0_u64..40, 0..60),
        a in 0_usize..60,
        b in 0_usize..60,
        places in prop::collection::vec(0_usize..60, 0..20),
    ) {
        let index = RowIndex::from_rows(&rows);
        prop_assert_eq!(index.len(), rows.len());
        prop_assert_eq!(index.rows().collect::<Vec<_>>(), rows.clone());
        let (start, end) = (a.min(b).min(rows.len()), a.max(b).min(rows.len()));
        let part: Vec<u64> = index.runs(start..end).flatten().collect();
        prop_assert_eq!(&part, &rows[start..end]);
        prop_assert_eq!(index.slice(start..end).rows().collect::<Vec<_>>(), part);
        let inside: Vec<u64> = places.iter().filter(|p| **p < rows.len()).map(|p| *p as u64).collect();
        let taken = index.take(&inside).unwrap();
        prop_assert_eq!(taken.rows().collect::<Vec<_>>(), inside.iter().map(|p| rows[*p as usize]).collect::<Vec<_>>());
        prop_assert!(index.take(&[rows.len() as u64]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_selection_of_any_steps_reads_its_rows(
        steps in prop::collection::vec(1_usize..30, 1..5),
        picks in prop::collection::vec(0_usize..10_000, 0..40),
        cut in (0_usize..10_000, 0_usize..10_000),
    ) {
        let disk = in_memory(3, &steps);
        let n: usize = steps.iter().sum();
        let all = open(&disk).unwrap().hook(HOOK, "x").unwrap();
        let expected = |rows: &[u64]| rows.iter().flat_map(|r| x_of(*r as usize, 3)).collect::<Vec<_>>();
        let rows: Vec<u64> = picks.iter().map(|p| (p % n) as u64).collect();
        prop_assert_eq!(floats(&bytes_of(&all.take(&rows).unwrap()).unwrap()), expected(&rows));
        let (start, end) = ((cut.0 % (n + 1)).min(cut.1 % (n + 1)), (cut.0 % (n + 1)).max(cut.1 % (n + 1)));
        let range: Vec<u64> = (start as u64..end as u64).collect();
        prop_assert_eq!(floats(&bytes_of(&all.slice(start..end)).unwrap()), expected(&range));
    }
}

#[test]
fn append_may_split_rows_anywhere_and_gives_the_same_bytes() {
    let rows = 700;
    let parts: [&[usize]; 4] = [&[700], &[1, 699], &[350, 0, 350], &[13; 53]];
    let mut images = Vec::new();
    for part in parts {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("s");
        let mut writer = Writer::open(Arc::new(Os), &root, manifest(1000), Nonfinite::Error).unwrap();
        let (mut row, mut left) = (0, rows);
        for n in part.iter().map(|n| *n.min(&rows)) {
            let n = n.min(left);
            let x: Vec<f32> = (row..row + n).flat_map(|r| x_of(r, 1000)).collect();
            let (indices, values) = (vec![7_u32; 2 * n], vec![0.5_f32; 2 * n]);
            let arrays = [
                (HOOK, vec![bytemuck::cast_slice(&x)]),
                (CODES, vec![bytemuck::cast_slice(&indices), bytemuck::cast_slice(&values)]),
            ];
            let sample = vec![0_u64; n];
            writer.append("tokens", n, &[bytemuck::cast_slice(&sample), &vec![1; n]], &arrays).unwrap();
            (row, left) = (row + n, left - n);
        }
        if left > 0 {
            continue;
        }
        writer.commit(b"s").unwrap();
        drop(writer);
        let store = Arc::new(Store::open(&root, Verify::First, Backend::Mmap).unwrap());
        assert!(store.shard(0, 0).unwrap().blocks() > 2, "more than one block of {BLOCK} bytes");
        images.push((store.manifest().crc32c, bytes_of(&store.hook(HOOK, "x").unwrap()).unwrap()));
    }
    assert!(images.len() >= 3);
    assert!(images.iter().all(|i| *i == images[0]));
}

#[test]
#[allow(clippy::disallowed_methods, reason = "another reader of the file")]
fn safetensors_crate_reads_a_shard() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s");
    write(Arc::new(Os), &root, 7, &[5, 3]);
    let bytes = std::fs::read(root.join("000001").join(file_name(HOOK))).unwrap();
    let shard = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let x = shard.tensor("x").unwrap();
    assert_eq!((x.dtype(), x.shape()), (safetensors::Dtype::F32, &[3, 7][..]));
    let expected: Vec<f32> = (5..8).flat_map(|r| x_of(r, 7)).collect();
    assert_eq!(floats(x.data()), expected);
    let checks = shard.tensor("block_crc32c").unwrap();
    assert_eq!(checks.data(), crc32c::crc32c(x.data()).to_le_bytes());
    assert_eq!(bytes.len() % 4, 0);
    let codes = std::fs::read(root.join("000000").join(file_name(CODES))).unwrap();
    assert_eq!(
        safetensors::SafeTensors::deserialize(&codes).unwrap().tensor("values").unwrap().shape(),
        [5, 2]
    );
}

#[test]
fn scan_borrows_rows_that_lie_side_by_side_and_copies_others() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s");
    write(Arc::new(Os), &root, 3, &[5, 4]);
    for backend in [Backend::Mmap, Backend::Pread, Backend::Direct] {
        let store = Arc::new(Store::open(&root, Verify::First, backend).unwrap());
        let all = store.hook(HOOK, "x").unwrap();
        let source = all.activations().unwrap();
        assert_eq!((source.n_rows(), source.d()), (9, 3));
        for (range, one_shard) in [(0..5, true), (5..9, true), (1..3, true), (3..7, false)] {
            let mut buffer = Buffer::default();
            let expected: Vec<f32> = range.clone().flat_map(|r| x_of(r, 3)).collect();
            let rows = source.read(range.clone(), &mut buffer).unwrap();
            let Data::F32(found) = rows.data() else { panic!("another type") };
            assert_eq!(found, expected);
            let first = found.as_ptr().addr();
            let own = buffer.bytes(0).as_ptr().addr();
            assert_eq!(first != own, one_shard && backend == Backend::Mmap, "{range:?} {backend:?}");
        }
        assert!(matches!(store.hook(CODES, "indices").unwrap().activations(), Err(Error::Dtype { .. })));
        assert!(matches!(store.hook(HOOK, "y"), Err(Error::Store { .. })));
    }
}

#[test]
fn a_file_system_without_direct_reads_is_read_through_the_cache() {
    let disk = in_memory(3, &[5, 4]);
    let store = Arc::new(
        Store::open_on(Arc::new(disk.clone()), Path::new("/store"), Verify::First, Backend::Direct).unwrap(),
    );
    assert_eq!(store.backend(), Backend::Pread);
    let rows = store.hook(HOOK, "x").unwrap();
    let expected: Vec<f32> = (0..9).flat_map(|r| x_of(r, 3)).collect();
    assert_eq!(floats(&bytes_of(&rows).unwrap()), expected);
}

#[test]
fn spaces_have_rows_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s");
    let hooks = [("a", "tokens"), ("b", "vision")];
    let tables = hooks.map(|(h, s)| Table::hook(h, s, vec![Column::matrix("x", Scalar::U32, 1)]));
    let spaces = ["tokens", "vision"].map(|s| Table::rows_of(s, vec![Column::vector("sample", Scalar::U64)]));
    let wanted = Manifest::new(serde_json::json!({}), tables.into(), spaces.into());
    let mut writer = Writer::open(Arc::new(Os), &root, wanted, Nonfinite::Keep).unwrap();
    writer.append("vision", 2, &[&[0; 16]], &[("b", vec![&[1; 8]])]).unwrap();
    assert_eq!((writer.pending("vision"), writer.pending("tokens")), (2, 0));
    writer.commit(b"").unwrap();
    writer.append("tokens", 1, &[&[0; 8]], &[("a", vec![&[2; 4]])]).unwrap();
    writer.commit(b"").unwrap();
    assert_eq!((writer.manifest().n_rows("tokens"), writer.manifest().n_rows("vision")), (1, 2));
    drop(writer);
    let store = Arc::new(Store::open(&root, Verify::First, Backend::Mmap).unwrap());
    assert_eq!(bytes_of(&store.hook("b", "x").unwrap()).unwrap(), [1; 8]);
    assert_eq!(bytes_of(&store.hook("a", "x").unwrap()).unwrap(), [2; 4]);
    assert!(root.join("000000/rows.vision.safetensors").exists());
}

#[test]
#[allow(clippy::disallowed_methods, reason = "the test copies the committed store")]
fn golden_store_of_format_1_opens_bit_for_bit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/store");
    let store = Arc::new(Store::open(&root, Verify::Always, Backend::Mmap).unwrap());
    assert_eq!(store.manifest().crc32c, 0x18bb_e280, "fingerprint");
    let x: Vec<f32> = bytes_of(&store.hook(HOOK, "x").unwrap())
        .unwrap()
        .chunks_exact(2)
        .map(|c| f32::from_bits(u32::from(u16::from_le_bytes([c[0], c[1]])) << 16))
        .collect();
    let expected: Vec<f32> = (0..10 * 4).map(|i| i as f32 / 2.0 - 8.0).collect();
    assert_eq!(x, expected);
    assert!((0..2).all(|step| (0..=store.tables()).all(|file| problems(&store, step, file).is_empty())));
    let codes = Arc::new(Store::open(&root.join("codes/topk"), Verify::Always, Backend::Mmap).unwrap());
    assert_eq!(floats(&bytes_of(&codes.hook(HOOK, "values").unwrap()).unwrap())[..4], [2.0, 1.0, 2.0, 1.0]);
}

#[test]
fn golden_ragged_codes_of_format_1_open_bit_for_bit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/ragged");
    let store = Arc::new(Store::open(&root, Verify::Always, Backend::Mmap).unwrap());
    assert_eq!(store.manifest().crc32c, 0xc1cb_afec, "fingerprint");
    let words = |rows| {
        let bytes = bytes_of(&rows).unwrap();
        bytes.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(words(store.row_column("tokens", "fires").unwrap()), [2, 0, 3, 0, 0, 0, 1]);
    assert_eq!(words(store.row_column("entries", "indices").unwrap()), [3, 1, 0, 1, 2, 7]);
    let values = bytes_of(&store.hook(HOOK, "values").unwrap()).unwrap();
    assert_eq!(floats(&values), [2.0, 0.5, 4.0, 3.0, 1.0, 0.25]);
    assert!((0..2).all(|step| (0..=store.tables()).all(|file| problems(&store, step, file).is_empty())));
}

#[test]
fn checking_a_store_stops_between_blocks_and_keeps_no_shard_open() {
    let disk = in_memory(1024, &[2048]);
    let store = open(&disk).unwrap();
    assert!(matches!(within(true, |context| store.problems(0, 0, context)), Err(Error::Cancelled)));
    let hook = store.hook(HOOK, "x").unwrap();
    assert!(matches!(within(true, |context| hook.damaged_rows(0, context)), Err(Error::Cancelled)));
    assert!(problems(&store, 0, 0).is_empty());
    // An open shard would be read as it was.
    disk.remove(&Path::new("/store/000000").join(file_name(HOOK))).unwrap();
    assert_eq!(problems(&store, 0, 0).len(), 1);
    assert_eq!(
        within(false, |context| hook.damaged_rows(0, context)).unwrap(),
        std::slice::from_ref(&(0..2048))
    );
}

#[test]
fn every_column_of_a_sound_store_is_read() {
    assert_eq!(read_all(&in_memory(5, &[7, 4])).unwrap().len(), 7);
}
