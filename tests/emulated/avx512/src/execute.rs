//! One instruction: its operation on whole vectors. What is not here is refused, never guessed.

use bytemuck::Pod;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, RoundingControl};

use crate::cpu::{Cpu, Vector};
use crate::glue;
use crate::lanes::{self, Float};
use crate::movements::movements;
use crate::operands::At;
use crate::scalars::{conversions, scalars};
use crate::tiles::tiles;

/// Why an instruction was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its operation is not known here.
    Unknown,
    /// Its operation is known, but not with these operands, this mask or this rounding.
    Form,
    /// It would have faulted: its memory operand is not aligned.
    Misaligned,
}

/// What came of an instruction.
pub type Outcome<T> = Result<T, Refusal>;

/// Executes one instruction, and moves `rip` beyond it, or where it branches.
///
/// Its memory operands are those of the program: they are read and written as the instruction would.
///
/// # Errors
/// A [`Refusal`]; nothing has been written then.
pub fn execute(cpu: &mut Cpu, instruction: &Instruction) -> Outcome<()> {
    let mut at = At { cpu, instruction };
    match instruction.code().encoding() {
        EncodingKind::EVEX | EncodingKind::VEX => {
            vector(&mut at)?;
            cpu.rip = instruction.next_ip();
            Ok(())
        }
        EncodingKind::Legacy => glue::execute(&mut at),
        _ => Err(Refusal::Unknown),
    }
}

fn vector(at: &mut At<'_>) -> Outcome<()> {
    let instruction = at.instruction;
    if !matches!(instruction.rounding_control(), RoundingControl::None | RoundingControl::RoundToNearest) {
        return Err(Refusal::Form);
    }
    for family in [moves, floats, fused, integers, movements, scalars, conversions, masks, tiles] {
        match family(at) {
            Err(Refusal::Unknown) => {}
            outcome => return outcome,
        }
    }
    Err(Refusal::Unknown)
}

/// `f` of lanes of operands 1 and 2.
pub(crate) fn zip<T: Pod>(at: &mut At<'_>, f: impl Fn(T, T) -> T) -> Outcome<()> {
    let (mut a, b) = (at.vector::<T>(1)?, at.vector::<T>(2)?);
    for (a, b) in a.lanes_mut::<T>().iter_mut().zip(b.lanes::<T>()) {
        *a = f(*a, *b);
    }
    at.write_vector::<T>(a)
}

/// `f` of lanes of operand 1.
pub(crate) fn map<T: Pod>(at: &mut At<'_>, f: impl Fn(T) -> T) -> Outcome<()> {
    let mut a = at.vector::<T>(1)?;
    a.lanes_mut::<T>().iter_mut().for_each(|a| *a = f(*a));
    at.write_vector::<T>(a)
}

/// `f` of lanes of operands 0, 1 and 2.
fn zip3<T: Pod>(at: &mut At<'_>, f: impl Fn(T, T, T) -> T) -> Outcome<()> {
    let (mut to, a, b) = (at.vector::<T>(0)?, at.vector::<T>(1)?, at.vector::<T>(2)?);
    for ((to, a), b) in to.lanes_mut::<T>().iter_mut().zip(a.lanes()).zip(b.lanes()) {
        *to = f(*to, *a, *b);
    }
    at.write_vector::<T>(to)
}

/// Copies and broadcasts of whole vectors.
fn moves(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    match at.instruction.mnemonic() {
        M::Vmovaps | M::Vmovups | M::Vmovdqa32 | M::Vmovdqu32 => map::<u32>(at, |v| v),
        M::Vmovapd | M::Vmovupd | M::Vmovdqa64 | M::Vmovdqu64 => map::<u64>(at, |v| v),
        M::Vmovdqu8 => map::<u8>(at, |v| v),
        M::Vmovdqu16 => map::<u16>(at, |v| v),
        M::Vbroadcastss | M::Vpbroadcastd => broadcast::<u32>(at),
        M::Vbroadcastsd | M::Vpbroadcastq => broadcast::<u64>(at),
        M::Vbroadcastf32x4 | M::Vbroadcasti32x4 => repeat::<u32>(at, 4),
        M::Vbroadcastf64x4 | M::Vbroadcasti64x4 => repeat::<u64>(at, 4),
        _ => Err(Refusal::Unknown),
    }
}

