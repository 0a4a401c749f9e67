//! What one lane does: IEEE arithmetic with the processor's rules for what is not a number, and the dot products.

/// The NaN that an invalid operation gives.
const INDEFINITE_32: u32 = 0xffc0_0000;
const INDEFINITE_64: u64 = 0xfff8_0000_0000_0000;

/// A float with the processor's rules for NaNs: the first operand that is one is the result, made quiet.
pub trait Float: Copy + PartialOrd + bytemuck::Pod {
    /// Zero.
    const ZERO: Self;
    /// Whether it is not a number.
    fn nan(self) -> bool;
    /// The same NaN, quiet.
    #[must_use]
    fn quiet(self) -> Self;
    /// `self`, or the indefinite NaN if it is one: what operands that are numbers give.
    #[must_use]
    fn settled(self) -> Self;
    /// `self * b + c`, rounded once.
    #[must_use]
    fn fused(self, b: Self, c: Self) -> Self;
    /// The sum.
    #[must_use]
    fn plus(self, b: Self) -> Self;
    /// The difference.
    #[must_use]
    fn minus(self, b: Self) -> Self;
    /// The product.
    #[must_use]
    fn times(self, b: Self) -> Self;
}

macro_rules! float {
    ($float:ty, $quiet:expr, $indefinite:expr) => {
        impl Float for $float {
            const ZERO: Self = 0.0;
            fn nan(self) -> bool {
                self.is_nan()
            }
            fn quiet(self) -> Self {
                Self::from_bits(self.to_bits() | $quiet)
            }
            fn settled(self) -> Self {
                if self.is_nan() { Self::from_bits($indefinite) } else { self }
            }
            fn fused(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            fn plus(self, b: Self) -> Self {
                self + b
            }
            fn minus(self, b: Self) -> Self {
                self - b
            }
            fn times(self, b: Self) -> Self {
                self * b
            }
        }
    };
}
float!(f32, 1 << 22, INDEFINITE_32);
float!(f64, 1 << 51, INDEFINITE_64);

/// `numbers(a, b)` unless one is a NaN.
fn unless_nan<F: Float>(a: F, b: F, numbers: impl FnOnce(F, F) -> F) -> F {
    if a.nan() {
        a.quiet()
    } else if b.nan() {
        b.quiet()
    } else {
        numbers(a, b).settled()
    }
}

/// VADDPS, VADDPD.
pub fn add<F: Float>(a: F, b: F) -> F {
    unless_nan(a, b, F::plus)
}

/// VSUBPS, VSUBPD.
pub fn sub<F: Float>(a: F, b: F) -> F {
    unless_nan(a, b, F::minus)
}

/// VMULPS, VMULPD.
pub fn mul<F: Float>(a: F, b: F) -> F {
    unless_nan(a, b, F::times)
}

/// VMAXPS, VMAXPD: the second operand of equal ones and of any NaN, as it is.
pub fn max<F: Float>(a: F, b: F) -> F {
    if a > b { a } else { b }
}

/// VMINPS, VMINPD.
pub fn min<F: Float>(a: F, b: F) -> F {
    if a < b { a } else { b }
}

/// VFMADD: `a * b + c`; NaNs take precedence in this order.
pub fn fma<F: Float>(a: F, b: F, c: F) -> F {
    match [a, b, c].into_iter().find(|v| v.nan()) {
        Some(nan) => nan.quiet(),
        None => a.fused(b, c).settled(),
    }
}

/// Whether the relation of VCMPPS and its like with this number holds; odd ones out are relations with NaNs.
pub fn compares<F: Float>(predicate: u8, a: F, b: F) -> bool {
    let unordered = a.nan() || b.nan();
    match predicate & 0xf {
        0x0 => a == b,
        0x1 => a < b,
        0x2 => a <= b,
        0x3 => unordered,
        0x4 => a != b,
        0x5 => unordered || a >= b,
        0x6 => unordered || a > b,
        0x7 => !unordered,
        0x8 => unordered || a == b,
        0x9 => unordered || a < b,
        0xa => unordered || a <= b,
        0xb => false,
        0xc => !unordered && a != b,
        0xd => a >= b,
        0xe => a > b,
        _ => true,
    }
}

/// VCVTPS2PD.
pub fn widen(v: f32) -> f64 {
    if v.is_nan() {
        let bits = u64::from(v.to_bits());
        // Sign, then exponent and quiet bit, then the payload moved to the top of the longer one.
        return f64::from_bits((bits >> 31 << 63) | (0xfff << 51) | ((bits & 0x003f_ffff) << 29));
    }
    f64::from(v)
}

/// VCVTTSS2SI to 32 bits.
pub fn truncate_to_32(v: f32) -> i32 {
    if v.is_nan() || !(-2_147_483_648.0..2_147_483_648.0).contains(&v) { i32::MIN } else { v as i32 }
}

/// VCVTTSS2SI to 64 bits.
pub fn truncate_to_64(v: f32) -> i64 {
    if v.is_nan() || !(-9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0).contains(&v) {
        i64::MIN
    } else {
        v as i64
    }
}

/// VPDPBUSD: four products of unsigned bytes of `a` with signed bytes of `b`, added to `sum`, wrapping.
pub fn dot_bytes(sum: u32, a: u32, b: u32) -> u32 {
    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    products.fold(sum, |sum, (a, b)| {
        sum.wrapping_add((i32::from(a) * i32::from(b.cast_signed())).cast_unsigned())
    })
}

/// VPSADBW: the absolute differences of unsigned bytes, added up.
pub fn distance_of_bytes(a: u64, b: u64) -> u64 {
    a.to_le_bytes().into_iter().zip(b.to_le_bytes()).map(|(a, b)| u64::from(a.abs_diff(b))).sum()
}

/// VPDPWSSD: pairs of signed words.
pub fn dot_words(sum: u32, a: u32, b: u32) -> u32 {
    let words = |pair: u32| [pair as u16, (pair >> 16) as u16].map(|word| i32::from(word.cast_signed()));
    let products = words(a).into_iter().zip(words(b)).map(|(a, b)| a.wrapping_mul(b).cast_unsigned());
    products.fold(sum, u32::wrapping_add)
}

/// VDPBF16PS: the upper pair, then the lower one, each a fused multiply-add in f32, to nearest even; subnormal numbers are
/// zero on the way in and on the way out, whatever MXCSR says.
pub fn dot_brain_floats(sum: f32, a: u32, b: u32) -> f32 {
    let [upper_a, upper_b] = [a, b].map(|pair| pair & 0xffff_0000);
    let [lower_a, lower_b] = [a, b].map(|pair| pair << 16);
    let operands = [lower_a, lower_b, upper_a, upper_b].map(f32::from_bits);
    if let Some(nan) = operands.into_iter().chain([sum]).find(|v| v.is_nan()) {
        return nan.quiet();
    }
    let first = multiply_add_brain_floats(zero_if_subnormal(sum), upper_a, upper_b);
    if first.is_nan() { first } else { multiply_add_brain_floats(first, lower_a, lower_b) }
}

/// A fused multiply-add of two bf16, each with zeros below it, with subnormal numbers taken for zero.
pub fn multiply_add_brain_floats(sum: f32, a: u32, b: u32) -> f32 {
    let [a, b] = [a, b].map(|bits| zero_if_subnormal(f32::from_bits(bits)));
    flushed(a.mul_add(b, sum).settled(), a, b, sum)
}

fn zero_if_subnormal(v: f32) -> f32 {
    if v.is_subnormal() { 0.0_f32.copysign(v) } else { v }
}

/// `result`, the rounded `a * b + c`, or zero if it is tiny: if it is below the normal range when rounded to 24 bits of any
/// exponent. A result on the edge of that range may have been rounded up to it by the coarser grid below.
fn flushed(result: f32, a: f32, b: f32, c: f32) -> f32 {
    let edge = f64::from(f32::MIN_POSITIVE) - 2.0_f64.powi(-151);
    let tiny = || f64::from(a).mul_add(f64::from(b), f64::from(c)).abs() < edge;
    let suspect = result != 0.0 && result.abs() <= f32::MIN_POSITIVE;
    if suspect && tiny() { 0.0_f32.copysign(result) } else { result }
}
