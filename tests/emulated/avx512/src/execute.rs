//! One instruction: its operation on whole vectors. What is not here is refused, never guessed.

use bytemuck::Pod;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, RoundingControl};

use crate::cpu::{Cpu, Vector};
use crate::glue::{self, CARRY, PARITY, STATUS, ZERO};
use crate::lanes::{self, Float};
use crate::operands::{At, ones};

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
    for family in [moves, floats, fused, integers, shuffles, scalars, conversions, masks] {
        match family(at) {
            Err(Refusal::Unknown) => {}
            outcome => return outcome,
        }
    }
    Err(Refusal::Unknown)
}

/// `f` of lanes of operands 1 and 2.
fn zip<T: Pod>(at: &mut At<'_>, f: impl Fn(T, T) -> T) -> Outcome<()> {
    let (mut a, b) = (at.vector::<T>(1)?, at.vector::<T>(2)?);
    for (a, b) in a.lanes_mut::<T>().iter_mut().zip(b.lanes::<T>()) {
        *a = f(*a, *b);
    }
    at.write_vector::<T>(a)
}

/// `f` of lanes of operand 1.
fn map<T: Pod>(at: &mut At<'_>, f: impl Fn(T) -> T) -> Outcome<()> {
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
        M::Vdpbf16ps => {
            zip3::<f32>(at, |sum, a, b| lanes::dot_brain_floats(sum, a.to_bits(), b.to_bits()))
        }
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
        M::Vpopcntq => map::<u64>(at, |v| u64::from(v.count_ones())),
        M::Vpslld if immediate(at) => {
            let n = shift();
            map::<u32>(at, |v| v.checked_shl(n).unwrap_or(0))
        }
        M::Vpsrld if immediate(at) => {
            let n = shift();
            map::<u32>(at, |v| v.checked_shr(n).unwrap_or(0))
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
fn immediate(at: &At<'_>) -> bool {
    at.instruction.op2_kind() == OpKind::Immediate8
}

/// Movements of lanes, and of parts of vectors.
fn shuffles(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    let selector = at.instruction.immediate8() as usize;
    match at.instruction.mnemonic() {
        M::Vmovshdup => gather::<u32>(at, 1, |l, _| (0, l | 1)),
        M::Vpermilps if immediate(at) => {
            gather::<u32>(at, 1, |l, _| (0, l / 4 * 4 + (selector >> (l % 4 * 2) & 3)))
        }
        M::Vshufps => gather::<u32>(at, 2, |l, _| {
            (usize::from(l % 4 >= 2), l / 4 * 4 + (selector >> (l % 4 * 2) & 3))
        }),
        M::Vshufpd => gather::<u64>(at, 2, |l, _| (l % 2, l / 2 * 2 + (selector >> l & 1))),
        M::Vpermpd | M::Vpermq if immediate(at) => {
            gather::<u64>(at, 1, |l, _| (0, l / 4 * 4 + (selector >> (l % 4 * 2) & 3)))
        }
        // Indices come first, the table second.
        M::Vpermpd | M::Vpermq => permute::<u64>(at),
        M::Vpermps | M::Vpermd => permute::<u32>(at),
        M::Vpermt2ps | M::Vpermt2d => permute_two::<u32>(at, 1, 0),
        M::Vpermt2pd | M::Vpermt2q => permute_two::<u64>(at, 1, 0),
        M::Vpermi2ps | M::Vpermi2d => permute_two::<u32>(at, 0, 1),
        M::Vpermi2pd | M::Vpermi2q => permute_two::<u64>(at, 0, 1),
        M::Vinsertps => insert_lane(at),
        M::Vextractf32x4 | M::Vextracti32x4 => extract(at, 16),
        M::Vextractf64x4 | M::Vextracti64x4 => extract(at, 32),
        M::Vinsertf32x4 | M::Vinserti32x4 => insert(at, 16),
        M::Vinsertf64x4 | M::Vinserti64x4 => insert(at, 32),
        M::Vpmovdb => narrow::<u8>(at, |v| v as u8),
        M::Vpmovdw => narrow::<u16>(at, |v| v as u16),
        _ => Err(Refusal::Unknown),
    }
}

/// Lane `l` is the lane of the source that `from` names; sources are operands 1 to `sources`.
fn gather<T: Pod>(at: &mut At<'_>, sources: u32, from: impl Fn(usize, usize) -> (usize, usize)) -> Outcome<()> {
    let vectors = [at.vector::<T>(1)?, at.vector::<T>(sources)?];
    let (mut result, lanes) = (Vector::default(), at.length(0) / size_of::<T>());
    for l in 0..lanes {
        let (source, lane) = from(l, lanes);
        result.lanes_mut::<T>()[l] = vectors[source].lanes::<T>()[lane];
    }
    at.write_vector::<T>(result)
}

fn permute<T: Pod>(at: &mut At<'_>) -> Outcome<()> {
    let (indices, table) = (at.vector::<T>(1)?, at.vector::<T>(2)?);
    let (mut result, lanes) = (Vector::default(), at.length(0) / size_of::<T>());
    for l in 0..lanes {
        let index = indices.lanes::<u8>()[l * size_of::<T>()] as usize;
        result.lanes_mut::<T>()[l] = table.lanes::<T>()[index % lanes];
    }
    at.write_vector::<T>(result)
}

/// Lanes of two tables, the second in operand 2; indices and first table as said.
fn permute_two<T: Pod>(at: &mut At<'_>, indices: u32, first: u32) -> Outcome<()> {
    let (indices, tables) = (at.vector::<T>(indices)?, [at.vector::<T>(first)?, at.vector::<T>(2)?]);
    let (mut result, lanes) = (Vector::default(), at.length(0) / size_of::<T>());
    for l in 0..lanes {
        let index = indices.lanes::<u8>()[l * size_of::<T>()] as usize;
        result.lanes_mut::<T>()[l] = tables[index / lanes % 2].lanes::<T>()[index % lanes];
    }
    at.write_vector::<T>(result)
}

/// VINSERTPS: one lane of operand 2 into operand 1, and zeros where the immediate says.
fn insert_lane(at: &mut At<'_>) -> Outcome<()> {
    let selector = at.instruction.immediate8();
    let mut vector = at.vector::<u32>(1)?;
    let lane = match at.instruction.op2_kind() {
        OpKind::Memory => at.bits(2, 4)? as u32,
        _ => at.vector::<u32>(2)?.lanes::<u32>()[usize::from(selector >> 6)],
    };
    vector.lanes_mut::<u32>()[usize::from(selector >> 4 & 3)] = lane;
    for (l, lane) in vector.lanes_mut::<u32>()[..4].iter_mut().enumerate() {
        if selector >> l & 1 == 1 {
            *lane = 0;
        }
    }
    at.write_vector::<u32>(vector)
}

fn extract(at: &mut At<'_>, bytes: usize) -> Outcome<()> {
    at.unmasked()?;
    let (vector, parts) = (at.vector::<u8>(1)?, at.length(1) / bytes);
    let start = at.instruction.immediate8() as usize % parts * bytes;
    let mut part = Vector::default();
    part.lanes_mut::<u8>()[..bytes].copy_from_slice(&vector.lanes()[start..start + bytes]);
    at.write_vector::<u8>(part)
}

fn insert(at: &mut At<'_>, bytes: usize) -> Outcome<()> {
    at.unmasked()?;
    let (mut vector, part, parts) = (at.vector::<u8>(1)?, at.vector::<u8>(2)?, at.length(0) / bytes);
    let start = at.instruction.immediate8() as usize % parts * bytes;
    vector.lanes_mut::<u8>()[start..start + bytes].copy_from_slice(&part.lanes()[..bytes]);
    at.write_vector::<u8>(vector)
}

/// The low parts of 32-bit lanes, side by side.
fn narrow<T: Pod>(at: &mut At<'_>, f: impl Fn(u32) -> T) -> Outcome<()> {
    let (from, lanes) = (at.vector::<u32>(1)?, at.length(1) / 4);
    let mut result = Vector::default();
    for (to, from) in result.lanes_mut::<T>().iter_mut().zip(&from.lanes::<u32>()[..lanes]) {
        *to = f(*from);
    }
    at.write_vector::<T>(result)
}

/// Lane 0 alone.
fn scalars(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    match at.instruction.mnemonic() {
        M::Vaddsd => scalar::<f64>(at, lanes::add),
        M::Vaddss => scalar::<f32>(at, lanes::add),
        M::Vsubsd => scalar::<f64>(at, lanes::sub),
        M::Vsubss => scalar::<f32>(at, lanes::sub),
        M::Vmulsd => scalar::<f64>(at, lanes::mul),
        M::Vmulss => scalar::<f32>(at, lanes::mul),
        M::Vmaxsd => scalar::<f64>(at, lanes::max),
        M::Vmaxss => scalar::<f32>(at, lanes::max),
        M::Vcmpss => compare_scalars::<f32>(at),
        M::Vcmpsd => compare_scalars::<f64>(at),
        M::Vmovss if at.instruction.op_count() == 3 => scalar::<f32>(at, |_, b| b),
        M::Vmovsd if at.instruction.op_count() == 3 => scalar::<f64>(at, |_, b| b),
        M::Vmovss => move_scalar::<u32>(at),
        M::Vmovsd => move_scalar::<u64>(at),
        M::Vucomiss => order::<f32>(at),
        M::Vucomisd => order::<f64>(at),
        M::Vmovd => move_bits(at, 4),
        M::Vmovq => move_bits(at, 8),
        M::Vpinsrd => {
            let (mut vector, bits) = (at.vector::<u32>(1)?, at.bits(2, 4)?);
            vector.lanes_mut::<u32>()[at.instruction.immediate8() as usize & 3] = bits as u32;
            at.write_vector::<u32>(vector)
        }
        _ => Err(Refusal::Unknown),
    }
}

fn lane<T: Pod>(at: &At<'_>, operand: u32) -> Outcome<T> {
    let bits = at.bits(operand, size_of::<T>())?;
    Ok(bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()]))
}

