//! Instructions against their twins that the processor has: the form with 512 bits does twice what that with 256 does.
//! The one runs through the fault handler, the other by itself.
#![allow(clippy::unwrap_used, missing_docs)]

mod program;

use iced_x86::code_asm::*;
use program::{Block, Program, Random};

const ROUNDS: usize = 400;

/// `zmm0` becomes an operation of zmm0, zmm1 and zmm2.
fn long(operation: impl FnOnce(&mut CodeAssembler)) -> Program {
    Program::new(|a| {
        a.set_prefer_vex(false);
        for (i, zmm) in [zmm0, zmm1, zmm2].into_iter().enumerate() {
            a.vmovups(zmm, zmmword_ptr(rdi) + 64 * i).unwrap();
        }
        operation(a);
        a.vmovups(zmmword_ptr(rdi), zmm0).unwrap();
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    })
}

/// The same of ymm0, ymm1 and ymm2, for each half.
fn halves(operation: impl Fn(&mut CodeAssembler)) -> Program {
    Program::new(|a| {
        for half in [0, 32] {
            for (i, ymm) in [ymm0, ymm1, ymm2].into_iter().enumerate() {
                a.vmovups(ymm, ymmword_ptr(rdi) + (64 * i + half)).unwrap();
            }
            operation(a);
            a.vmovups(ymmword_ptr(rdi) + half, ymm0).unwrap();
        }
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    })
}

fn compare(name: &str, ours: Program, twin: Program, block: impl Fn(&mut Random) -> Block) {
    let mut random = Random(1);
    for _ in 0..ROUNDS {
        let block = block(&mut random);
        let (found, expected) = (ours.run(block).words(0), twin.run(block).words(0));
        let show = || (0..4).map(|i| block.words(i)).collect::<Vec<_>>();
        assert_eq!(found, expected, "{name}: {found:08x?} instead of {expected:08x?} from {:08x?}", show());
    }
}

macro_rules! twins {
    ($($name:ident: $long:ident = $short:ident($($immediate:expr)?);)*) => {
        $(#[test]
        fn $name() {
            let ours = long(|a| a.$long(zmm0, zmm1, zmm2 $(, $immediate)?).unwrap());
            let twin = halves(|a| a.$short(ymm0, ymm1, ymm2 $(, $immediate)?).unwrap());
            compare(stringify!($long), ours, twin, Random::block);
        })*
    };
}

twins! {
    sums_of_singles: vaddps = vaddps();
    sums_of_doubles: vaddpd = vaddpd();
    differences_of_singles: vsubps = vsubps();
    differences_of_doubles: vsubpd = vsubpd();
    products_of_singles: vmulps = vmulps();
    products_of_doubles: vmulpd = vmulpd();
    larger_singles: vmaxps = vmaxps();
    larger_doubles: vmaxpd = vmaxpd();
    smaller_singles: vminps = vminps();
    smaller_doubles: vminpd = vminpd();
    fused_singles_132: vfmadd132ps = vfmadd132ps();
    fused_singles_213: vfmadd213ps = vfmadd213ps();
    fused_singles_231: vfmadd231ps = vfmadd231ps();
    fused_doubles_132: vfmadd132pd = vfmadd132pd();
    fused_doubles_213: vfmadd213pd = vfmadd213pd();
    fused_doubles_231: vfmadd231pd = vfmadd231pd();
    sums_of_integers: vpaddd = vpaddd();
    sums_of_long_integers: vpaddq = vpaddq();
    differences_of_integers: vpsubd = vpsubd();
    products_of_integers: vpmulld = vpmulld();
    bits_in_both: vpandd = vpand();
    sums_of_bytes: vpaddb = vpaddb();
    distances_of_bytes: vpsadbw = vpsadbw();
    shuffled_bytes: vpshufb = vpshufb();
    bits_in_both_long: vpandq = vpand();
    bits_in_both_singles: vandps = vandps();
    bits_in_either: vpord = vpor();
    bits_in_either_long: vporq = vpor();
    bits_in_one: vpxord = vpxor();
    bits_in_one_long: vpxorq = vpxor();
    shuffled_singles: vshufps = vshufps(0x9c);
    shuffled_doubles: vshufpd = vshufpd(0x66);
}

macro_rules! one_operand {
    ($($name:ident: $long:ident = $short:ident($($immediate:expr)?);)*) => {
        $(#[test]
        fn $name() {
            let ours = long(|a| a.$long(zmm0, zmm1 $(, $immediate)?).unwrap());
            let twin = halves(|a| a.$short(ymm0, ymm1 $(, $immediate)?).unwrap());
            compare(stringify!($long), ours, twin, Random::block);
        })*
    };
}

one_operand! {
    integers_to_singles: vcvtdq2ps = vcvtdq2ps();
    odd_lanes_twice: vmovshdup = vmovshdup();
    shifts_left: vpslld = vpslld(7);
    shifts_left_beyond: vpslld = vpslld(32);
    shifts_right: vpsrld = vpsrld(16);
    short_shifts_right: vpsrlw = vpsrlw(4);
    short_shifts_right_beyond: vpsrlw = vpsrlw(16);
    lanes_by_an_immediate: vpermilps = vpermilps(0x1b);
    long_lanes_by_an_immediate: vpermpd = vpermpd(0x63);
    moves_of_integers: vmovdqa64 = vmovdqa();
    moves_of_doubles: vmovapd = vmovapd();
}

