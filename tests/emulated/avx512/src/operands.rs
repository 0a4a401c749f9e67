//! Operands of an instruction: broadcast and masked on the way in, merged or zeroed on the way out.
#![allow(unsafe_code)]

use bytemuck::Pod;
use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{Cpu, Vector};
use crate::execute::{Outcome, Refusal};

/// Copies from memory of the program.
pub(crate) fn read(address: u64, to: &mut [u8]) {
    // SAFETY: the program executes an instruction that reads these bytes; if it may not, it faults here as there.
    unsafe { copy(address as *const u8, to.as_mut_ptr(), to.len()) }
}

/// Copies to memory of the program.
pub(crate) fn write(address: u64, from: &[u8]) {
    // SAFETY: the program executes an instruction that writes these bytes; if it may not, it faults here as there.
    unsafe { copy(from.as_ptr(), address as *mut u8, from.len()) }
}

/// Copies without `memcpy`: the program may have one of its own, that of a sanitizer for instance.
///
/// # Safety
/// `bytes` bytes can be read and written there, and do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    /// The same of a known number.
    unsafe fn known<const BYTES: usize>(from: *const u8, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; BYTES]>().write_unaligned(from.cast::<[u8; BYTES]>().read_unaligned()) }
    }
    // SAFETY: the caller's promise.
    unsafe {
        match bytes {
            64 => known::<64>(from, to),
            32 => known::<32>(from, to),
            16 => known::<16>(from, to),
            8 => known::<8>(from, to),
            4 => known::<4>(from, to),
            2 => known::<2>(from, to),
            1 => known::<1>(from, to),
            _ => unreachable!("no operand has {bytes} bytes"),
        }
    }
}

/// Reads 1, 2, 4 or 8 bytes at once: another thread may write them.
fn read_word(address: u64, bytes: usize) -> u64 {
    // SAFETY: as in `read`.
    unsafe {
        match bytes {
            1 => u64::from((address as *const u8).read()),
            2 => u64::from((address as *const u16).read_unaligned()),
            4 => u64::from((address as *const u32).read_unaligned()),
            _ => (address as *const u64).read_unaligned(),
        }
    }
}

/// Writes 1, 2, 4 or 8 bytes at once: another thread may read them.
fn write_word(address: u64, bytes: usize, value: u64) {
    // SAFETY: as in `write`.
    unsafe {
        match bytes {
            1 => (address as *mut u8).write(value as u8),
            2 => (address as *mut u16).write_unaligned(value as u16),
            4 => (address as *mut u32).write_unaligned(value as u32),
            _ => (address as *mut u64).write_unaligned(value),
        }
    }
}

/// An instruction at work.
pub(crate) struct At<'a> {
    pub(crate) cpu: &'a mut Cpu,
    pub(crate) instruction: &'a Instruction,
}

