//! Bits 511:256 of zmm0 to zmm15 across instructions that the processor runs itself, and registers that are a thread's own.
#![allow(clippy::unwrap_used, missing_docs)]

mod program;

use iced_x86::code_asm::*;
use program::{Block, Program, Random};

/// zmm1 is the second operand; after `between` it is written over the first.
fn around(between: impl FnOnce(&mut CodeAssembler)) -> Program {
    Program::new(|a| {
        a.vmovups(zmm1, zmmword_ptr(rdi) + 64).unwrap();
        between(a);
        a.vmovups(zmmword_ptr(rdi), zmm1).unwrap();
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    })
}

fn block() -> Block {
    let mut block = Random(7).block();
    // Whole numbers, so that arithmetic has nothing special about it.
    block.0[1] = bytemuck::cast(std::array::from_fn::<f32, 16, _>(|l| l as f32 + 1.0));
    block
}

fn upper(block: &Block, i: usize) -> &[u64] {
    &block.0[i][4..]
}

#[test]
fn a_vex_instruction_clears_the_upper_half_of_what_it_writes() {
    // VSQRTPS is one that the emulator does not know: the processor runs it.
    let found = around(|a| a.vsqrtps(ymm1, ymm2).unwrap()).run(block());
    assert_eq!(upper(&found, 0), [0; 4]);
    let found = around(|a| a.vaddps(ymm1, ymm1, ymm1).unwrap()).run(block());
    assert_eq!(upper(&found, 0), [0; 4]);
    let found = around(|a| a.vsqrtss(xmm1, xmm1, xmm1).unwrap()).run(block());
    assert_eq!(upper(&found, 0), [0; 4]);
}

#[test]
fn it_does_so_although_the_lower_half_stays_the_same() {
    let found = around(|a| a.vpermilpd(ymm1, ymm1, 0b1010).unwrap()).run(block());
    assert_eq!(found.0[0][..4], block().0[1][..4]);
    assert_eq!(upper(&found, 0), [0; 4]);
}

#[test]
fn other_registers_and_sse_instructions_keep_it() {
    let found = around(|a| {
        a.vsqrtps(ymm2, ymm1).unwrap();
        a.vtestps(ymm1, ymm1).unwrap();
        a.vmovups(ymmword_ptr(rdi) + 192, ymm1).unwrap();
        a.sqrtps(xmm1, xmm1).unwrap();
    })
    .run(block());
    assert_eq!(upper(&found, 0), upper(&block(), 1));
    assert_ne!(found.0[0][..2], block().0[1][..2]);
}

#[test]
fn vzeroupper_clears_all_of_them_and_no_other_register() {
    let found = Program::new(|a| {
        a.vmovups(zmm1, zmmword_ptr(rdi) + 64).unwrap();
        a.vmovups(zmm17, zmmword_ptr(rdi) + 64).unwrap();
        a.vzeroupper().unwrap();
        a.vmovups(zmmword_ptr(rdi), zmm1).unwrap();
        a.vmovups(zmmword_ptr(rdi) + 128, zmm17).unwrap();
        a.ret().unwrap();
    })
    .run(block());
    assert_eq!(found.0[0][..2], block().0[1][..2]);
    assert_eq!(found.0[0][2..], [0; 6]);
    assert_eq!(found.0[2], block().0[1]);
}

/// Calls a function that is out of the emulator's sight, through a register, in a loop that counts down `rcx`.
#[test]
fn halves_follow_the_program_through_calls_and_loops() {
    for cleared_in_turn in [None, Some(1), Some(3)] {
        let found = Program::new(|a| {
            let (mut turn, mut skip, mut function, mut end) =
                (a.create_label(), a.create_label(), a.create_label(), a.create_label());
            a.vmovups(zmm1, zmmword_ptr(rdi) + 64).unwrap();
            a.lea(rax, ptr(function)).unwrap();
            a.mov(ecx, 3).unwrap();
            a.set_label(&mut turn).unwrap();
            a.call(rax).unwrap();
            a.dec(ecx).unwrap();
            a.jne(turn).unwrap();
            a.vmovups(zmmword_ptr(rdi), zmm1).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut function).unwrap();
            a.imul_3(edx, ecx, 1).unwrap();
            a.cmp(edx, cleared_in_turn.unwrap_or(9)).unwrap();
            a.jne(skip).unwrap();
            a.vsqrtps(ymm1, ymm1).unwrap();
            a.set_label(&mut skip).unwrap();
            a.nop().unwrap();
            a.ret().unwrap();
            a.set_label(&mut end).unwrap();
            a.vzeroupper().unwrap();
            a.ret().unwrap();
        })
        .run(block());
        let expected =
            if cleared_in_turn.is_some() { [0; 4] } else { upper(&block(), 1).try_into().unwrap() };
        assert_eq!(upper(&found, 0), expected, "cleared in turn {cleared_in_turn:?}");
    }
}

/// A half that nothing reads again is dropped; one that is read on one way only must not be.
#[test]
fn a_half_that_only_one_branch_reads_is_kept_for_it() {
    for taken in [0, 1] {
        let mut block = block();
        block.0[2][0] = taken;
        let found = Program::new(|a| {
            let (mut other, mut end) = (a.create_label(), a.create_label());
            a.vmovups(zmm1, zmmword_ptr(rdi) + 64).unwrap();
            a.imul_3(edx, dword_ptr(rdi) + 128, 1).unwrap();
            a.test(edx, edx).unwrap();
            a.je(other).unwrap();
            a.vmovups(zmmword_ptr(rdi), zmm1).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut other).unwrap();
            a.vsqrtps(ymm1, ymm1).unwrap();
            a.vmovups(zmmword_ptr(rdi), zmm1).unwrap();
            a.set_label(&mut end).unwrap();
            a.vzeroupper().unwrap();
            a.ret().unwrap();
        })
        .run(block);
        let expected = if taken == 1 { upper(&block, 1) } else { &[0; 4] };
        assert_eq!(upper(&found, 0), expected);
    }
}

#[test]
fn registers_are_a_threads_own() {
    let sums = Program::new(|a| {
        let mut turn = a.create_label();
        a.vpxord(zmm20, zmm20, zmm20).unwrap();
        a.vmovups(zmm1, zmmword_ptr(rdi) + 64).unwrap();
        a.mov(ecx, 2000).unwrap();
        a.set_label(&mut turn).unwrap();
        a.vpaddq(zmm20, zmm20, zmm1).unwrap();
        // Unknown to the emulator: every turn has a fault of its own.
        a.imul_3(edx, ecx, 1).unwrap();
        a.dec(ecx).unwrap();
        a.jne(turn).unwrap();
        a.vmovups(zmmword_ptr(rdi), zmm20).unwrap();
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    });
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let block = Random(thread).block();
                let expected = block.0[1].map(|v| v.wrapping_mul(2000));
                assert_eq!(sums.run(block).0[0], expected);
            });
        }
    });
}