fn scalar<T: Pod>(at: &mut At<'_>, f: impl Fn(T, T) -> T) -> Outcome<()> {
    let value = f(lane(at, 1)?, lane(at, 2)?);
    let rest = at.vector::<T>(1)?;
    at.write_scalar(value, rest)
}

fn compare_scalars<F: Float>(at: &mut At<'_>) -> Outcome<()> {
    let (a, b): (F, F) = (lane(at, 1)?, lane(at, 2)?);
    let holds = lanes::compares(at.instruction.immediate8(), a, b);
    at.write_comparison::<F>(size_of::<F>(), |_| holds)
}

fn move_scalar<T: Pod>(at: &mut At<'_>) -> Outcome<()> {
    if at.instruction.op0_kind() == OpKind::Memory {
        let value = at.vector::<T>(1)?;
        return at.write_vector::<T>(value);
    }
    let value: T = lane(at, 1)?;
    at.write_scalar(value, Vector::default())
}

/// VUCOMISS and its like: flags.
fn order<F: Float>(at: &mut At<'_>) -> Outcome<()> {
    let (a, b): (F, F) = (lane(at, 0)?, lane(at, 1)?);
    let flags = match a.partial_cmp(&b) {
        None => ZERO | PARITY | CARRY,
        Some(std::cmp::Ordering::Less) => CARRY,
        Some(std::cmp::Ordering::Equal) => ZERO,
        Some(std::cmp::Ordering::Greater) => 0,
    };
    at.cpu.flags = at.cpu.flags & !STATUS | flags;
    Ok(())
}

