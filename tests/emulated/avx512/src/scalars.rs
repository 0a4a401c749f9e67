//! Operations on lane 0 alone, and conversions.

use std::cmp::Ordering;

use bytemuck::Pod;
use iced_x86::{Mnemonic, OpKind};

use crate::cpu::Vector;
use crate::execute::{Outcome, Refusal, map};
use crate::glue::{CARRY, PARITY, STATUS, ZERO};
use crate::lanes::{self, Float};
use crate::operands::{At, ones};

/// Lane 0 alone.
pub(crate) fn scalars(at: &mut At<'_>) -> Outcome<()> {
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
        M::Vminss => scalar::<f32>(at, lanes::min),
        M::Vfmadd132ss => fused::<f32>(at, |x, y, z| lanes::fma(x, z, y)),
        M::Vfmadd213ss => fused::<f32>(at, |x, y, z| lanes::fma(y, x, z)),
        M::Vfmadd231ss => fused::<f32>(at, |x, y, z| lanes::fma(y, z, x)),
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

/// The same of operands 0, 1 and 2, over lane 0 of the first.
fn fused<T: Pod>(at: &mut At<'_>, f: impl Fn(T, T, T) -> T) -> Outcome<()> {
    let value = f(lane(at, 0)?, lane(at, 1)?, lane(at, 2)?);
    let rest = at.vector::<T>(0)?;
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
        Some(Ordering::Less) => CARRY,
        Some(Ordering::Equal) => ZERO,
        Some(Ordering::Greater) => 0,
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

/// Between integers and floats, and between floats.
pub(crate) fn conversions(at: &mut At<'_>) -> Outcome<()> {
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
