//! What a writer removes when it opens: what a writer can have left there, and nothing else.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod sample_store;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use microtome_core::store::faulty::Faulty;
use microtome_core::store::fs::Fs;
use microtome_core::store::{Nonfinite, Writer};
use microtome_core::{Error, Result};
use sample_store::{in_memory, manifest};

const WIDTH: u64 = 5;
const ROOT: &str = "/store";

fn put(disk: &Faulty, path: &str, bytes: &[u8]) {
    let path = Path::new(path);
    for folder in path.parent().unwrap().ancestors().collect::<Vec<_>>().into_iter().rev() {
        // Most of them are there.
        let _ = disk.create_dir(folder);
    }
    assert_eq!(disk.create(path).unwrap().write_at(bytes, 0).unwrap(), bytes.len());
}

fn reopen(disk: &Faulty) -> Result<Writer> {
    Writer::open(Arc::new(disk.clone()), Path::new(ROOT), manifest(WIDTH), Nonfinite::Error)
}

/// Holds that a writer refuses the folder, with these words, and changes no file of it.
#[track_caller]
fn refused_untouched(disk: &Faulty, words: &[&str]) {
    let before = without_lock(disk);
    let error = reopen(disk).unwrap_err();
    assert!(matches!(error, Error::Store { .. }), "{error:?}");
    let text = error.to_string();
    assert!(words.iter().all(|w| text.contains(w)) && !text.contains('\n'), "{text}");
    assert_eq!(without_lock(disk), before);
}

fn without_lock(disk: &Faulty) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    disk.files().into_iter().filter(|(path, _)| !path.ends_with("LOCK")).collect()
}

#[test]
fn dated_folders_are_no_empty_folder() {
    let names =
        ["20260131", "202601", "000000", "000000.tmp-12", "20260131.tmp-1", "manifest.json.tmp-", "x.tmp-1"];
    for name in names {
        let disk = Faulty::default();
        disk.create_dir(Path::new(ROOT)).unwrap();
        put(&disk, &format!("{ROOT}/{name}/thesis.tex"), b"years of work");
        refused_untouched(&disk, &["expected an empty folder", name]);
        assert!(!disk.list(Path::new(ROOT)).unwrap().contains(&"LOCK".to_owned()), "{name}");
    }
}

#[test]
fn committed_steps_survive_the_loss_of_their_manifest() {
    let disk = in_memory(WIDTH as usize, &[3, 4]);
    disk.remove(&Path::new(ROOT).join("manifest.json")).unwrap();
    refused_untouched(&disk, &["not a store", "000000"]);
}

#[test]
fn steps_behind_an_older_manifest_are_kept_and_refused() {
    let disk = in_memory(WIDTH as usize, &[3, 4, 5]);
    let older = in_memory(WIDTH as usize, &[3]).files()[&Path::new(ROOT).join("manifest.json")].clone();
    disk.damage(&Path::new(ROOT).join("manifest.json"), older).unwrap();
    refused_untouched(&disk, &["000002", "000001", "manifest"]);
}

#[test]
fn dated_folders_beside_steps_are_kept_and_refused() {
    let disk = in_memory(WIDTH as usize, &[3]);
    put(&disk, "/store/20260131/notes.txt", b"years of work");
    refused_untouched(&disk, &["20260131", "move it away"]);
}

#[test]
fn what_a_stopped_writer_leaves_is_removed_and_the_rest_is_kept() {
    let disk = in_memory(WIDTH as usize, &[3]);
    let sound = without_lock(&disk);
    for name in ["000001", "000001.tmp-4711"] {
        put(&disk, &format!("{ROOT}/{name}/rows.safetensors"), b"half a st");
    }
    put(&disk, "/store/manifest.json.tmp-4711", b"{");
    for kept in ["000000.tmp-1", "000005.tmp-1", "000001.tmp-", "000001.tmp-x", "0001", "00000002", "codes"] {
        put(&disk, &format!("{ROOT}/{kept}/notes.txt"), b"years of work");
    }
    reopen(&disk).unwrap();
    let left = without_lock(&disk);
    assert!(sound.iter().all(|(path, bytes)| left.get(path) == Some(bytes)));
    assert_eq!(left.len(), sound.len() + 7, "{:?}", left.keys());
}

#[test]
fn a_writer_that_died_before_its_first_manifest_is_resumed() {
    let disk = Faulty::default();
    disk.create_dir(Path::new(ROOT)).unwrap();
    put(&disk, "/store/LOCK", b"4711");
    put(&disk, "/store/manifest.json.tmp-4711", b"{");
    put(&disk, "/store/codes/topk/notes.txt", b"kept");
    drop(reopen(&disk).unwrap());
    let names = disk.list(Path::new(ROOT)).unwrap();
    assert_eq!(names, ["LOCK", "codes", "manifest.json"]);
}