impl At<'_> {
    /// The write-mask, if there is one.
    pub(crate) fn mask(&self) -> Option<u64> {
        let register = self.instruction.op_mask();
        (register != Register::None).then(|| self.cpu.k[register.number()])
    }

    /// Refuses a write-mask where none is expected.
    pub(crate) fn unmasked(&self) -> Outcome<()> {
        if self.mask().is_some() { Err(Refusal::Form) } else { Ok(()) }
    }

    pub(crate) fn address(&self, operand: u32) -> Outcome<u64> {
        self.cpu.address(self.instruction, operand).ok_or(Refusal::Form)
    }

    /// Bytes of the memory operand; an aligned move insists on its alignment.
    fn memory(&self, operand: u32) -> Outcome<(u64, usize)> {
        use iced_x86::Mnemonic::{Vmovapd, Vmovaps, Vmovdqa32, Vmovdqa64};
        let (address, bytes) = (self.address(operand)?, self.instruction.memory_size().size());
        let aligned = matches!(self.instruction.mnemonic(), Vmovaps | Vmovapd | Vmovdqa32 | Vmovdqa64);
        if aligned && !address.is_multiple_of(bytes as u64) {
            return Err(Refusal::Misaligned);
        }
        Ok((address, bytes))
    }

    /// A vector operand; from memory, lanes of `T` that the mask leaves out are zero and not touched.
    pub(crate) fn vector<T: Pod>(&self, operand: u32) -> Outcome<Vector> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => Ok(self.cpu.zmm[self.vector_number(operand)?]),
            OpKind::Memory if self.instruction.is_broadcast() => {
                let mut value = T::zeroed();
                read(self.address(operand)?, bytemuck::bytes_of_mut(&mut value));
                Ok(Vector::filled(value))
            }
            OpKind::Memory => {
                let (address, bytes) = self.memory(operand)?;
                let mut vector = Vector::default();
                let lanes = vector.lanes_mut::<u8>()[..bytes].chunks_mut(size_of::<T>()).enumerate();
                match self.mask() {
                    None => read(address, &mut vector.lanes_mut()[..bytes]),
                    Some(mask) => lanes.filter(|(l, _)| mask >> l & 1 == 1).for_each(|(l, lane)| {
                        read(address + (l * size_of::<T>()) as u64, lane);
                    }),
                }
                Ok(vector)
            }
            _ => Err(Refusal::Form),
        }
    }

    fn vector_number(&self, operand: u32) -> Outcome<usize> {
        let register = self.instruction.op_register(operand);
        if register.is_vector_register() { Ok(register.number()) } else { Err(Refusal::Form) }
    }

    /// Bytes of the vector length, as the register operand says it.
    pub(crate) fn length(&self, operand: u32) -> usize {
        self.instruction.op_register(operand).size()
    }

    /// Writes a vector to operand 0 under the mask; a register is zero beyond the vector length.
    pub(crate) fn write_vector<T: Pod>(&mut self, result: Vector) -> Outcome<()> {
        let lane = size_of::<T>();
        let mask = self.mask();
        let active = |l: usize| mask.is_none_or(|mask| mask >> l & 1 == 1);
        if self.instruction.op0_kind() == OpKind::Memory {
            let (address, bytes) = self.memory(0)?;
            if mask.is_none() {
                write(address, &result.lanes()[..bytes]);
                return Ok(());
            }
            for (l, value) in
                result.lanes::<u8>()[..bytes].chunks(lane).enumerate().filter(|(l, _)| active(*l))
            {
                write(address + (l * lane) as u64, value);
            }
            return Ok(());
        }
        let (number, length) = (self.vector_number(0)?, self.length(0));
        let zeroing = self.instruction.zeroing_masking();
        let kept = if zeroing { Vector::default() } else { self.cpu.zmm[number] };
        let mut merged = result;
        if mask.is_some() {
            for (l, (to, from)) in merged.lanes_mut::<T>().iter_mut().zip(kept.lanes::<T>()).enumerate() {
                if !active(l) {
                    *to = *from;
                }
            }
        }
        self.cpu.zmm[number] = merged.cut(length);
        Ok(())
    }

    /// Writes a register that is operand 0, whatever the mask.
    pub(crate) fn write_register(&mut self, result: Vector) -> Outcome<()> {
        let (number, length) = (self.vector_number(0)?, self.length(0));
        self.cpu.zmm[number] = result.cut(length);
        Ok(())
    }

    /// Writes lane 0 of an xmm register under bit 0 of the mask; the rest of its 128 bits is that of `rest`.
    pub(crate) fn write_scalar<T: Pod>(&mut self, value: T, rest: Vector) -> Outcome<()> {
        let number = self.vector_number(0)?;
        let mut result = rest;
        let active = self.mask().is_none_or(|mask| mask & 1 == 1);
        result.lanes_mut::<T>()[0] = if active {
            value
        } else if self.instruction.zeroing_masking() {
            T::zeroed()
        } else {
            self.cpu.zmm[number].lanes::<T>()[0]
        };
        self.cpu.zmm[number] = result.cut(16);
        Ok(())
    }

    /// Bits of a general register, a mask register or memory.
    pub(crate) fn bits(&self, operand: u32, bytes: usize) -> Outcome<u64> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let register = self.instruction.op_register(operand);
                if register.is_k() {
                    Ok(self.cpu.k[register.number()])
                } else if register.is_gpr() {
                    Ok(self.cpu.general(register))
                } else {
                    Ok(self.cpu.zmm[self.vector_number(operand)?].lanes::<u64>()[0])
                }
            }
            OpKind::Memory => Ok(read_word(self.address(operand)?, bytes)),
            _ => Err(Refusal::Form),
        }
    }

    /// Writes the low `bytes` of `value` to a general register or a mask register (zero beyond), or to memory.
    pub(crate) fn write_bits(&mut self, bytes: usize, value: u64) -> Outcome<()> {
        let kept = value & ones(8 * bytes);
        if self.instruction.op0_kind() == OpKind::Memory {
            write_word(self.address(0)?, bytes, kept);
            return Ok(());
        }
        let register = self.instruction.op0_register();
        if register.is_k() {
            self.cpu.k[register.number()] = kept;
        } else if register.is_gpr() {
            self.cpu.set_general(register, kept);
        } else {
            return Err(Refusal::Form);
        }
        Ok(())
    }

    /// Writes a mask that compared lanes of a vector of `length` bytes; the write-mask takes bits away.
    pub(crate) fn write_comparison<T: Pod>(
        &mut self,
        length: usize,
        holds: impl Fn(usize) -> bool,
    ) -> Outcome<()> {
        let lanes = length / size_of::<T>();
        let found = (0..lanes).filter(|&l| holds(l)).fold(0, |mask, l| mask | 1 << l);
        let mask = found & self.mask().unwrap_or(u64::MAX);
        self.write_bits(8, mask)
    }
}

/// The lowest `n` bits.
pub(crate) fn ones(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}
