//! Decoded instructions by address, filled without a lock or an allocation: they are looked up from signal handlers.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{
    Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register,
};

use crate::future::Future;

/// What an instruction does to bits 511:256 of zmm0 to zmm15, a bit per register, on a processor with AVX-512.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uppers {
    /// Those that it may read.
    pub read: u16,
    /// Those that it writes, or clears, whatever they were.
    pub written: u16,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The instruction.
    pub instruction: Instruction,
    /// Whether it faults where AVX-512 and AMX are lacking: an EVEX prefix, or an operation of mask or tile registers.
    pub faults: bool,
    /// What it does to the upper halves.
    pub uppers: Uppers,
}

/// Decodes what is at an address.
///
/// # Safety
/// The address is that of code of this process.
pub unsafe fn decode(address: u64) -> Entry {
    /// No instruction is longer.
    const LONGEST: usize = 15;
    /// Reading stops at the end of a page where the instruction may end too.
    const PAGE: u64 = 4096;
    let in_page = (PAGE - address % PAGE) as usize;
    let mut decoded = Instruction::default();
    for bytes in [LONGEST.min(in_page), LONGEST] {
        // SAFETY: within the page of the code; beyond it only if the instruction goes on there.
        let code = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
        decoded = Decoder::with_ip(64, code, address, DecoderOptions::NONE).decode();
        if !decoded.is_invalid() {
            break;
        }
    }
    entry(decoded)
}

fn entry(instruction: Instruction) -> Entry {
    let registers = |is: fn(Register) -> bool| {
        (0..instruction.op_count()).any(|operand| is(instruction.op_register(operand)))
    };
    let shapes = matches!(instruction.mnemonic(), Mnemonic::Ldtilecfg | Mnemonic::Tilerelease);
    let lacking = shapes || registers(Register::is_k) || registers(Register::is_tmm);
    let (faults, uppers) = match instruction.code().encoding() {
        EncodingKind::EVEX => (true, uppers(&instruction)),
        EncodingKind::VEX => (lacking, uppers(&instruction)),
        // SSE reads and writes xmm and keeps what is above.
        _ => (false, Uppers::default()),
    };
    Entry { instruction, faults, uppers }
}

fn uppers(instruction: &Instruction) -> Uppers {
    if matches!(instruction.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        return Uppers { read: 0, written: u16::MAX };
    }
    let bit = |register: Register| {
        let low = register.is_vector_register() && register.number() < 16;
        if low { 1_u16 << register.number() } else { 0 }
    };
    let whole = |register: Register| if register.is_zmm() { bit(register) } else { 0 };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let mut uppers = Uppers { read: whole(instruction.memory_index()), written: 0 };
    for operand in 0..instruction.op_count() {
        let register = instruction.op_register(operand);
        match info.op_access(operand) {
            OpAccess::None | OpAccess::NoMemAccess => {}
            OpAccess::Write => uppers.written |= bit(register),
            _ => uppers.read |= whole(register),
        }
    }
    // A scalar or shorter form that reads what it writes, still clears what is beyond its length.
    let target = instruction.op0_register();
    let writes = !matches!(
        info.op0_access(),
        OpAccess::None | OpAccess::NoMemAccess | OpAccess::Read | OpAccess::CondRead
    );
    if writes && !target.is_zmm() {
        uppers.written |= bit(target);
    }
    // Under a mask that merges, lanes of the target survive.
    if instruction.op_mask() != Register::None && !instruction.zeroing_masking() {
        uppers.read |= whole(target);
    }
    uppers
}

/// Slots of the cache; a power of two.
const SLOTS: usize = 1 << 16;
/// Slots that an address may be in.
const PROBES: usize = 16;

const FREE: u64 = 0;
/// A slot that a thread is filling.
const TAKEN: u64 = 1;

struct Cache {
    addresses: [AtomicU64; SLOTS],
    entries: [UnsafeCell<MaybeUninit<Entry>>; SLOTS],
    futures: [AtomicU64; SLOTS],
}

// SAFETY: an entry is written by the thread that took its slot, before the address is published, and never again.
unsafe impl Sync for Cache {}

static CACHE: Cache = Cache {
    addresses: [const { AtomicU64::new(FREE) }; SLOTS],
    entries: [const { UnsafeCell::new(MaybeUninit::uninit()) }; SLOTS],
    futures: [const { AtomicU64::new(0) }; SLOTS],
};

/// The slot of an address that is in the cache, or into which it is put; none where its slots are full.
fn slot(address: u64) -> Option<usize> {
    let start = (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize;
    for slot in (0..PROBES).map(|probe| (start + probe) % SLOTS) {
        let held = CACHE.addresses[slot].load(Ordering::Acquire);
        if held == address {
            return Some(slot);
        }
        let take = || {
            CACHE.addresses[slot].compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        if held == FREE && take() {
            // SAFETY: the slot is ours until its address is published; the address is that of code, see `at`.
            unsafe { (*CACHE.entries[slot].get()).write(decode(address)) };
            CACHE.addresses[slot].store(address, Ordering::Release);
            return Some(slot);
        }
    }
    None
}

/// The instruction at an address that the program executes at, or can come to from there.
pub fn at(address: u64) -> Entry {
    match slot(address) {
        // SAFETY: the slot holds the address, so its entry has been written.
        Some(slot) => unsafe { (*CACHE.entries[slot].get()).assume_init() },
        // SAFETY: the address is that of code.
        None => unsafe { decode(address) },
    }
}

/// What comes after an address, see [`Future`].
pub fn future(address: u64) -> Future {
    let Some(slot) = slot(address) else { return Future::of(address) };
    if let Some(known) = Future::from_bits(CACHE.futures[slot].load(Ordering::Relaxed)) {
        return known;
    }
    let future = Future::of(address);
    CACHE.futures[slot].store(future.to_bits(), Ordering::Relaxed);
    future
}