fn broadcast<T: Pod>(at: &mut At<'_>) -> Outcome<()> {
    let bits = at.bits(1, size_of::<T>())?;
    let lane = bytemuck::pod_read_unaligned::<T>(&bits.to_le_bytes()[..size_of::<T>()]);
    at.write_vector::<T>(Vector::filled(lane))
}

/// The first `n` lanes of operand 1, over and over.
fn repeat<T: Pod>(at: &mut At<'_>, n: usize) -> Outcome<()> {
    at.unmasked()?;
    let mut vector = at.vector::<T>(1)?;
    let (first, rest) = vector.lanes_mut::<T>().split_at_mut(n);
    rest.chunks_mut(n).for_each(|chunk| chunk.copy_from_slice(first));
    at.write_vector::<T>(vector)
}

fn floats(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    match at.instruction.mnemonic() {
        M::Vaddps => zip::<f32>(at, lanes::add),
        M::Vaddpd => zip::<f64>(at, lanes::add),
        M::Vsubps => zip::<f32>(at, lanes::sub),
        M::Vsubpd => zip::<f64>(at, lanes::sub),
        M::Vmulps => zip::<f32>(at, lanes::mul),
        M::Vmulpd => zip::<f64>(at, lanes::mul),
        M::Vmaxps => zip::<f32>(at, lanes::max),
        M::Vmaxpd => zip::<f64>(at, lanes::max),
        M::Vminps => zip::<f32>(at, lanes::min),
        M::Vminpd => zip::<f64>(at, lanes::min),
        M::Vcmpps => compare::<f32>(at),
        M::Vcmppd => compare::<f64>(at),
        _ => Err(Refusal::Unknown),
    }
}

fn compare<F: Float>(at: &mut At<'_>) -> Outcome<()> {
    let (a, b, predicate) = (at.vector::<F>(1)?, at.vector::<F>(2)?, at.instruction.immediate8());
    let length = at.length(1);
    at.write_comparison::<F>(length, |l| lanes::compares(predicate, a.lanes::<F>()[l], b.lanes::<F>()[l]))
}

/// Dot products and fused multiply-adds. The number says which operands are multiplied: `132` is the first by the third.
fn fused(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    match at.instruction.mnemonic() {
        M::Vfmadd132ps => zip3::<f32>(at, |x, y, z| lanes::fma(x, z, y)),
        M::Vfmadd213ps => zip3::<f32>(at, |x, y, z| lanes::fma(y, x, z)),
        M::Vfmadd231ps => zip3::<f32>(at, |x, y, z| lanes::fma(y, z, x)),
        M::Vfmadd132pd => zip3::<f64>(at, |x, y, z| lanes::fma(x, z, y)),
        M::Vfmadd213pd => zip3::<f64>(at, |x, y, z| lanes::fma(y, x, z)),
        M::Vfmadd231pd => zip3::<f64>(at, |x, y, z| lanes::fma(y, z, x)),
        M::Vpdpbusd => zip3::<u32>(at, lanes::dot_bytes),
        M::Vpdpwssd => zip3::<u32>(at, lanes::dot_words),
        M::Vdpbf16ps => zip3::<f32>(at, |sum, a, b| lanes::dot_brain_floats(sum, a.to_bits(), b.to_bits())),
        _ => Err(Refusal::Unknown),
    }
}

