//! Sums of a tile against 64-bit arithmetic, for the tests of the micro-kernels.

use super::tile::{COLS, ROWS};

/// Words from a fixed sequence.
pub(super) fn sequence() -> impl FnMut() -> i16 {
    let mut state = 5_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 48) as i16
    }
}

/// `N` vectors, one after the other, as a strip or panel: side by side, a word of each per step.
pub(super) fn interleave<const N: usize>(words: &[u32]) -> Vec<u32> {
    let steps = words.len() / N;
    (0..words.len()).map(|i| words[i % N * steps + i / N]).collect()
}

/// Checks the sums of a tile, row by row; elements of rows and features lie one after the other.
pub(super) fn check<T: Copy + Into<i64>>(sums: &[i32], rows: &[T], features: &[T], d: usize) {
    assert_eq!(sums.len(), ROWS * COLS);
    for (i, &sum) in sums.iter().enumerate() {
        let (r, c) = (i / COLS, i % COLS);
        let (row, feature) = (&rows[r * d..(r + 1) * d], &features[c * d..(c + 1) * d]);
        let expected: i64 = row.iter().zip(feature).map(|(&a, &b)| a.into() * b.into()).sum();
        assert_eq!(i64::from(sum), expected, "d={d}: {r}, {c}");
    }
}
