//! From a fault to the next instruction that the processor can run.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Formatter, Instruction, NasmFormatter};

use crate::code;
use crate::cpu::Cpu;
use crate::execute::{Refusal, execute};
use crate::frame::Frame;

/// RFLAGS: a trap after every instruction.
const TRAP_FLAG: u64 = 1 << 8;

/// Faults, traps after single instructions, and instructions executed, of all threads.
static COUNTS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

thread_local! {
    static CPU: UnsafeCell<Cpu> = const { UnsafeCell::new(Cpu::ZERO) };
}

/// Faults, traps after single instructions, and instructions executed so far, of all threads.
pub fn counts() -> [u64; 3] {
    COUNTS.each_ref().map(|count| count.load(Ordering::Relaxed))
}

/// Makes this process execute AVX-512 instructions.
///
/// # Panics
/// If the system refuses the signal handlers.
pub fn install() {
    // Tables that are made on first use are made here, not in a signal handler.
    // SAFETY: a function is code.
    let entry = unsafe { code::decode(install as *const () as u64) };
    let _ = text(&entry.instruction);
    for signal in [libc::SIGILL, libc::SIGTRAP] {
        // SAFETY: a zeroed action is a valid one, completed below; the handler has the type that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
        }
    }
}

extern "C" fn on_signal(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel calls with a context; the thread's registers are borrowed once, as no signal comes within this
    // handler but one that ends the process.
    let (mut frame, cpu) = unsafe { (Frame::new(context), CPU.with(|cpu| &mut *cpu.get())) };
    frame.load(cpu);
    let stepped = signal == libc::SIGTRAP;
    if stepped && cpu.flags & TRAP_FLAG == 0 {
        fail(cpu, &format!("signal {signal} that is none of ours"));
    }
    if !frame.usual() {
        fail(cpu, "no AVX state in the signal frame, or rounding is not as usual");
    }
    let executed = run(cpu);
    if !stepped && executed == 0 {
        let instruction = code::at(cpu.rip).instruction;
        fail(cpu, &format!("no instruction of AVX-512: {}", text(&instruction)));
    }
    COUNTS[usize::from(stepped)].fetch_add(1, Ordering::Relaxed);
    COUNTS[2].fetch_add(executed, Ordering::Relaxed);
    hand_over(cpu);
    frame.store(cpu);
}

/// Instructions that the processor has, executed here in the hope of one that it has not.
const HOPE: u32 = 24;

/// Executes instructions that fault, and those between that are known; says how many faults that has saved, and one more.
fn run(cpu: &mut Cpu) -> u64 {
    let (mut executed, mut hope) = (0, HOPE);
    loop {
        let entry = code::at(cpu.rip);
        match execute(cpu, &entry.instruction) {
            Ok(()) if entry.faults => (executed, hope) = (executed + 1, HOPE),
            Ok(()) => hope = hope.saturating_sub(1),
            Err(refusal) if entry.faults => refuse(cpu, &entry.instruction, refusal),
            Err(_) => return executed,
        }
        if hope == 0 && !must_step(cpu) {
            return executed;
        }
    }
}

fn refuse(cpu: &Cpu, instruction: &Instruction, refusal: Refusal) -> ! {
    let why = match refusal {
        Refusal::Unknown => "unknown instruction",
        Refusal::Form => "instruction in an unknown form",
        Refusal::Misaligned => "misaligned operand",
    };
    fail(cpu, &format!("{why}: {}", text(instruction)))
}

/// Whether the processor could clear a half that matters before it comes to a fault. Halves that do not matter are cleared.
fn must_step(cpu: &mut Cpu) -> bool {
    let set = cpu.upper_halves();
    if set == 0 {
        return false;
    }
    let future = code::future(cpu.rip);
    cpu.clear_upper_halves(set & future.dead);
    set & !future.dead & future.cleared != 0
}

/// Lets the processor go on: to the next fault, or by one instruction.
fn hand_over(cpu: &mut Cpu) {
    cpu.flags &= !TRAP_FLAG;
    if must_step(cpu) {
        cpu.clear_upper_halves(code::at(cpu.rip).uppers.written);
        cpu.flags |= TRAP_FLAG;
    }
}

fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    NasmFormatter::new().format(instruction, &mut text);
    text
}

/// Says why and where, and ends the process.
fn fail(cpu: &Cpu, why: &str) -> ! {
    let line = format!("emulated AVX-512: {why}, at {:#x}\n", cpu.rip);
    // SAFETY: `line` is so many readable bytes.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
    std::process::abort();
}
