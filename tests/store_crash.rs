//! Power cuts, failing calls and kills: P11 to P13 of the store's promises, on a file system in memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod sample_store;

use std::path::Path;
use std::sync::Arc;

use microtome_core::store::faulty::{Fault, Faulty};
use microtome_core::store::fs::Fs;
use microtome_core::store::{Backend, Column, Manifest, Nonfinite, Scalar, Store, Table, Verify, Writer};
use microtome_core::{Error, Result};
use sample_store::problems;

const ROOT: &str = "/runs/store";
const HOOKS: [&str; 2] = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"];
const STEPS: u32 = 3;
/// Rows of each append; two appends make a step.
const ROWS: [u32; 2] = [3, 2];
const WIDTH: u32 = 3;

fn manifest() -> Manifest {
    let hooks = HOOKS.map(|h| Table::hook(h, "tokens", vec![Column::matrix("x", Scalar::F32, WIDTH.into())]));
    let rows = vec![Column::vector("sample", Scalar::U64), Column::vector("kind", Scalar::U8)];
    Manifest::new(serde_json::json!({"model": "none"}), hooks.into(), vec![Table::rows_of("tokens", rows)])
}

/// Appends and commits the steps that are missing; says how many are committed, also when it fails.
fn run(disk: &Faulty) -> (u32, Result<()>) {
    let mut committed = 0;
    let outcome = run_steps(disk, &mut committed);
    (committed, outcome)
}

fn run_steps(disk: &Faulty, committed: &mut u32) -> Result<()> {
    let mut writer = Writer::open(Arc::new(disk.clone()), Path::new(ROOT), manifest(), Nonfinite::Error)?;
    *committed = writer.manifest().steps.len() as u32;
    for step in *committed..STEPS {
        let mut row = step * ROWS.iter().sum::<u32>();
        for n in ROWS {
            let x: Vec<u8> =
                (row * WIDTH..(row + n) * WIDTH).flat_map(|v| (v as f32).to_le_bytes()).collect();
            let sample: Vec<u8> = (row..row + n).flat_map(|r| u64::from(r).to_le_bytes()).collect();
            let kind = vec![0_u8; n as usize];
            let arrays: Vec<_> = HOOKS.iter().map(|h| (*h, vec![x.as_slice()])).collect();
            writer.append("tokens", n as usize, &[&sample, &kind], &arrays)?;
            row += n;
        }
        writer.commit(format!("samples of step {step}").as_bytes())?;
        *committed = step + 1;
    }
    Ok(())
}

/// The finished store's files, from a run without a fault.
fn finished() -> (Faulty, std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>) {
    let disk = fresh();
    let (committed, outcome) = run(&disk);
    outcome.unwrap();
    assert_eq!(committed, STEPS);
    let files = disk.files();
    (disk, files)
}

