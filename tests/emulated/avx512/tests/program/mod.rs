//! Machine code made in memory, to be called: what the processor does is what the emulator is compared with.
#![allow(unsafe_code, dead_code)]

use iced_x86::code_asm::CodeAssembler;

/// Space for the operands and results of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Block(pub [[u64; 8]; 4]);

impl Block {
    /// Operand `i` in lanes of 32 bits.
    pub fn words(&self, i: usize) -> [u32; 16] {
        bytemuck::cast(self.0[i])
    }
}

/// A function of one block, in memory of its own that is never given back: addresses are not used twice.
#[derive(Clone, Copy, Debug)]
pub struct Program(extern "C" fn(*mut Block));

impl Program {
    /// Assembles; the code finds the block in `rdi` and must return with upper halves of ymm clear.
    pub fn new(write: impl FnOnce(&mut CodeAssembler)) -> Self {
        const BYTES: usize = 4096;
        emulated_avx512::trap::install();
        let mut assembler = CodeAssembler::new(64).unwrap();
        write(&mut assembler);
        // SAFETY: a fresh private mapping, filled before it is called; what is in it is the assembled function.
        unsafe {
            let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), BYTES, all, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            let code = assembler.assemble(page as u64).unwrap();
            assert!(code.len() < BYTES);
            std::ptr::copy_nonoverlapping(code.as_ptr(), page.cast(), code.len());
            Self(std::mem::transmute::<*mut libc::c_void, extern "C" fn(*mut Block)>(page))
        }
    }

    /// Runs on a copy of the block and gives it back.
    pub fn run(&self, mut block: Block) -> Block {
        (self.0)(&raw mut block);
        block
    }
}

/// Random numbers of a fixed sequence.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An f32: any bits, a number of moderate size, a subnormal one, or a special one.
    fn single(&mut self) -> u32 {
        let (kind, bits) = (self.bits() % 8, self.bits() as u32);
        let special =
            [0, 0x7f80_0000, 0x7fc0_1234, 0x7fa0_0001, 0x0080_0000, 0x7f7f_ffff, 0x3f80_0000, 0x4b80_0000];
        match kind {
            0 | 1 => bits,
            2 => bits & 0x807f_ffff,
            3 => special[bits as usize % special.len()] | bits & 0x8000_0000,
            _ => (bits & 0x80ff_ffff) | (0x3e00_0000 + (bits >> 26 << 23)),
        }
    }

    /// An f64 likewise.
    fn double(&mut self) -> u64 {
        let (kind, bits) = (self.bits() % 8, self.bits());
        let special = [0, 0x7ff << 52, (0xfff << 51) | 5, (0x7ff << 52) | 9, 1 << 52, 0x3ff << 52];
        match kind {
            0 | 1 => bits,
            2 => bits & 0x800f_ffff_ffff_ffff,
            3 => special[bits as usize % special.len()] | bits & (1 << 63),
            _ => (bits & 0x801f_ffff_ffff_ffff) | (0x3fd0_0000_0000_0000 + (bits >> 60 << 52)),
        }
    }

    /// A vector: floats of one width or the other, or any bits.
    pub fn vector(&mut self) -> [u64; 8] {
        match self.bits() % 3 {
            0 => std::array::from_fn(|_| u64::from(self.single()) | u64::from(self.single()) << 32),
            1 => std::array::from_fn(|_| self.double()),
            _ => std::array::from_fn(|_| self.bits()),
        }
    }

    /// A block of them.
    pub fn block(&mut self) -> Block {
        Block(std::array::from_fn(|_| self.vector()))
    }
}