/// VMOVD, VMOVQ: between lane 0 and a general register or memory.
fn move_bits(at: &mut At<'_>, bytes: usize) -> Outcome<()> {
    let bits = at.bits(1, bytes)? & ones(8 * bytes);
    if at.instruction.op0_register().is_vector_register() {
        let mut vector = Vector::default();
        vector.lanes_mut::<u64>()[0] = bits;
        return at.write_vector::<u64>(vector);
    }
    at.write_bits(bytes, bits)
}

fn conversions(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    match at.instruction.mnemonic() {
        M::Vcvtdq2ps => map::<u32>(at, |v| (v.cast_signed() as f32).to_bits()),
        M::Vcvtps2pd => {
            at.unmasked()?;
            let from = at.vector::<f32>(1)?;
            let mut result = Vector::default();
            for (to, from) in result.lanes_mut::<f64>().iter_mut().zip(from.lanes()) {
                *to = lanes::widen(*from);
            }
            at.write_vector::<f64>(result)
        }
        M::Vcvtss2sd => {
            let (value, rest) = (lanes::widen(lane(at, 2)?), at.vector::<f64>(1)?);
            at.write_scalar(value, rest)
        }
        M::Vcvtsi2ss => {
            let bytes = at.instruction.op2_register().size().max(at.instruction.memory_size().size());
            let bits = at.bits(2, bytes)?;
            let value =
                if bytes == 8 { bits.cast_signed() as f32 } else { (bits as u32).cast_signed() as f32 };
            let rest = at.vector::<f32>(1)?;
            at.write_scalar(value, rest)
        }
        M::Vcvttss2si => {
            let value: f32 = lane(at, 1)?;
            match at.instruction.op0_register().size() {
                8 => at.write_bits(8, lanes::truncate_to_64(value).cast_unsigned()),
                _ => at.write_bits(4, u64::from(lanes::truncate_to_32(value).cast_unsigned())),
            }
        }
        _ => Err(Refusal::Unknown),
    }
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
