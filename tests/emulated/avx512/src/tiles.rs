//! Tile registers (AMX): eight of up to 16 lines of 64 bytes, whose shapes the program sets.

use iced_x86::{Mnemonic, OpKind, Register};

use crate::execute::{Outcome, Refusal};
use crate::lanes::{add, multiply_add_brain_floats};
use crate::operands::{At, read, write};

/// Lines of a register, and bytes and words of a line, at most.
const LINES: usize = 16;
const LINE_BYTES: usize = 64;
const LINE_WORDS: usize = LINE_BYTES / 4;

/// The tile registers of a thread.
#[derive(Clone, Debug)]
pub struct Tiles {
    /// Lines, and bytes of a line, of each register.
    shapes: [(usize, usize); 8],
    words: [[[u32; LINE_WORDS]; LINES]; 8],
}

impl Tiles {
    /// No shapes, all zeros.
    pub const ZERO: Self = Self { shapes: [(0, 0); 8], words: [[[0; LINE_WORDS]; LINES]; 8] };

    /// From what LDTILECFG reads; none where the processor would fault.
    fn shaped(shapes: &[u8; 64]) -> Option<Self> {
        let mut tiles = Self::ZERO;
        for (t, shape) in tiles.shapes.iter_mut().enumerate() {
            let bytes = u16::from_le_bytes([shapes[16 + 2 * t], shapes[17 + 2 * t]]);
            *shape = (shapes[48 + t].into(), bytes.into());
        }
        let fits = |(lines, bytes): (usize, usize)| lines <= LINES && bytes <= LINE_BYTES && bytes % 4 == 0;
        let plain = shapes[0] == 1 && shapes[1..16].iter().all(|&byte| byte == 0);
        (plain && tiles.shapes.into_iter().all(fits)).then_some(tiles)
    }
}

/// Instructions of tile registers.
pub(crate) fn tiles(at: &mut At<'_>) -> Outcome<()> {
    match at.instruction.mnemonic() {
        Mnemonic::Ldtilecfg => {
            let mut shapes = [0; 64];
            read(at.address(0)?, &mut shapes);
            at.cpu.tiles = Tiles::shaped(&shapes).ok_or(Refusal::Form)?;
        }
        Mnemonic::Tilerelease => at.cpu.tiles = Tiles::ZERO,
        Mnemonic::Tilezero => {
            let (to, _) = register(at, 0)?;
            at.cpu.tiles.words[to] = [[0; LINE_WORDS]; LINES];
        }
        Mnemonic::Tileloadd => {
            let (to, (lines, bytes)) = register(at, 0)?;
            let mut words = [[0; LINE_WORDS]; LINES];
            for (line, words) in words[..lines].iter_mut().enumerate() {
                let line = place(at, 1, line)?;
                for (word, to) in words[..bytes / 4].iter_mut().enumerate() {
                    read(line + 4 * word as u64, bytemuck::bytes_of_mut(to));
                }
            }
            at.cpu.tiles.words[to] = words;
        }
        Mnemonic::Tilestored => {
            let (from, (lines, bytes)) = register(at, 1)?;
            for (line, words) in at.cpu.tiles.words[from][..lines].iter().enumerate() {
                let line = place(at, 0, line)?;
                for (word, from) in words[..bytes / 4].iter().enumerate() {
                    write(line + 4 * word as u64, bytemuck::bytes_of(from));
                }
            }
        }
        Mnemonic::Tdpbf16ps => {
            let [(to, shape), (a, left), (b, right)] = [register(at, 0)?, register(at, 1)?, register(at, 2)?];
            // Sums of m × n, of m × k pairs and k × n pairs.
            let fits = left.0 == shape.0 && right.1 == shape.1 && left.1 == 4 * right.0;
            if !fits || a == b || a == to || b == to {
                return Err(Refusal::Form);
            }
            let words = &at.cpu.tiles.words;
            let mut sums = [[0; LINE_WORDS]; LINES];
            for (m, sums) in sums[..shape.0].iter_mut().enumerate() {
                for (n, sum) in sums[..shape.1 / 4].iter_mut().enumerate() {
                    let pairs = (0..right.0).map(|k| (words[a][m][k], words[b][k][n]));
                    *sum = product(f32::from_bits(words[to][m][n]), pairs).to_bits();
                }
            }
            at.cpu.tiles.words[to] = sums;
        }
        _ => return Err(Refusal::Unknown),
    }
    Ok(())
}

/// `sum` and the products of pairs of bf16: lower and upper ones are added on their own, then to each other, then to `sum`.
fn product(sum: f32, pairs: impl Iterator<Item = (u32, u32)>) -> f32 {
    let (mut lower, mut upper) = (0.0, 0.0);
    for (a, b) in pairs {
        lower = multiply_add_brain_floats(lower, a << 16, b << 16);
        upper = multiply_add_brain_floats(upper, a & 0xffff_0000, b & 0xffff_0000);
    }
    let flush = |v: f32| if v.is_subnormal() { 0.0_f32.copysign(v) } else { v };
    flush(add(flush(sum), flush(add(lower, upper))))
}

/// Number and shape of a register that has one.
fn register(at: &At<'_>, operand: u32) -> Outcome<(usize, (usize, usize))> {
    let number = match at.instruction.op_register(operand) {
        register if register.is_tmm() => register.number(),
        _ => return Err(Refusal::Form),
    };
    let shape = at.cpu.tiles.shapes[number];
    if shape == (0, 0) { Err(Refusal::Form) } else { Ok((number, shape)) }
}

/// Address of a line in memory: the index register, no part of the address itself, says how far it is from line to line.
fn place(at: &At<'_>, operand: u32, line: usize) -> Outcome<u64> {
    if at.instruction.op_kind(operand) != OpKind::Memory {
        return Err(Refusal::Form);
    }
    let stride = match at.instruction.memory_index() {
        Register::None => 0,
        index => at.cpu.general(index).wrapping_mul(at.instruction.memory_index_scale().into()),
    };
    Ok(at.address(operand)?.wrapping_add(stride.wrapping_mul(line as u64)))
}
