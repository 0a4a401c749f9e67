//! Instructions without a twin, against their definitions; masks and broadcasts, which only they have.
#![allow(clippy::unwrap_used, missing_docs)]

mod program;

use emulated_avx512::cpu::{Cpu, Vector};
use emulated_avx512::execute::{Refusal, execute};
use emulated_avx512::lanes::dot_brain_floats;
use iced_x86::Instruction;
use iced_x86::code_asm::*;
use program::Random;

/// The one instruction that is written.
fn instruction(write: impl FnOnce(&mut CodeAssembler)) -> Instruction {
    let mut assembler = CodeAssembler::new(64).unwrap();
    assembler.set_prefer_vex(false);
    write(&mut assembler);
    assembler.instructions()[0]
}

/// Registers of random bits.
fn cpu(random: &mut Random) -> Cpu {
    let mut cpu = Cpu::ZERO;
    for zmm in &mut cpu.zmm {
        zmm.lanes_mut::<u64>().copy_from_slice(&random.vector());
    }
    cpu.k.iter_mut().for_each(|k| *k = random.bits());
    cpu
}

/// zmm0 after an instruction, and the registers before it; over again for other registers.
fn each(write: impl Fn(&mut CodeAssembler), check: impl Fn(&Cpu, Vector)) {
    let (instruction, mut random) = (instruction(write), Random(2));
    for _ in 0..200 {
        let before = cpu(&mut random);
        let mut after = before.clone();
        execute(&mut after, &instruction).unwrap();
        check(&before, after.zmm[0]);
    }
}

fn words(cpu: &Cpu, register: usize) -> &[u32] {
    cpu.zmm[register].lanes()
}

#[test]
fn dot_products_of_bytes_are_those_of_integers_and_wrap() {
    let check = |before: &Cpu, found: Vector| {
        for (l, found) in found.lanes::<u32>().iter().enumerate() {
            let bytes = |register: usize| &before.zmm[register].lanes::<u8>()[4 * l..4 * l + 4];
            let products = bytes(1).iter().zip(bytes(2)).map(|(a, b)| i64::from(*a) * i64::from(*b as i8));
            let sum = i64::from(words(before, 0)[l].cast_signed()) + products.sum::<i64>();
            assert_eq!(*found, sum as u32, "lane {l}");
        }
    };
    each(|a| a.vpdpbusd(zmm0, zmm1, zmm2).unwrap(), check);
}

#[test]
fn dot_products_of_words_are_those_of_integers_and_wrap() {
    let check = |before: &Cpu, found: Vector| {
        for (l, found) in found.lanes::<u32>().iter().enumerate() {
            let pair = |register: usize| &before.zmm[register].lanes::<i16>()[2 * l..2 * l + 2];
            let products = pair(1).iter().zip(pair(2)).map(|(a, b)| i64::from(*a) * i64::from(*b));
            let sum = i64::from(words(before, 0)[l].cast_signed()) + products.sum::<i64>();
            assert_eq!(*found, sum as u32, "lane {l}");
        }
    };
    each(|a| a.vpdpwssd(zmm0, zmm1, zmm2).unwrap(), check);
}

#[test]
fn lanes_are_compressed_to_the_front() {
    let taken = |before: &Cpu| {
        let mask = before.k[3];
        let lanes = words(before, 1).iter().enumerate().filter(move |(l, _)| mask >> l & 1 == 1);
        lanes.map(|(_, word)| *word).collect::<Vec<_>>()
    };
    let merging = |before: &Cpu, found: Vector| {
        let taken = taken(before);
        let rest = &words(before, 0)[taken.len()..];
        assert_eq!(found.lanes::<u32>(), [&taken[..], rest].concat());
    };
    each(|a| a.vpcompressd(zmm0.k3(), zmm1).unwrap(), merging);
    each(|a| a.vcompressps(zmm0.k3(), zmm1).unwrap(), merging);
    each(
        |a| a.vpcompressd(zmm0.k3().z(), zmm1).unwrap(),
        |before, found| {
            let mut taken = taken(before);
            taken.resize(16, 0);
            assert_eq!(found.lanes::<u32>(), taken);
        },
    );
}

