//! NaN and infinity in the bytes of activations.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::store::format::Column;

/// Refuses bytes of `column` that hold NaN or infinity, with their number and the place of the first.
///
/// # Errors
/// [`Error::NonFinite`].
pub fn refuse_nonfinite(hook: &str, column: &Column, bytes: &[u8]) -> Result<()> {
    // An exponent of all ones is NaN or infinity; the other bits do not matter.
    let found = match column.dtype.dtype() {
        Some(Dtype::F32) => offenders(bytes, |w| u32::from_le_bytes(w) & 0x7f80_0000 == 0x7f80_0000),
        Some(Dtype::F16) => offenders(bytes, |w| u16::from_le_bytes(w) & 0x7c00 == 0x7c00),
        Some(Dtype::Bf16) => offenders(bytes, |w| u16::from_le_bytes(w) & 0x7f80 == 0x7f80),
        None => None,
    };
    let Some((first, count)) = found else { return Ok(()) };
    let (row, column) =
        (first / column.width.unwrap_or(1) as usize, first % column.width.unwrap_or(1) as usize);
    let found = format!("{count} NaN or infinite, the first at row {row}, column {column}");
    Err(Error::NonFinite { argument: hook.to_owned(), found })
}

/// Index of the first word that `is` meets, and how many do.
fn offenders<const N: usize>(bytes: &[u8], is: impl Fn([u8; N]) -> bool) -> Option<(usize, usize)> {
    let (words, _) = bytes.as_chunks::<N>();
    match words.iter().filter(|w| is(**w)).count() {
        0 => None,
        count => words.iter().position(|w| is(*w)).map(|first| (first, count)),
    }
}
