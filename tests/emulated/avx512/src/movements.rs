//! Movements of lanes, and of parts of vectors.

use bytemuck::Pod;
use iced_x86::{Mnemonic, OpKind};

use crate::cpu::Vector;
use crate::execute::{Outcome, Refusal, immediate};
use crate::operands::At;

/// Movements of lanes, and of parts of vectors.
pub(crate) fn movements(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    let selector = at.instruction.immediate8() as usize;
    match at.instruction.mnemonic() {
        M::Vmovshdup => gather::<u32>(at, 1, |l, _| (0, l | 1)),
        M::Vpermilps if immediate(at) => {
            gather::<u32>(at, 1, |l, _| (0, l / 4 * 4 + (selector >> (l % 4 * 2) & 3)))
        }
        M::Vshufps => {
            gather::<u32>(at, 2, |l, _| (usize::from(l % 4 >= 2), l / 4 * 4 + (selector >> (l % 4 * 2) & 3)))
        }
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
        M::Vpcompressd | M::Vcompressps => compress::<u32>(at),
        M::Vpshufb => shuffle_bytes(at),
        M::Vinsertps => insert_lane(at),
        M::Vextractf32x4 | M::Vextracti32x4 => extract(at, 16),
        M::Vextractf64x4 | M::Vextracti64x4 => extract(at, 32),
        M::Vinsertf32x4 | M::Vinserti32x4 => insert(at, 16),
        M::Vinsertf64x4 | M::Vinserti64x4 => insert(at, 32),
        M::Vpmovm2d => spread(at),
        M::Vpmovdb => narrow::<u8>(at, |v| v as u8),
        M::Vpmovdw => narrow::<u16>(at, |v| v as u16),
        _ => Err(Refusal::Unknown),
    }
}

/// Lane `l` is the lane of the source that `from` names; sources are operands 1 to `sources`.
fn gather<T: Pod>(
    at: &mut At<'_>,
    sources: u32,
    from: impl Fn(usize, usize) -> (usize, usize),
) -> Outcome<()> {
    let vectors = [at.vector::<T>(1)?, at.vector::<T>(sources)?];
    let (mut result, lanes) = (Vector::default(), at.length(0) / size_of::<T>());
    for l in 0..lanes {
        let (source, lane) = from(l, lanes);
        result.lanes_mut::<T>()[l] = vectors[source].lanes::<T>()[lane];
    }
    at.write_vector::<T>(result)
}

/// Byte `l` is one of the sixteen bytes of operand 1 around it, by the low bits of byte `l` of operand 2, or zero by its sign.
fn shuffle_bytes(at: &mut At<'_>) -> Outcome<()> {
    let (table, indices) = (at.vector::<u8>(1)?, at.vector::<u8>(2)?);
    let mut result = Vector::default();
    for (l, byte) in result.lanes_mut::<u8>().iter_mut().enumerate() {
        let index = indices.lanes::<u8>()[l];
        *byte =
            if index & 0x80 == 0 { table.lanes::<u8>()[l / 16 * 16 + usize::from(index & 15)] } else { 0 };
    }
    at.write_vector::<u8>(result)
}

/// The lanes of operand 1 whose mask bit is set, side by side; beyond them those of operand 0, or zeros.
fn compress<T: Pod>(at: &mut At<'_>) -> Outcome<()> {
    let (mask, from) = (at.mask().unwrap_or(u64::MAX), at.vector::<T>(1)?);
    let mut result = if at.instruction.zeroing_masking() { Vector::default() } else { at.vector::<T>(0)? };
    let lanes = at.length(1) / size_of::<T>();
    let taken = from.lanes::<T>()[..lanes].iter().enumerate().filter(|(l, _)| mask >> l & 1 == 1);
    result.lanes_mut::<T>().iter_mut().zip(taken).for_each(|(to, (_, from))| *to = *from);
    at.write_register(result)
}

/// All ones in the lanes whose mask bit is set, zeros in the others.
fn spread(at: &mut At<'_>) -> Outcome<()> {
    let mask = at.bits(1, 2)?;
    let mut result = Vector::default();
    for (l, lane) in result.lanes_mut::<u32>().iter_mut().enumerate() {
        *lane = if mask >> l & 1 == 1 { u32::MAX } else { 0 };
    }
    at.write_vector::<u32>(result)
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
