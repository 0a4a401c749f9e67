//! P2 and P5: a hostile file costs no memory and no time, however large it is or claims to be.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod sample_store;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use microtome_core::store::format::{HEADER, file_name};
use microtome_core::store::fs::Os;
use microtome_core::store::{Backend, Store, Verify};
use sample_store::{HOOK, is_refusal, resealed, write};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(now, Ordering::SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens the first shard of a store that must be refused; peak of allocated bytes, and time.
fn cost(root: &Path) -> (usize, Duration) {
    let (before, begin) = (NOW.load(Ordering::SeqCst), Instant::now());
    PEAK.store(before, Ordering::SeqCst);
    let outcome = Store::open(root, Verify::First, Backend::Mmap).and_then(|s| s.shard(0, 0).map(|_| ()));
    let peak = PEAK.load(Ordering::SeqCst) - before;
    let error = outcome.expect_err("the file must be refused");
    assert!(is_refusal(&error), "{error}");
    (peak, begin.elapsed())
}

// One test, for the counter is shared by all threads.
#[test]
#[allow(clippy::disallowed_methods, reason = "the test makes what the store must refuse")]
fn hostile_files_cost_less_than_a_mebibyte() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("s");
    write(Arc::new(Os), &root, 5, &[40]);
    let (shard, manifest) = (root.join("000000").join(file_name(HOOK)), root.join("manifest.json"));
    let (whole, text) = (std::fs::read(&shard).unwrap(), std::fs::read_to_string(&manifest).unwrap());
    let replace = |path: &Path, bytes: &[u8], len: u64| {
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, bytes).unwrap();
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
    };
    let claims = |rows: u64| {
        let begin = text.find("\"bytes\":").unwrap() + 8;
        let end = begin + text[begin..].find(',').unwrap();
        let bytes = rows * 20 + (rows * 20).div_ceil(1 << 20) * 4 + HEADER as u64;
        let claimed = format!("{}{bytes}{}", &text[..begin], &text[end..]);
        resealed(&claimed.replace("\"tokens\":40", &format!("\"tokens\":{rows}")))
    };
    let mut cases: Vec<(&str, usize, Duration)> = Vec::new();
    for (case, len) in
        [("2 GB of zeros behind a header", 2 << 30), ("200 MB of zeros behind a header", 200 << 20)]
    {
        replace(&shard, &whole, len);
        let (peak, time) = cost(&root);
        cases.push((case, peak, time));
    }
    for length in [200_u64 << 20, u64::MAX, 1 << 63] {
        let mut page = vec![b' '; HEADER];
        page[..8].copy_from_slice(&length.to_le_bytes());
        page[8] = b'{';
        replace(&shard, &page, whole.len() as u64);
        let (peak, time) = cost(&root);
        cases.push(("a header that claims a huge length", peak, time));
    }
    replace(&shard, &whole, whole.len() as u64);
    for rows in [1_000_000, 1_000_000_000_000_000, u64::MAX / 64] {
        let bytes = claims(rows);
        replace(&manifest, &bytes, bytes.len() as u64);
        let (peak, time) = cost(&root);
        cases.push(("a manifest that claims many rows", peak, time));
    }
    replace(&manifest, b" ", 200 << 20);
    let (peak, time) = cost(&root);
    cases.push(("a manifest of 200 MB of nothing", peak, time));
    for (case, peak, time) in cases {
        assert!(peak < 1 << 20, "{case}: {peak} bytes");
        assert!(time < Duration::from_millis(100), "{case}: {time:?}");
    }
}
