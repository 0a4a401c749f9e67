//! A small store for the tests: a hook of activations, a row table, sparse codes, in memory or on disk.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part, and fails by panic")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use microtome_core::scan::Context;
use microtome_core::store::faulty::Faulty;
use microtome_core::store::fs::Fs;
use microtome_core::store::{Backend, Column, Manifest, Nonfinite, Scalar, Store, Table, Verify, Writer};
use microtome_core::{Error, Result};

pub const HOOK: &str = "blocks.0.hook_resid_post";
pub const CODES: &str = "codes of it";

/// `width` f32 per row for [`HOOK`], two slots per row for [`CODES`], a row table.
pub fn manifest(width: u64) -> Manifest {
    let x = vec![Column::matrix("x", Scalar::F32, width)];
    let slots = vec![Column::matrix("indices", Scalar::U32, 2), Column::matrix("values", Scalar::F32, 2)];
    let hooks = vec![Table::hook(HOOK, "tokens", x), Table::hook(CODES, "tokens", slots)];
    let rows = vec![Column::vector("sample", Scalar::U64), Column::vector("kind", Scalar::U8)];
    Manifest::new(serde_json::json!({"model": "none"}), hooks, vec![Table::rows_of("tokens", rows)])
}

/// The activations of row `row`: all different, all finite.
pub fn x_of(row: usize, width: usize) -> Vec<f32> {
    (0..width).map(|i| (row * width + i) as f32 * 0.5 - 3.0).collect()
}

/// Writes a store whose steps have the given numbers of rows.
pub fn write(fs: Arc<dyn Fs>, root: &Path, width: usize, steps: &[usize]) {
    let mut writer = Writer::open(fs, root, manifest(width as u64), Nonfinite::Error).unwrap();
    let mut row = 0;
    for (step, &n) in steps.iter().enumerate() {
        let x: Vec<f32> = (row..row + n).flat_map(|r| x_of(r, width)).collect();
        let indices: Vec<u32> = (row..row + n).flat_map(|r| [r as u32, 1]).collect();
        let values: Vec<f32> = (row..row + n).flat_map(|r| [r as f32 + 1.0, 0.5]).collect();
        let sample: Vec<u64> = (row..row + n).map(|r| r as u64 / 3).collect();
        let kind: Vec<u8> = (row..row + n).map(|r| (r % 3) as u8).collect();
        let arrays = [
            (HOOK, vec![bytemuck::cast_slice(&x)]),
            (CODES, vec![bytemuck::cast_slice(&indices), bytemuck::cast_slice(&values)]),
        ];
        writer.append("tokens", n, &[bytemuck::cast_slice(&sample), &kind], &arrays).unwrap();
        writer.commit(format!("samples of step {step}").as_bytes()).unwrap();
        row += n;
    }
}

/// A store in memory at `/store`.
pub fn in_memory(width: usize, steps: &[usize]) -> Faulty {
    let disk = Faulty::default();
    write(Arc::new(disk.clone()), Path::new("/store"), width, steps);
    disk
}

/// Opens the store at `/store`.
pub fn open(disk: &Faulty) -> Result<Arc<Store>> {
    Store::open_on(Arc::new(disk.clone()), Path::new("/store"), Verify::First, Backend::Pread).map(Arc::new)
}

/// Opens the store and reads every column of every table.
pub fn read_all(disk: &Faulty) -> Result<Vec<Vec<u8>>> {
    let store = open(disk)?;
    let mut all = Vec::new();
    for hook in &store.manifest().hooks {
        for column in &hook.columns {
            all.push(bytes_of(&store.hook(&hook.name, &column.name)?)?);
        }
    }
    for space in &store.manifest().spaces {
        for column in &space.columns {
            all.push(bytes_of(&store.row_column(&space.name, &column.name)?)?);
        }
    }
    for step in 0..store.manifest().steps.len() {
        all.push(store.samples(step)?);
    }
    Ok(all)
}

/// Runs `work` for somebody who asks for its end by `cancel`.
pub fn within<T>(cancel: bool, work: impl FnOnce(&Context<'_>) -> T) -> T {
    let (cancel, done) = (AtomicBool::new(cancel), AtomicU64::new(0));
    work(&Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 })
}

/// The problems of a file of a step.
pub fn problems(store: &Store, step: usize, file: usize) -> Vec<String> {
    within(false, |context| store.problems(step, file, context)).unwrap()
}

pub fn bytes_of(rows: &microtome_core::store::Selection) -> Result<Vec<u8>> {
    let mut out = vec![0; rows.len() * rows.row_bytes()];
    rows.gather(0..rows.len(), &mut out)?;
    Ok(out)
}

/// The manifest's text with its checksum made right again.
pub fn resealed(text: &str) -> Vec<u8> {
    let key = "\"crc32c\": \"";
    let end = text.rfind(key).unwrap() + key.len();
    let crc = crc32c::crc32c(&text.as_bytes()[..end]);
    format!("{}{crc:08x}\"\n}}\n", &text[..end]).into_bytes()
}

/// Whether an error is one that a reader of a damaged store may show.
pub fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Corrupt { .. }
            | Error::Manifest { .. }
            | Error::Version { .. }
            | Error::Unsafe { .. }
            | Error::Store { .. }
    )
}

/// `SplitMix64`: seeded numbers for the faults.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}