fn pair(upper: f32, lower: f32) -> u32 {
    assert_eq!((upper.to_bits() | lower.to_bits()) & 0xffff, 0, "no bf16");
    upper.to_bits() | lower.to_bits() >> 16
}

#[test]
fn dot_products_of_brain_floats_are_exact_where_nothing_rounds() {
    let (instruction, mut random) = (instruction(|a| a.vdpbf16ps(zmm0, zmm1, zmm2).unwrap()), Random(3));
    for _ in 0..200 {
        let mut cpu = Cpu::ZERO;
        let mut number = || (random.bits() % 255) as f32 - 127.0;
        let lanes: [[f32; 5]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| number()));
        for (l, [sum, a, b, c, d]) in lanes.into_iter().enumerate() {
            cpu.zmm[0].lanes_mut::<f32>()[l] = sum * 1024.0;
            cpu.zmm[1].lanes_mut::<u32>()[l] = pair(a, b);
            cpu.zmm[2].lanes_mut::<u32>()[l] = pair(c, d);
        }
        execute(&mut cpu, &instruction).unwrap();
        let expected = lanes.map(|[sum, a, b, c, d]| sum * 1024.0 + a * c + b * d);
        assert_eq!(cpu.zmm[0].lanes::<f32>(), expected);
    }
}

#[test]
fn dot_products_of_brain_floats_round_the_upper_pair_first_and_fuse() {
    let power = |n: i32| 2.0_f32.powi(n);
    // 1 is lost in 2^24; 1 + 1 together would not be.
    assert_eq!(dot_brain_floats(1.0, pair(power(24), 1.0), pair(1.0, 1.0)), power(24));
    assert_eq!(dot_brain_floats(1.0, pair(1.0, power(24)), pair(1.0, 1.0)), power(24) + 2.0);
    // The product alone is beyond f32, or below it.
    assert_eq!(dot_brain_floats(-power(127), pair(power(100), 0.0), pair(power(28), 0.0)), power(127));
    let small = dot_brain_floats(power(-126), pair(power(-100), 0.0), pair(power(-49), 0.0));
    assert_eq!(small.to_bits(), 0x0080_0001);
}

#[test]
fn dot_products_of_brain_floats_know_no_subnormal_numbers() {
    let (smallest, one) = (f32::MIN_POSITIVE, 1.0);
    assert_eq!(dot_brain_floats(smallest / 2.0, 0, 0).to_bits(), 0);
    assert_eq!(dot_brain_floats(0.0, pair(smallest / 2.0, 0.0), pair(one, 0.0)).to_bits(), 0);
    assert_eq!(dot_brain_floats(0.0, pair(smallest, 0.0), pair(0.5, 0.0)).to_bits(), 0);
    assert_eq!(dot_brain_floats(-0.0, pair(smallest, 0.0), pair(-0.5, -0.0)).to_bits(), 1 << 31);
    assert_eq!(dot_brain_floats(0.0, pair(smallest, 0.0), pair(one, 0.0)), smallest);
    // On the edge: rounded to 24 bits the one stays below it and is lost, although the grid of subnormal numbers has it reach.
    let less = |by: f32| {
        dot_brain_floats(smallest, pair(-2.0_f32.powi(-76), 0.0), pair(by * 2.0_f32.powi(-75), 0.0))
    };
    assert_eq!(less(1.25).to_bits(), 0);
    assert_eq!(less(0.5), smallest);
}

