//! The three element types of an activation, and how each widens to `f32`.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Element type of stored activations, named as safetensors and NumPy name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain float: the upper 16 bits of an `f32`.
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Code in a safetensors header: `F32`, `F16`, `BF16`.
    pub const fn code(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// Name in Python: `float32`, `float16`, `bfloat16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The type with this Python name or safetensors code.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|d| d.name() == text || d.code() == text)
    }
}

/// An element type the kernels read: it widens to `f32` without loss.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    /// Tag of this type.
    const DTYPE: Dtype;
    /// The same value as `f32`.
    fn widen(self) -> f32;
    /// Widens `from` into `to`, element by element. Both have the same length.
    fn widen_slice(from: &[Self], to: &mut [f32]);
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn widen(self) -> f32 {
        self
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t = f32::from_bits(u32::from(f.to_bits()) << 16);
        }
    }
}