#[test]
fn singles_widen_to_doubles() {
    let ours = long(|a| a.vcvtps2pd(zmm0, ymm1).unwrap());
    let twin = Program::new(|a| {
        for half in [0, 1] {
            a.vcvtps2pd(ymm0, xmmword_ptr(rdi) + (64 + 16 * half)).unwrap();
            a.vmovups(ymmword_ptr(rdi) + 32 * half, ymm0).unwrap();
        }
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    });
    compare("vcvtps2pd", ours, twin, Random::block);
}

#[test]
fn every_relation_of_floats() {
    for relation in 0..32 {
        for double in [false, true] {
            let ours = long(|a| {
                if double {
                    a.vcmppd(k1, zmm1, zmm2, relation).unwrap();
                } else {
                    a.vcmpps(k1, zmm1, zmm2, relation).unwrap();
                }
                // The mask as lanes of ones.
                a.lanes_of_the_mask(k1, double);
            });
            let twin = halves(|a| {
                if double {
                    a.vcmppd(ymm0, ymm1, ymm2, relation)
                } else {
                    a.vcmpps(ymm0, ymm1, ymm2, relation)
                }
                .unwrap();
            });
            compare(&format!("relation {relation}"), ours, twin, |random| {
                let mut block = random.block();
                // Equal lanes are rare otherwise; the last operand is lanes of ones.
                let second = block.0[1];
                block.0[2][..4].copy_from_slice(&second[..4]);
                block.0[3] = [u64::MAX; 8];
                block
            });
        }
    }
}

trait Ones {
    fn lanes_of_the_mask(&mut self, mask: AsmRegisterK, double: bool);
}

impl Ones for CodeAssembler {
    /// zmm0 becomes the fourth operand of the block in lanes of the mask, and zero in others.
    fn lanes_of_the_mask(&mut self, mask: AsmRegisterK, double: bool) {
        assert_eq!(mask, k1);
        if double {
            self.vmovdqu64(zmm0.k1().z(), zmmword_ptr(rdi) + 192).unwrap();
        } else {
            self.vmovdqu32(zmm0.k1().z(), zmmword_ptr(rdi) + 192).unwrap();
        }
    }
}

/// The form with an EVEX prefix of a scalar instruction, on registers that only it can name, against the usual one.
macro_rules! scalars {
    ($($name:ident: $op:ident;)*) => {
        $(#[test]
        fn $name() {
            let ours = long(|a| {
                a.vmovaps(zmm16, zmm0).unwrap();
                a.vmovaps(zmm17, zmm1).unwrap();
                a.vmovaps(zmm18, zmm2).unwrap();
                a.$op(xmm16, xmm17, xmm18).unwrap();
                a.vmovaps(zmm0, zmm16).unwrap();
            });
            let twin = Program::new(|a| {
                a.vmovups(ymm0, ymmword_ptr(rdi)).unwrap();
                a.vmovups(ymm1, ymmword_ptr(rdi) + 64).unwrap();
                a.vmovups(ymm2, ymmword_ptr(rdi) + 128).unwrap();
                a.$op(xmm0, xmm1, xmm2).unwrap();
                a.vmovups(ymmword_ptr(rdi), ymm0).unwrap();
                a.vpxor(xmm0, xmm0, xmm0).unwrap();
                a.vmovups(ymmword_ptr(rdi) + 32, ymm0).unwrap();
                a.vzeroupper().unwrap();
                a.ret().unwrap();
            });
            compare(stringify!($op), ours, twin, Random::block);
        })*
    };
}

scalars! {
    sum_of_single: vaddss;
    sum_of_double: vaddsd;
    difference_of_single: vsubss;
    product_of_double: vmulsd;
    larger_single: vmaxss;
    lesser_single: vminss;
    single_to_double: vcvtss2sd;
    fused_single_132: vfmadd132ss;
    fused_single_213: vfmadd213ss;
    fused_single_231: vfmadd231ss;
    single_into_vector: vmovss_3;
    double_into_vector: vmovsd_3;
}

/// A scalar result in `rax` and flags in `rdx`, from lane 0 of the second and third operands.
fn to_general(
    evex: bool,
    operation: impl FnOnce(&mut CodeAssembler, AsmRegisterXmm, AsmRegisterXmm),
) -> Program {
    Program::new(|a| {
        a.xor(eax, eax).unwrap();
        a.set_prefer_vex(!evex);
        if evex {
            a.vmovups(zmm17, zmmword_ptr(rdi) + 64).unwrap();
            a.vmovups(zmm18, zmmword_ptr(rdi) + 128).unwrap();
            operation(a, xmm17, xmm18);
        } else {
            a.vmovups(ymm1, ymmword_ptr(rdi) + 64).unwrap();
            a.vmovups(ymm2, ymmword_ptr(rdi) + 128).unwrap();
            operation(a, xmm1, xmm2);
        }
        a.pushfq().unwrap();
        a.pop(rdx).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(qword_ptr(rdi) + 8, rdx).unwrap();
        a.vzeroupper().unwrap();
        a.ret().unwrap();
    })
}

