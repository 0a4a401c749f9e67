//! The registers that AVX-512 adds to, and those that its instructions read and write.

use bytemuck::Pod;
use iced_x86::{Instruction, Register};

use crate::tiles::Tiles;

/// 512 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Vector([u64; 8]);

impl Vector {
    /// Bytes of a vector.
    pub const BYTES: usize = 64;

    /// As lanes of one type.
    pub fn lanes<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }

    /// As lanes of one type, to be written.
    pub fn lanes_mut<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.0)
    }

    /// The same value in every lane.
    pub fn filled<T: Pod>(value: T) -> Self {
        let mut vector = Self::default();
        vector.lanes_mut().fill(value);
        vector
    }

    /// The first `bytes`, then zeros.
    #[must_use]
    pub fn cut(mut self, bytes: usize) -> Self {
        self.lanes_mut::<u8>()[bytes..].fill(0);
        self
    }
}

/// What a thread's instructions see.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// zmm0 to zmm31.
    pub zmm: [Vector; 32],
    /// k0 to k7.
    pub k: [u64; 8],
    /// The tile registers.
    pub tiles: Tiles,
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
    pub gpr: [u64; 16],
    /// Address of the next instruction.
    pub rip: u64,
    /// RFLAGS.
    pub flags: u64,
}

impl Cpu {
    /// All zeros.
    pub const ZERO: Self =
        Self { zmm: [Vector([0; 8]); 32], k: [0; 8], tiles: Tiles::ZERO, gpr: [0; 16], rip: 0, flags: 0 };

    /// A general register as far as it is `register` (`eax` is the low half of `rax`).
    pub fn general(&self, register: Register) -> u64 {
        let full = self.gpr[register.full_register().number()];
        match register.size() {
            8 => full,
            4 => full & u64::from(u32::MAX),
            _ => unreachable!("no instruction here reads {register:?}"),
        }
    }

    /// Writes a general register; a 32-bit one clears the upper half, as the processor does.
    pub fn set_general(&mut self, register: Register, value: u64) {
        let kept = if register.size() == 4 { value & u64::from(u32::MAX) } else { value };
        self.gpr[register.full_register().number()] = kept;
    }

    /// Address of the memory operand.
    pub fn address(&self, instruction: &Instruction, operand: u32) -> Option<u64> {
        // The kernels' data are in the flat segments; fs and gs are thread pointers.
        if matches!(instruction.segment_prefix(), Register::FS | Register::GS) {
            return None;
        }
        instruction.virtual_address(operand, 0, |register, _, _| match register {
            Register::DS | Register::ES | Register::SS | Register::CS => Some(0),
            register if register.is_gpr() => Some(self.general(register)),
            _ => None,
        })
    }

    /// Those of zmm0 to zmm15 that have some of bits 511:256 set.
    pub fn upper_halves(&self) -> u16 {
        let set = |(i, zmm): (usize, &Vector)| u16::from(zmm.0[4..] != [0; 4]) << i;
        self.zmm[..16].iter().enumerate().map(set).sum()
    }

    /// Clears bits 511:256 of those of zmm0 to zmm15.
    pub fn clear_upper_halves(&mut self, registers: u16) {
        for (i, zmm) in self.zmm[..16].iter_mut().enumerate() {
            if registers >> i & 1 == 1 {
                zmm.0[4..].fill(0);
            }
        }
    }
}
