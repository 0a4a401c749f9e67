//! Memory for large arrays: zeros on large pages, and zeros that begin on a cache line.
//!
//! A fresh array of 4 KiB pages costs a fault each, and streams through more pages than the processor keeps translations
//! of. Linux gives pages of 2 MiB to who asks, which is its default (`madvise`): without, the Gram form of CKA takes 1.25 times
//! as long at n 1024, d 768.

#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use bytemuck::Zeroable;

use crate::error::{Error, Result};

/// Bytes of a large page.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 2 << 20;
/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;

/// `len` zeros; on large pages where there are such, and the array has room for one.
pub fn zeros<T: Zeroable>(len: usize) -> Vec<T> {
    let zeros = bytemuck::zeroed_vec(len);
    ask_for_large_pages(&zeros);
    zeros
}

/// As [`zeros`], for results whose size the caller's data decide: the system may refuse them.
///
/// # Errors
/// [`Error::Refused`] with the bytes that `what` needs, and with `hint`.
pub fn try_zeros<T: Zeroable>(len: usize, what: &str, hint: &str) -> Result<Vec<T>> {
    let Ok(zeros) = bytemuck::try_zeroed_vec(len) else {
        let needed = len.saturating_mul(size_of::<T>());
        return Err(Error::Refused { what: what.to_owned(), needed, hint: hint.to_owned() });
    };
    ask_for_large_pages(&zeros);
    Ok(zeros)
}

/// Asks the kernel to back `array`, which nobody has written to yet, with large pages. Only a hint: contents stay.
#[cfg(target_os = "linux")]
fn ask_for_large_pages<T>(array: &[T]) {
    let bytes = array.as_ptr_range();
    let (start, end) = (bytes.start.addr().next_multiple_of(LARGE_PAGE), bytes.end.addr());
    let len = end.saturating_sub(start) / LARGE_PAGE * LARGE_PAGE;
    if len > 0 {
        let first = bytes.start.cast_mut().with_addr(start);
        // SAFETY: the whole pages lie within `array`, and this advice changes neither their contents nor their protection.
        unsafe { libc::madvise(first.cast(), len, libc::MADV_HUGEPAGE) };
    }
}

/// Elsewhere the system decides by itself.
#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T>(_: &[T]) {}

/// [`zeros`] that begin on a cache line: no vector of a panel or of a tile straddles two lines.
#[derive(Debug)]
pub struct Aligned<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Zeroable> Aligned<T> {
    /// `len` of them.
    pub fn zeros(len: usize) -> Self {
        Self::begin(zeros(len + LINE / size_of::<T>()), len)
    }

    /// As [`try_zeros`].
    ///
    /// # Errors
    /// As [`try_zeros`].
    pub fn try_zeros(len: usize, what: &str, hint: &str) -> Result<Self> {
        Ok(Self::begin(try_zeros(len.saturating_add(LINE / size_of::<T>()), what, hint)?, len))
    }

    fn begin(values: Vec<T>, len: usize) -> Self {
        // The offset of memory that cannot be aligned is out of range; then alignment is given up.
        let start = values.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { values, start, len }
    }
}

impl<T: Zeroable> Default for Aligned<T> {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_every_size_are_zeros_and_keep_what_is_written() {
        for len in [0, 1, 4095, (1 << 20) - 1, 3 << 20] {
            let mut array = zeros::<u32>(len);
            assert!(array.len() == len && array.iter().all(|x| *x == 0), "{len}");
            array.iter_mut().zip(1..).for_each(|(x, i)| *x = i);
            assert!(array.iter().zip(1..).all(|(x, i)| *x == i), "{len}");
        }
    }

    #[test]
    fn memory_that_no_system_has_is_refused() {
        for len in [1 << 58, usize::MAX] {
            let error = try_zeros::<f32>(len, "read", "Read less").unwrap_err().to_string();
            let needed = len.saturating_mul(4);
            assert_eq!(error, format!("read needs {needed} bytes, more than the system gives. Read less"));
        }
        assert_eq!(try_zeros::<u8>(3, "read", "").unwrap(), [0; 3]);
    }

    #[test]
    fn aligned_zeros_begin_on_a_line() {
        for len in [1, 7, 1 << 20] {
            let array = Aligned::<f32>::zeros(len);
            assert_eq!((array.len(), array.as_ptr().addr() % LINE), (len, 0));
        }
    }
}