#[test]
fn singles_truncate_to_integers() {
    let narrow = |evex| to_general(evex, |a, x, _| a.vcvttss2si(eax, x).unwrap());
    let wide = |evex| to_general(evex, |a, x, _| a.vcvttss2si(rax, x).unwrap());
    compare("vcvttss2si to 32 bits", narrow(true), narrow(false), Random::block);
    compare("vcvttss2si to 64 bits", wide(true), wide(false), Random::block);
}

#[test]
fn flags_order_floats() {
    let single = |evex| to_general(evex, |a, x, y| a.vucomiss(x, y).unwrap());
    let double = |evex| to_general(evex, |a, x, y| a.vucomisd(x, y).unwrap());
    compare("vucomiss", single(true), single(false), Random::block);
    compare("vucomisd", double(true), double(false), Random::block);
}

/// An operation of `rax` and `rcx` under given flags. A leading instruction with an EVEX prefix makes it ours.
fn general(evex: bool, operation: impl Fn(&mut CodeAssembler)) -> Program {
    Program::new(|a| {
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.mov(rcx, qword_ptr(rdi) + 8).unwrap();
        a.mov(rdx, qword_ptr(rdi) + 16).unwrap();
        a.and(edx, 0x8d5).unwrap();
        a.push(rdx).unwrap();
        a.popfq().unwrap();
        if evex {
            a.vmovups(zmm16, zmmword_ptr(rdi)).unwrap();
        }
        operation(a);
        a.pushfq().unwrap();
        a.pop(rdx).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(qword_ptr(rdi) + 8, rcx).unwrap();
        a.mov(qword_ptr(rdi) + 16, rdx).unwrap();
        a.ret().unwrap();
    })
}

#[test]
fn integer_instructions_between_ours_are_those_of_the_processor() {
    type Operation = (&'static str, fn(&mut CodeAssembler));
    let operations: [Operation; 22] = [
        ("add", |a| a.add(rax, rcx).unwrap()),
        ("add of 32 bits", |a| a.add(eax, ecx).unwrap()),
        ("add of an immediate", |a| a.add(rax, -16).unwrap()),
        ("sub", |a| a.sub(rax, rcx).unwrap()),
        ("sub of 32 bits", |a| a.sub(eax, 5).unwrap()),
        ("cmp", |a| a.cmp(rax, rcx).unwrap()),
        ("cmp of 32 bits", |a| a.cmp(eax, ecx).unwrap()),
        ("cmp with memory", |a| a.cmp(rax, qword_ptr(rdi) + 24).unwrap()),
        ("and", |a| a.and(rax, rcx).unwrap()),
        ("or", |a| a.or(eax, ecx).unwrap()),
        ("xor", |a| a.xor(rax, rcx).unwrap()),
        ("test", |a| a.test(rax, rcx).unwrap()),
        ("test of 32 bits", |a| a.test(eax, eax).unwrap()),
        ("inc", |a| a.inc(rax).unwrap()),
        ("dec of 32 bits", |a| a.dec(eax).unwrap()),
        ("lea", |a| a.lea(rax, qword_ptr(rax + rcx * 4 + 64)).unwrap()),
        ("lea of 32 bits", |a| a.lea(eax, dword_ptr(rax + rcx - 4)).unwrap()),
        ("mov of 32 bits", |a| a.mov(eax, ecx).unwrap()),
        ("mov from memory", |a| a.mov(rax, qword_ptr(rdi) + 32).unwrap()),
        ("mov to memory", |a| a.mov(dword_ptr(rdi) + 40, eax).unwrap()),
        ("cmovb", |a| a.cmovb(rax, rcx).unwrap()),
        ("cmovg of 32 bits", |a| a.cmovg(eax, ecx).unwrap()),
    ];
    for (name, operation) in operations {
        compare(name, general(true, operation), general(false, operation), |random| {
            let mut block = random.block();
            // Operands near each other and near the ends of the range carry and overflow.
            block.0[0][..2].iter_mut().for_each(|v| {
                *v = match *v % 3 {
                    0 => *v,
                    1 => (v.cast_signed() >> 60).cast_unsigned(),
                    _ => (*v & 3).wrapping_sub(2) ^ 1 << 63 ^ 1 << 31,
                }
            });
            block
        });
    }
}

#[test]
fn branches_between_ours_are_those_of_the_processor() {
    macro_rules! branches {
        ($($jump:ident)*) => { $(
            let program = |evex| general(evex, |a| {
                let mut end = a.create_label();
                a.$jump(end).unwrap();
                a.mov(eax, 7).unwrap();
                a.set_label(&mut end).unwrap();
                a.nop().unwrap();
            });
            compare(stringify!($jump), program(true), program(false), Random::block);
        )* };
    }
    branches! { jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg jmp }
}