fn fresh() -> Faulty {
    let disk = Faulty::default();
    disk.create_dir(Path::new("/runs")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

/// Whether what is on the disk opens, holds at least `reported` steps, each one sound, and can be completed to `expected`.
fn holds(
    disk: &Faulty,
    reported: u32,
    expected: &std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>,
) -> bool {
    let root = Path::new(ROOT);
    match Store::open_on(Arc::new(disk.clone()), root, Verify::Always, Backend::Pread) {
        Ok(store) => {
            let steps = store.manifest().steps.len();
            let files = store.tables() + 1;
            let sound = (0..steps).all(|s| (0..files).all(|f| problems(&store, s, f).is_empty()));
            if !sound || (steps as u32) < reported {
                return false;
            }
        }
        // Before the first commit is reported there may be no store.
        Err(Error::Store { .. }) if reported == 0 => {}
        Err(_) => return false,
    }
    let (committed, outcome) = run(disk);
    outcome.is_ok() && committed == STEPS && disk.files() == *expected
}

#[test]
fn power_cut_loses_nothing_committed() {
    let (whole, expected) = finished();
    let mut images = 0;
    for cut in 0..whole.calls() {
        let disk = fresh();
        disk.fail_at(cut, Fault::PowerCut);
        let (reported, outcome) = run(&disk);
        assert!(
            outcome.is_err() || cut < 2 || cut + 4 > whole.calls(),
            "the cut at call {cut} went unnoticed"
        );
        for pattern in 0..16 {
            let image = disk.after_power_cut(pattern);
            assert!(holds(&image, reported, &expected), "cut at call {cut}, pattern {pattern}");
            images += 1;
        }
    }
    assert!(images > 1_000, "{images}");
}

/// Whether some power cut shows that the sync at call number `ignored` does nothing.
fn ignored_sync_is_noticed(
    ignored: usize,
    calls: usize,
    expected: &std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>,
) -> bool {
    // The cut comes at once or later; both faults are set one after the other on the same run.
    (ignored + 1..=calls).any(|cut| {
        let disk = fresh();
        disk.fail_at(ignored, Fault::IgnoredSync);
        disk.fail_at(cut, Fault::PowerCut);
        let (reported, _) = run(&disk);
        (0..16).any(|pattern| !holds(&disk.after_power_cut(pattern), reported, expected))
    })
}

#[test]
fn every_sync_of_a_commit_is_needed() {
    let (whole, expected) = finished();
    let syncs = whole.syncs();
    // Of the first syncs two belong to the test's own folder and to the empty manifest, which holds no rows yet.
    let commits: Vec<_> = syncs.iter().copied().skip(4).collect();
    assert!(commits.len() >= 21, "{commits:?}");
    let idle: Vec<_> = commits
        .into_iter()
        .filter(|sync| !ignored_sync_is_noticed(*sync, whole.calls(), &expected))
        .collect();
    assert!(idle.is_empty(), "syncs that no power cut misses: {idle:?}");
}

#[test]
fn failing_call_is_a_clear_error_and_the_store_stays_readable() {
    let (whole, expected) = finished();
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
        for call in 2..whole.calls() {
            let disk = fresh();
            disk.fail_at(call, Fault::Errno(errno));
            let (reported, outcome) = run(&disk);
            match outcome {
                Err(Error::Io { source, .. }) => assert_eq!(source.raw_os_error(), Some(errno)),
                // Only the clean-up at the very end does not report: nothing depends on it.
                Ok(()) => assert!(call + 2 >= whole.calls(), "call {call} failed unnoticed"),
                Err(other) => panic!("call {call}: {other}"),
            }
            assert!(holds(&disk, reported, &expected), "errno {errno} at call {call}");
        }
    }
}

#[test]
fn interrupted_and_short_calls_are_repeated() {
    let (whole, expected) = finished();
    for fault in [Fault::Interrupted, Fault::ShortWrite] {
        for call in 2..whole.calls() {
            let disk = fresh();
            disk.fail_at(call, fault);
            let (committed, outcome) = run(&disk);
            outcome.unwrap();
            assert_eq!(committed, STEPS);
            assert_eq!(disk.files(), expected, "{fault:?} at call {call}");
        }
    }
}

#[test]
fn writer_refuses_to_go_on_after_a_failed_commit() {
    let disk = fresh();
    let root = Path::new(ROOT);
    let mut writer = Writer::open(Arc::new(disk.clone()), root, manifest(), Nonfinite::Error).unwrap();
    let (x, sample) = ([0_u8; 12], [0_u8; 8]);
    let arrays: Vec<_> = HOOKS.iter().map(|h| (*h, vec![x.as_slice()])).collect();
    writer.append("tokens", 1, &[&sample, &[0]], &arrays).unwrap();
    disk.fail_at(disk.calls() + 3, Fault::Errno(libc::ENOSPC));
    assert!(matches!(writer.commit(b""), Err(Error::Io { .. })));
    let again = writer.append("tokens", 1, &[&sample, &[0]], &arrays).unwrap_err().to_string();
    assert!(again.contains("has failed before"), "{again}");
    assert!(writer.commit(b"").is_err());
    drop(writer);
    let names = disk.list(root).unwrap();
    assert_eq!(names, ["LOCK", "manifest.json"], "nothing in flight is left");
}