fn integers(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    let shift = || u32::from(at.instruction.immediate8());
    match at.instruction.mnemonic() {
        M::Vpaddd => zip::<u32>(at, u32::wrapping_add),
        M::Vpaddq => zip::<u64>(at, u64::wrapping_add),
        M::Vpsubd => zip::<u32>(at, u32::wrapping_sub),
        M::Vpmulld => zip::<u32>(at, u32::wrapping_mul),
        M::Vpandd | M::Vandps => zip::<u32>(at, |a, b| a & b),
        M::Vpandq | M::Vandpd => zip::<u64>(at, |a, b| a & b),
        M::Vpord | M::Vorps => zip::<u32>(at, |a, b| a | b),
        M::Vporq | M::Vorpd => zip::<u64>(at, |a, b| a | b),
        M::Vpxord | M::Vxorps => zip::<u32>(at, |a, b| a ^ b),
        M::Vpxorq | M::Vxorpd => zip::<u64>(at, |a, b| a ^ b),
        M::Vpaddb => zip::<u8>(at, u8::wrapping_add),
        M::Vpsadbw => zip::<u64>(at, lanes::distance_of_bytes),
        M::Vpslld if immediate(at) => {
            let n = shift();
            map::<u32>(at, |v| v.checked_shl(n).unwrap_or(0))
        }
        M::Vpsrld if immediate(at) => {
            let n = shift();
            map::<u32>(at, |v| v.checked_shr(n).unwrap_or(0))
        }
        M::Vpsrlw if immediate(at) => {
            let n = shift();
            map::<u16>(at, |v| v.checked_shr(n).unwrap_or(0))
        }
        M::Vpcmpd => compare_integers(at, |v: u32| v.cast_signed()),
        M::Vpcmpud => compare_integers(at, |v: u32| v),
        M::Vpcmpq => compare_integers(at, |v: u64| v.cast_signed()),
        M::Vpcmpuq => compare_integers(at, |v: u64| v),
        M::Vptestmd => {
            let (a, b, length) = (at.vector::<u32>(1)?, at.vector::<u32>(2)?, at.length(1));
            at.write_comparison::<u32>(length, |l| a.lanes::<u32>()[l] & b.lanes::<u32>()[l] != 0)
        }
        _ => Err(Refusal::Unknown),
    }
}

fn compare_integers<T: Pod, O: Ord>(at: &mut At<'_>, number: impl Fn(T) -> O) -> Outcome<()> {
    let (a, b, length) = (at.vector::<T>(1)?, at.vector::<T>(2)?, at.length(1));
    let predicate = at.instruction.immediate8();
    at.write_comparison::<T>(length, |l| {
        let order = number(a.lanes()[l]).cmp(&number(b.lanes()[l]));
        let holds = match predicate & 3 {
            0 => order.is_eq(),
            1 => order.is_lt(),
            2 => order.is_le(),
            _ => false,
        };
        holds != (predicate & 4 != 0)
    })
}

/// Whether the last operand is an immediate: shifts also come with a count in a register.
pub(crate) fn immediate(at: &At<'_>) -> bool {
    at.instruction.op2_kind() == OpKind::Immediate8
}

/// Instructions of mask registers.
fn masks(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    let (bytes, kind) = match at.instruction.mnemonic() {
        M::Kmovb => (1, M::Kmovb),
        M::Kmovw => (2, M::Kmovb),
        M::Kmovd => (4, M::Kmovb),
        M::Kmovq => (8, M::Kmovb),
        M::Kandw => (2, M::Kandw),
        M::Korw => (2, M::Korw),
        M::Kxorw => (2, M::Kxorw),
        M::Knotw => (2, M::Knotw),
        M::Kunpckbw => (2, M::Kunpckbw),
        _ => return Err(Refusal::Unknown),
    };
    let a = at.bits(1, bytes)?;
    let value = match kind {
        M::Kmovb => a,
        M::Knotw => !a,
        M::Kunpckbw => (a & 0xff) << 8 | at.bits(2, bytes)? & 0xff,
        M::Kandw => a & at.bits(2, bytes)?,
        M::Korw => a | at.bits(2, bytes)?,
        _ => a ^ at.bits(2, bytes)?,
    };
    at.write_bits(bytes, value)
}