#[test]
fn the_first_nan_of_a_dot_product_is_its_result() {
    let nan = |payload: u32| f32::from_bits(0x7f80_0000 | payload << 16);
    let all = [nan(1), nan(2), nan(3), nan(4)];
    let bits = |found: f32| found.to_bits() >> 16 & 0x3f;
    let of = |la: f32, lb: f32, ua: f32, ub: f32| bits(dot_brain_floats(nan(5), pair(ua, la), pair(ub, lb)));
    assert_eq!(of(all[0], all[1], all[2], all[3]), 1);
    assert_eq!(of(1.0, all[1], all[2], all[3]), 2);
    assert_eq!(of(1.0, 1.0, all[2], all[3]), 3);
    assert_eq!(of(1.0, 1.0, 1.0, all[3]), 4);
    assert_eq!(of(1.0, 1.0, 1.0, 1.0), 5);
}

#[test]
fn a_mask_merges_or_zeroes() {
    let sum = |before: &Cpu, l: usize| words(before, 1)[l].wrapping_add(words(before, 2)[l]);
    let bit = |before: &Cpu, l: usize| before.k[3] >> l & 1 == 1;
    each(
        |a| a.vpaddd(zmm0.k3(), zmm1, zmm2).unwrap(),
        |before, found| {
            for l in 0..16 {
                let expected = if bit(before, l) { sum(before, l) } else { words(before, 0)[l] };
                assert_eq!(found.lanes::<u32>()[l], expected);
            }
        },
    );
    each(
        |a| a.vpaddd(zmm0.k3().z(), zmm1, zmm2).unwrap(),
        |before, found| {
            for l in 0..16 {
                assert_eq!(found.lanes::<u32>()[l], if bit(before, l) { sum(before, l) } else { 0 });
            }
        },
    );
}

#[test]
fn shorter_forms_clear_what_is_beyond_them() {
    each(|a| a.vpaddd(ymm0.k3(), ymm1, ymm2).unwrap(), |_, found| assert_eq!(found, found.cut(32)));
    each(|a| a.vaddps(xmm0, xmm1, xmm2).unwrap(), |_, found| assert_eq!(found, found.cut(16)));
    each(
        |a| a.vmovss_3(xmm0.k3(), xmm1, xmm2).unwrap(),
        |before, found| {
            let lane = words(before, if before.k[3] & 1 == 1 { 2 } else { 0 })[0];
            let rest = words(before, 1);
            assert_eq!(found.lanes::<u32>()[..4], [lane, rest[1], rest[2], rest[3]]);
            assert_eq!(found, found.cut(16));
        },
    );
}

#[test]
fn memory_is_broadcast_and_masked_lanes_of_it_are_not_touched() {
    let mut random = Random(4);
    let value = 0x1234_5678_u32;
    let mut before = cpu(&mut random);
    before.gpr[3] = &raw const value as u64;
    let broadcast = instruction(|a| a.vpaddd(zmm0, zmm1, dword_bcst(rbx)).unwrap());
    let mut after = before.clone();
    execute(&mut after, &broadcast).unwrap();
    assert!(
        after.zmm[0].lanes::<u32>().iter().zip(words(&before, 1)).all(|(f, w)| *f == w.wrapping_add(value))
    );
    // Only lane 0 can be read or written here: the rest would be beyond a page, or at least beyond the value.
    before.k[3] = 1;
    after = before.clone();
    execute(&mut after, &instruction(|a| a.vmovdqu32(zmm0.k3().z(), zmmword_ptr(rbx)).unwrap())).unwrap();
    assert_eq!(after.zmm[0], Vector::filled(value).cut(4));
    let mut two = [7_u32, 8];
    before.gpr[3] = two.as_mut_ptr() as u64;
    execute(&mut before, &instruction(|a| a.vmovdqu32(zmmword_ptr(rbx).k3(), zmm1).unwrap())).unwrap();
    assert_eq!(two, [words(&before, 1)[0], 8]);
}

