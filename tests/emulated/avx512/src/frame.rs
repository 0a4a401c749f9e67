//! The registers of an interrupted thread, in the frame that the kernel made for the signal handler.
//!
//! zmm0 to zmm15 have their low 256 bits there, as the processor knows them: xmm in the legacy part of the XSAVE area, bits
//! 255:128 in its AVX component. All else of AVX-512 is ours.
#![allow(unsafe_code)]

use libc::{
    REG_EFL, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX,
    REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP, ucontext_t,
};

use crate::cpu::Cpu;

/// Places of the general registers in the frame, in the order of their numbers.
const GENERAL: [libc::c_int; 16] = [
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
    REG_R12, REG_R13, REG_R14, REG_R15,
];

/// Offsets in the XSAVE area; that of the AVX component is what every processor with AVX reports.
const CONTROL: usize = 24;
const XMM: usize = 160;
const MAGIC: usize = 464;
const PRESENT: usize = 512;
const YMM: usize = 576;

/// Marks a frame that holds more than the legacy part.
const EXTENDED: u32 = 0x4650_5853;
/// Bits of SSE and AVX among the components that are present.
const SSE_AND_AVX: u64 = 0b110;
const AVX: u64 = 0b100;
/// MXCSR at start: all exceptions masked, to nearest even, subnormal numbers kept. Flags are the six lowest bits.
const USUAL_CONTROL: u32 = 0x1f80;

/// The frame of one signal.
pub struct Frame<'a> {
    general: &'a mut [i64; 23],
    area: *mut u8,
}

impl<'a> Frame<'a> {
    /// The frame behind the third argument of a signal handler.
    ///
    /// # Safety
    /// `context` is that argument, on Linux of x86-64 with AVX, and used once.
    pub unsafe fn new(context: *mut libc::c_void) -> Self {
        // SAFETY: the caller's promise; the kernel puts the XSAVE area behind `fpregs`.
        unsafe {
            let context: &'a mut ucontext_t = &mut *context.cast();
            let area = context.uc_mcontext.fpregs.cast();
            Self { general: &mut context.uc_mcontext.gregs, area }
        }
    }

    fn word<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: the offsets of this file lie within the area once `usual` has found that it is extended.
        unsafe { self.area.add(offset).cast::<T>().read_unaligned() }
    }

    fn set_word<T: Copy>(&mut self, offset: usize, value: T) {
        // SAFETY: as above.
        unsafe { self.area.add(offset).cast::<T>().write_unaligned(value) }
    }

    /// Whether the frame has an AVX component, and arithmetic rounds as `lanes` does.
    pub fn usual(&self) -> bool {
        let control: u32 = self.word(CONTROL);
        self.word::<u32>(MAGIC) == EXTENDED && control & !0x3f == USUAL_CONTROL
    }

    /// Takes what the processor has into `cpu`.
    pub fn load(&self, cpu: &mut Cpu) {
        for (register, place) in cpu.gpr.iter_mut().zip(GENERAL) {
            *register = self.general[place as usize].cast_unsigned();
        }
        cpu.rip = self.general[REG_RIP as usize].cast_unsigned();
        cpu.flags = self.general[REG_EFL as usize].cast_unsigned();
        let present = self.word::<u64>(PRESENT) & AVX != 0;
        for (i, zmm) in cpu.zmm[..16].iter_mut().enumerate() {
            let upper: [u64; 2] = if present { self.word(YMM + 16 * i) } else { [0; 2] };
            let lanes = zmm.lanes_mut::<u64>();
            lanes[..2].copy_from_slice(&self.word::<[u64; 2]>(XMM + 16 * i));
            lanes[2..4].copy_from_slice(&upper);
        }
    }

    /// Gives back to the processor what it has of `cpu`.
    pub fn store(&mut self, cpu: &Cpu) {
        for (register, place) in cpu.gpr.iter().zip(GENERAL) {
            self.general[place as usize] = register.cast_signed();
        }
        self.general[REG_RIP as usize] = cpu.rip.cast_signed();
        self.general[REG_EFL as usize] = cpu.flags.cast_signed();
        for (i, zmm) in cpu.zmm[..16].iter().enumerate() {
            let lanes = zmm.lanes::<u64>();
            self.set_word(XMM + 16 * i, [lanes[0], lanes[1]]);
            self.set_word(YMM + 16 * i, [lanes[2], lanes[3]]);
        }
        let present = self.word::<u64>(PRESENT);
        self.set_word(PRESENT, present | SSE_AND_AVX);
    }
}
