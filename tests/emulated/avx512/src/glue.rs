//! Integer instructions of 32 and 64 bits and branches, which every processor has: executed here too where they stand
//! between instructions of AVX-512, as a fault costs as much as hundreds of them.

use iced_x86::{ConditionCode, Mnemonic, OpKind};

use crate::execute::{Outcome, Refusal};
use crate::operands::{At, ones};

/// Bits of RFLAGS.
pub(crate) const CARRY: u64 = 1;
pub(crate) const PARITY: u64 = 1 << 2;
pub(crate) const ADJUST: u64 = 1 << 4;
pub(crate) const ZERO: u64 = 1 << 6;
pub(crate) const SIGN: u64 = 1 << 7;
pub(crate) const OVERFLOW: u64 = 1 << 11;
/// Those that arithmetic sets.
pub(crate) const STATUS: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

/// Executes the instruction, if it is one of those, and moves `rip`.
pub(crate) fn execute(at: &mut At<'_>) -> Outcome<()> {
    let next = at.instruction.next_ip();
    let target = match at.instruction.mnemonic() {
        Mnemonic::Jmp if at.instruction.op0_kind() == OpKind::NearBranch64 => {
            at.instruction.near_branch_target()
        }
        _ if at.instruction.is_jcc_short_or_near() => {
            if holds(at.instruction.condition_code(), at.cpu.flags) {
                at.instruction.near_branch_target()
            } else {
                next
            }
        }
        _ => {
            straight(at)?;
            next
        }
    };
    at.cpu.rip = target;
    Ok(())
}

fn straight(at: &mut At<'_>) -> Outcome<()> {
    use Mnemonic as M;
    let mnemonic = at.instruction.mnemonic();
    if at.instruction.has_lock_prefix() {
        return Err(Refusal::Unknown);
    }
    match mnemonic {
        M::Nop | M::Endbr64 | M::Prefetcht0 => return Ok(()),
        M::Lea => {
            let address = at.cpu.address(at.instruction, 1).ok_or(Refusal::Unknown)?;
            return put(at, address);
        }
        M::Mov | M::Add | M::Sub | M::Cmp | M::Test | M::And | M::Or | M::Xor | M::Inc | M::Dec => {}
        _ if at.instruction.condition_code() != ConditionCode::None => return choose(at),
        _ => return Err(Refusal::Unknown),
    }
    if mnemonic == M::Mov {
        let value = operand(at, 1)?;
        return put(at, value);
    }
    let a = operand(at, 0)?;
    let one = matches!(mnemonic, M::Inc | M::Dec);
    let b = if one { 1 } else { operand(at, 1)? };
    let mask = ones(8 * width(at)?);
    let (result, flags) = match mnemonic {
        M::Add | M::Inc => sum(a, b, mask),
        M::Sub | M::Cmp | M::Dec => difference(a, b, mask),
        M::Or => (a | b, 0),
        M::Xor => (a ^ b, 0),
        _ => (a & b, 0),
    };
    let kept = if one { CARRY } else { 0 };
    if !matches!(mnemonic, M::Cmp | M::Test) {
        put(at, result)?;
    }
    let flags = (flags | of_result(result, mask)) & !kept;
    at.cpu.flags = at.cpu.flags & !(STATUS & !kept) | flags;
    Ok(())
}

/// CMOVcc: a 32-bit register is cleared above even if nothing is moved.
fn choose(at: &mut At<'_>) -> Outcome<()> {
    if at.instruction.op_count() != 2 {
        return Err(Refusal::Unknown);
    }
    let (kept, moved) = (operand(at, 0)?, operand(at, 1)?);
    let value = if holds(at.instruction.condition_code(), at.cpu.flags) { moved } else { kept };
    put(at, value)
}

/// Bytes of the operation: 4 or 8.
fn width(at: &At<'_>) -> Outcome<usize> {
    let instruction = at.instruction;
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        OpKind::Memory => instruction.memory_size().size(),
        _ => 0,
    };
    let general = instruction.op0_kind() == OpKind::Memory || instruction.op0_register().is_gpr();
    if general && matches!(bytes, 4 | 8) { Ok(bytes) } else { Err(Refusal::Unknown) }
}

fn operand(at: &At<'_>, operand: u32) -> Outcome<u64> {
    let bytes = width(at)?;
    match at.instruction.op_kind(operand) {
        OpKind::Register if at.instruction.op_register(operand).size() == bytes => at.bits(operand, bytes),
        OpKind::Memory if at.instruction.memory_size().size() == bytes => at.bits(operand, bytes),
        OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Ok(at.instruction.immediate(operand) & ones(8 * bytes)),
        _ => Err(Refusal::Unknown),
    }
}

fn put(at: &mut At<'_>, value: u64) -> Outcome<()> {
    let bytes = width(at)?;
    at.write_bits(bytes, value)
}

fn sum(a: u64, b: u64, mask: u64) -> (u64, u64) {
    let result = a.wrapping_add(b) & mask;
    let sign = mask / 2 + 1;
    let overflow = (a ^ result) & (b ^ result) & sign != 0;
    (result, carries(result < a, overflow, a ^ b ^ result))
}

fn difference(a: u64, b: u64, mask: u64) -> (u64, u64) {
    let result = a.wrapping_sub(b) & mask;
    let sign = mask / 2 + 1;
    let overflow = (a ^ b) & (a ^ result) & sign != 0;
    (result, carries(a < b, overflow, a ^ b ^ result))
}

fn carries(carry: bool, overflow: bool, halves: u64) -> u64 {
    flag(carry, CARRY) | flag(overflow, OVERFLOW) | (halves & ADJUST)
}

fn of_result(result: u64, mask: u64) -> u64 {
    let sign = mask / 2 + 1;
    let even = (result as u8).count_ones().is_multiple_of(2);
    flag(result & mask == 0, ZERO) | flag(result & sign != 0, SIGN) | flag(even, PARITY)
}

fn flag(set: bool, flag: u64) -> u64 {
    if set { flag } else { 0 }
}

fn holds(condition: ConditionCode, flags: u64) -> bool {
    let set = |flag: u64| flags & flag != 0;
    match condition {
        ConditionCode::o => set(OVERFLOW),
        ConditionCode::no => !set(OVERFLOW),
        ConditionCode::b => set(CARRY),
        ConditionCode::ae => !set(CARRY),
        ConditionCode::e => set(ZERO),
        ConditionCode::ne => !set(ZERO),
        ConditionCode::be => set(CARRY | ZERO),
        ConditionCode::a => !set(CARRY | ZERO),
        ConditionCode::s => set(SIGN),
        ConditionCode::ns => !set(SIGN),
        ConditionCode::p => set(PARITY),
        ConditionCode::np => !set(PARITY),
        ConditionCode::l => set(SIGN) != set(OVERFLOW),
        ConditionCode::ge => set(SIGN) == set(OVERFLOW),
        ConditionCode::le => set(ZERO) || set(SIGN) != set(OVERFLOW),
        ConditionCode::g => !set(ZERO) && set(SIGN) == set(OVERFLOW),
        ConditionCode::None => false,
    }
}