#[test]
fn misaligned_moves_and_unknown_instructions_are_refused() {
    let space = [0_u64; 16];
    let mut cpu = Cpu::ZERO;
    let start = (&raw const space as u64).next_multiple_of(64);
    let load = instruction(|a| a.vmovaps(zmm0, zmmword_ptr(rbx)).unwrap());
    cpu.gpr[3] = start;
    assert_eq!(execute(&mut cpu, &load), Ok(()));
    cpu.gpr[3] = start + 32;
    assert_eq!(execute(&mut cpu, &load), Err(Refusal::Misaligned));
    let unknown = instruction(|a| a.vpconflictd(zmm0, zmm1).unwrap());
    assert_eq!(execute(&mut cpu, &unknown), Err(Refusal::Unknown));
    let rounding = instruction(|a| a.vaddps(zmm0, zmm1, zmm2.rd_sae()).unwrap());
    assert_eq!(execute(&mut cpu, &rounding), Err(Refusal::Form));
    let segment = instruction(|a| a.vmovups(zmm0, zmmword_ptr(rbx).fs()).unwrap());
    assert_eq!(execute(&mut cpu, &segment), Err(Refusal::Form));
}

#[test]
fn lanes_move_where_indices_say() {
    each(
        |a| a.vpermpd(zmm0, zmm1, zmm2).unwrap(),
        |before, found| {
            for (l, lane) in found.lanes::<u64>().iter().enumerate() {
                let index = before.zmm[1].lanes::<u64>()[l] as usize % 8;
                assert_eq!(*lane, before.zmm[2].lanes::<u64>()[index]);
            }
        },
    );
    // Indices in operand 1; tables are the target and operand 2.
    each(
        |a| a.vpermt2ps(zmm0, zmm1, zmm2).unwrap(),
        |before, found| {
            for (l, lane) in found.lanes::<u32>().iter().enumerate() {
                let index = words(before, 1)[l] as usize % 32;
                assert_eq!(*lane, words(before, if index < 16 { 0 } else { 2 })[index % 16]);
            }
        },
    );
}

#[test]
fn parts_are_taken_out_and_put_in() {
    each(
        |a| a.vextractf32x4(xmm0, zmm1, 2).unwrap(),
        |before, found| {
            assert_eq!(found.lanes::<u64>()[..2], before.zmm[1].lanes::<u64>()[4..6]);
            assert_eq!(found, found.cut(16));
        },
    );
    each(
        |a| a.vextracti64x4(ymm0, zmm1, 1).unwrap(),
        |before, found| {
            assert_eq!(found.lanes::<u64>()[..4], before.zmm[1].lanes::<u64>()[4..]);
            assert_eq!(found, found.cut(32));
        },
    );
    each(
        |a| a.vinserti64x4(zmm0, zmm1, ymm2, 1).unwrap(),
        |before, found| {
            assert_eq!(found.lanes::<u64>()[..4], before.zmm[1].lanes::<u64>()[..4]);
            assert_eq!(found.lanes::<u64>()[4..], before.zmm[2].lanes::<u64>()[..4]);
        },
    );
    // Lane 3 of operand 2 becomes lane 1; lanes 0 and 2 are cleared.
    each(
        |a| a.vinsertps(xmm0, xmm1, xmm2, 0b1101_0101).unwrap(),
        |before, found| {
            assert_eq!(found.lanes::<u32>()[..4], [0, words(before, 2)[3], 0, words(before, 1)[3]]);
        },
    );
    each(
        |a| a.vbroadcastss(zmm0, xmm1).unwrap(),
        |before, found| {
            assert_eq!(found, Vector::filled(words(before, 1)[0]));
        },
    );
}

#[test]
fn lanes_narrow_by_truncation() {
    each(
        |a| a.vpmovdb(xmm0, zmm1).unwrap(),
        |before, found| {
            assert!((0..16).all(|l| found.lanes::<u8>()[l] == words(before, 1)[l] as u8));
            assert_eq!(found, found.cut(16));
        },
    );
    each(
        |a| a.vpmovdw(ymm0, zmm1).unwrap(),
        |before, found| {
            assert!((0..16).all(|l| found.lanes::<u16>()[l] == words(before, 1)[l] as u16));
            assert_eq!(found, found.cut(32));
        },
    );
}

