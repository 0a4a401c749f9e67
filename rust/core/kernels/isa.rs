//! Run-time dispatch: which instructions this processor has, asked once per packed dictionary or call.

use crate::error::{Error, Result};

/// Instruction sets with a path of their own, from the plainest to the fastest.
///
/// The path decides which screen runs (see [`super::gemm`]) and with how many lanes, never the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// What the compiler's baseline offers.
    Plain,
    /// 128-bit fused arithmetic of aarch64.
    Neon,
    /// 128-bit dot products of 8-bit quadruples.
    NeonDot,
    /// 256-bit fused arithmetic.
    Avx2,
    /// 512-bit fused arithmetic.
    Avx512,
    /// 512-bit dot products of bf16 pairs.
    Avx512Bf16,
    /// 512-bit dot products of 8-bit quadruples and of 16-bit pairs.
    Avx512Vnni,
    /// Products of tiles of bf16, beside all of the above.
    Amx,
}

impl Path {
    /// All paths, plainest first.
    pub const ALL: [Self; 8] = [
        Self::Plain,
        Self::Neon,
        Self::NeonDot,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Avx512Vnni,
        Self::Amx,
    ];

    /// Name as [`VARIABLE`] takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn supported(self) -> bool {
        #[cfg(feature = "emulated")]
        if is_emulated(self) {
            return true;
        }
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("popcnt");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match self {
            Self::Plain => true,
            Self::Neon | Self::NeonDot => false,
            Self::Avx2 => avx2,
            Self::Avx512 => avx512,
            Self::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
            Self::Amx => {
                [Self::Avx512Bf16, Self::Avx512Vnni].map(Self::supported) == [true; 2]
                    && tiles_are_permitted()
            }
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn supported(self) -> bool {
        match self {
            Self::Plain | Self::Neon => true,
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            _ => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn supported(self) -> bool {
        self == Self::Plain
    }
}

/// Whether the processor has tiles of bf16, and the system lets this process use them: it has to be asked, once.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_are_permitted() -> bool {
    use std::sync::OnceLock;

    use super::cpuid::cpuid;
    /// Bits of leaf 7, register EDX: TDPBF16PS and tiles.
    const TILES: u32 = 1 << 22 | 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        let has_tiles = cpuid(7, 0).is_some_and(|features| features.edx & TILES == TILES);
        // SAFETY: the call changes no memory; a kernel that does not know it says so.
        #[allow(unsafe_code)]
        let ask = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        has_tiles && ask() == 0
    })
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_are_permitted() -> bool {
    false
}

/// Whether `MICROTOME_EMULATED` names the path, in a list with commas: an emulator provides it (`tests/emulated`).
#[cfg(feature = "emulated")]
fn is_emulated(path: Path) -> bool {
    std::env::var("MICROTOME_EMULATED").is_ok_and(|names| names.split(',').any(|name| name == path.name()))
}

/// A [`Path`] that this processor has: the proof that calling its code is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Path);

/// Environment variable that forces a path, e.g. `MICROTOME_ISA=avx2`.
pub const VARIABLE: &str = "MICROTOME_ISA";

impl Isa {
    /// The path that every processor has.
    pub const PLAIN: Self = Self(Path::Plain);
    /// The path that every aarch64 processor has.
    #[cfg(target_arch = "aarch64")]
    pub const NEON: Self = Self(Path::Neon);

    /// The path, if this processor has it.
    pub fn new(path: Path) -> Option<Self> {
        path.supported().then_some(Self(path))
    }

    /// The paths of this processor, plainest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Path::ALL.into_iter().filter_map(Self::new)
    }

    /// Which path this is.
    pub const fn path(self) -> Path {
        self.0
    }

    /// The fastest path of this processor, or the one that [`VARIABLE`] names.
    ///
    /// # Errors
    /// [`Error::Shape`] when the variable names an unknown path or one that this processor lacks.
    pub fn choose() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Err(_) => Ok(Self::available().next_back().unwrap_or(Self::PLAIN)),
            Ok(name) => Self::available().find(|isa| isa.0.name() == name).ok_or_else(|| {
                let names: Vec<_> = Self::available().map(|isa| isa.0.name()).collect();
                Error::shape(VARIABLE, format!("one of {} on this processor", names.join(", ")), name)
            }),
        }
    }
}

/// Compiles one safe, inlined body once per instruction set, and a function that picks by [`Isa`].
///
/// The body has the parameter `FUSED`: whether a multiplication and the addition after it are one instruction.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::kernels::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            use $crate::kernels::isa::Path;
            match isa.path() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` exists only for a path whose features the processor was asked for.
                #[allow(unsafe_code)]
                path if path >= Path::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                #[allow(unsafe_code)]
                Path::Avx2 => unsafe { avx2($($arg),*) },
                // NEON is part of the aarch64 baseline, fused multiply-add included.
                Path::Neon | Path::NeonDot => $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
                _ => $body::<false>($($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_is_always_there_and_names_are_distinct() {
        assert_eq!(Isa::available().next(), Some(Isa::PLAIN));
        let mut names = Path::ALL.map(Path::name).to_vec();
        names.dedup();
        assert_eq!(names.len(), Path::ALL.len());
    }
}
