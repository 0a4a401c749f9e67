//! [`Rows`]: a borrowed, row-major matrix of activations. The one currency between the rooms.

use std::ops::Range;

use half::{bf16, f16};

use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};

/// Borrowed elements of one of the three types.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// Brain float.
    Bf16(&'a [bf16]),
}

/// Runs `$body` with `$slice` bound to the typed slice of a [`Data`] or of the data of [`Rows`].
#[macro_export]
macro_rules! with_elements {
    ($data:expr, $slice:ident => $body:expr) => {
        match $data {
            $crate::rows::Data::F32($slice) => $body,
            $crate::rows::Data::F16($slice) => $body,
            $crate::rows::Data::Bf16($slice) => $body,
        }
    };
}

impl Data<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        with_elements!(self, s => s.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tag of the element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }
}

/// A borrowed matrix of shape `(n, d)`, row-major and contiguous.
///
/// ```
/// use microtome_core::Rows;
/// let x = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let rows = Rows::new(microtome_core::Data::F32(&x), 3).unwrap();
/// assert_eq!((rows.n(), rows.d()), (2, 3));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: Data<'a>,
    n: usize,
    d: usize,
}

impl<'a> Rows<'a> {
    /// A view of `data` as rows of width `d`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `d` is zero or does not divide the number of elements.
    pub fn new(data: Data<'a>, d: usize) -> Result<Self> {
        if d == 0 || !data.len().is_multiple_of(d) {
            return Err(Error::shape(
                "rows",
                "a whole number of rows",
                format!("{} elements of width {d}", data.len()),
            ));
        }
        Ok(Self { data, n: data.len() / d, d })
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Width of a row.
    pub fn d(&self) -> usize {
        self.d
    }

    /// Tag of the element type.
    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }

    /// The elements, row by row.
    pub fn data(&self) -> Data<'a> {
        self.data
    }

    /// The rows of `range`, which lies within `0..n`.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let span = range.start * self.d..range.end * self.d;
        let data = match self.data {
            Data::F32(s) => Data::F32(&s[span]),
            Data::F16(s) => Data::F16(&s[span]),
            Data::Bf16(s) => Data::Bf16(&s[span]),
        };
        Self { data, n: range.len(), d: self.d }
    }

    /// The rows as `f32`: where they lie, or written into `buffer` where they are of another type.
    pub fn floats<'b>(&self, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Data::F32(values) = self.data {
            return values;
        }
        buffer.resize(self.data.len(), 0.0);
        self.widen(0..self.n, buffer);
        buffer
    }

    /// Writes the rows of `range` into `out` as `f32`; `out` holds `range.len() * d` elements.
    pub fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        with_elements!(self.slice(range).data, s => Element::widen_slice(s, out));
    }
}
