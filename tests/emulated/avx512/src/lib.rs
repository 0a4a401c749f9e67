//! Executes instructions of AVX-512 and of tile registers (AMX) in software, where the processor lacks them: kernels are
//! tested as they are compiled.
//!
//! 1. An instruction with an EVEX prefix, of mask registers or of tile registers faults. The handler of SIGILL ([`trap`])
//!    finds the registers in the frame of the signal ([`frame`]), decodes ([`code`]), and executes ([`execute`], [`lanes`],
//!    [`tiles`]) this instruction and those that follow, as long as it knows them and comes to others that would fault.
//! 2. The processor keeps the low 256 bits of zmm0 to zmm15; each thread's [`cpu::Cpu`] keeps the rest.
//! 3. What the processor runs in between can change the rest as well: an instruction with a VEX prefix clears bits 511:256 of
//!    the register that it writes. So the code that comes next is walked ([`future`]). Halves that no way reads again are
//!    dropped. Where one that matters could be cleared before the next fault, the processor runs one instruction at a time,
//!    by the trap flag, and what each clears is cleared here.
//!
//! All that a program can observe is then as on a processor with AVX-512, but for: flags of floating-point exceptions, which
//! are not raised; arithmetic that does not round to nearest with subnormal numbers kept, which is refused; asynchronous
//! signal handlers, which share the registers of the thread they interrupt; gathers with a VEX prefix, whose mask register
//! keeps its upper half; code that changes while it runs; and PUSHF, which shows the trap flag. Instructions that are not
//! known end the process with their text.
//!
//! Loaded with `LD_PRELOAD` it works from the start of the process; with `MICROTOME_EMULATED_COUNTS` set, it says at the end
//! what it did.

pub mod code;
pub mod cpu;
pub mod execute;
pub mod frame;
pub mod future;
mod glue;
pub mod lanes;
mod movements;
mod operands;
mod preload;
mod scalars;
mod tiles;
pub mod trap;