#[test]
fn masks_spread_over_lanes() {
    each(
        |a| a.vpmovm2d(zmm0, k1).unwrap(),
        |before, found| {
            let lane = |l: usize| if before.k[1] >> l & 1 == 1 { u32::MAX } else { 0 };
            assert!((0..16).all(|l| found.lanes::<u32>()[l] == lane(l)));
        },
    );
}

/// k1 after an instruction under the mask k2, and the registers before it.
fn masks(write: impl Fn(&mut CodeAssembler), bit: impl Fn(&Cpu, usize) -> bool, lanes: usize) {
    let (instruction, mut random) = (instruction(write), Random(5));
    for _ in 0..200 {
        let mut before = cpu(&mut random);
        before.zmm[2].lanes_mut::<u64>()[0] = before.zmm[1].lanes::<u64>()[0];
        let mut after = before.clone();
        execute(&mut after, &instruction).unwrap();
        let expected =
            (0..lanes).map(|l| u64::from(before.k[2] >> l & 1 == 1 && bit(&before, l)) << l).sum::<u64>();
        assert_eq!(after.k[1], expected);
    }
}

#[test]
fn integers_compare_into_masks() {
    let long = |cpu: &Cpu, register: usize, l: usize| cpu.zmm[register].lanes::<u64>()[l];
    masks(|a| a.vpcmpuq(k1.k2(), zmm1, zmm2, 5).unwrap(), |c, l| long(c, 1, l) >= long(c, 2, l), 8);
    masks(|a| a.vpcmpuq(k1.k2(), zmm1, zmm2, 1).unwrap(), |c, l| long(c, 1, l) < long(c, 2, l), 8);
    masks(|a| a.vpcmpuq(k1.k2(), zmm1, zmm2, 4).unwrap(), |c, l| long(c, 1, l) != long(c, 2, l), 8);
    let signed = |cpu: &Cpu, register: usize, l: usize| words(cpu, register)[l].cast_signed();
    masks(|a| a.vpcmpd(k1.k2(), zmm1, zmm2, 2).unwrap(), |c, l| signed(c, 1, l) <= signed(c, 2, l), 16);
    masks(|a| a.vpcmpd(k1.k2(), zmm1, zmm2, 0).unwrap(), |c, l| signed(c, 1, l) == signed(c, 2, l), 16);
    masks(|a| a.vptestmd(k1.k2(), zmm1, zmm2).unwrap(), |c, l| words(c, 1)[l] & words(c, 2)[l] != 0, 16);
}

#[test]
fn mask_registers_are_copied_cut_and_combined() {
    let mut random = Random(6);
    for _ in 0..50 {
        let before = cpu(&mut random);
        let after = |write: fn(&mut CodeAssembler)| {
            let mut after = before.clone();
            execute(&mut after, &instruction(write)).unwrap();
            after
        };
        let [_, _, b, c, ..] = before.k;
        assert_eq!(after(|a| a.kmovw(k1, k2).unwrap()).k[1], b & 0xffff);
        assert_eq!(after(|a| a.kmovd(eax, k2).unwrap()).gpr[0], b & 0xffff_ffff);
        assert_eq!(after(|a| a.kunpckbw(k1, k2, k3).unwrap()).k[1], (b & 0xff) << 8 | c & 0xff);
        assert_eq!(after(|a| a.kandw(k1, k2, k3).unwrap()).k[1], b & c & 0xffff);
        assert_eq!(after(|a| a.korw(k1, k2, k3).unwrap()).k[1], (b | c) & 0xffff);
        assert_eq!(after(|a| a.kxorw(k1, k2, k3).unwrap()).k[1], (b ^ c) & 0xffff);
        assert_eq!(after(|a| a.knotw(k1, k2).unwrap()).k[1], !b & 0xffff);
    }
}
