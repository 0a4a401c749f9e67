//! P11 at named points: a process dies there, the next one resumes. Needs the feature `failpoints`.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]
#![cfg(feature = "failpoints")]

mod sample_store;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use microtome_core::store::fs::Os;
use microtome_core::store::{Backend, Nonfinite, Store, Verify, Writer};
use sample_store::{CODES, HOOK, manifest, problems, x_of};

const POINTS: [&str; 8] = [
    "appended",
    "header-written",
    "sealed",
    "synced",
    "renamed",
    "step-in-place",
    "manifest-written",
    "committed",
];
const STEPS: usize = 4;

/// What the child does: appends the steps that are missing.
fn write_missing(root: &Path) {
    let mut writer = Writer::open(Arc::new(Os), root, manifest(3), Nonfinite::Error).unwrap();
    for step in writer.manifest().steps.len()..STEPS {
        for row in [step * 2, step * 2 + 1] {
            let (x, indices, values) = (x_of(row, 3), [row as u32, 1], [1.0_f32, 0.5]);
            let arrays = [
                (HOOK, vec![bytemuck::cast_slice(&x)]),
                (CODES, vec![bytemuck::cast_slice(&indices), bytemuck::cast_slice(&values)]),
            ];
            writer.append("tokens", 1, &[&(row as u64).to_le_bytes(), &[0]], &arrays).unwrap();
        }
        writer.commit(b"samples").unwrap();
    }
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    if let Ok(root) = std::env::var("MICROTOME_TEST_STORE") {
        write_missing(Path::new(&root));
    }
}

/// Runs [`child`] at `root`, dying at the given point; whether it lived.
fn run_child(root: &Path, fail_at: Option<String>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "child", "--quiet"]).env("MICROTOME_TEST_STORE", root);
    if let Some(point) = fail_at {
        command.env("MICROTOME_FAIL_AT", point);
    }
    command.output().unwrap().status.success()
}

#[test]
fn process_that_dies_at_a_named_point_loses_and_duplicates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert!(run_child(&whole, None));
    let fingerprint = Store::open(&whole, Verify::First, Backend::Mmap).unwrap().manifest().crc32c;
    for point in POINTS {
        for count in [1, 3] {
            let root = dir.path().join(format!("{point}-{count}"));
            assert!(!run_child(&root, Some(format!("{point}:{count}"))), "{point}:{count} was not reached");
            if let Ok(store) = Store::open(&root, Verify::First, Backend::Mmap) {
                let files = store.tables() + 1;
                let steps = store.manifest().steps.len();
                assert!(
                    (0..steps).all(|s| (0..files).all(|f| problems(&store, s, f).is_empty())),
                    "{point}:{count}"
                );
            }
            assert!(run_child(&root, None), "{point}:{count} cannot be resumed");
            let store = Store::open(&root, Verify::First, Backend::Mmap).unwrap();
            assert_eq!(store.manifest().crc32c, fingerprint, "{point}:{count}");
            assert!((0..STEPS).all(|s| (0..=store.tables()).all(|f| problems(&store, s, f).is_empty())));
        }
    }
}
