//! The feature form: one pass over the rows, tiles of `X^T Y` in `f64`.
//!
//! With columns shifted to `x - c`, column sums `s`, squared row norms `a`, and `C = X^T Y`:
//!
//! ```text
//! <K, L> = |C|^2        1'KL1 = s' C u        1'K1 = |s|^2          (u, b: of Y)
//! <K~, L~> = |C|^2 - a'b     1'K~L~1 = s' C u - s' X'b - u' Y'a + a'b     1'K~1 = |s|^2 - 1'a
//! ```
//!
//! `X'b` for all layers comes out of the same products: the norms of all layers are packed as one more layer.
//!
//! Taking the diagonal out is a difference of fourth powers of norms, and a row a hundred times larger than the others would
//! leave nothing of theirs to sums of `f32`. Such [heavy rows](Heavy) stay out of the panels and are added in `f64`, which
//! keeps CKA to some 1e-16 of the square of their ratio to the others.
//!
//! Tiles that do not fit into the memory budget at once are done in rounds, each of which reads the rows again.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Estimator, Problem, Sums, too_large};
use crate::error::{Error, Result};
use crate::kernels::gram::{
    DEPTH, Margins, TILE, TILE_LEN, add_slab, pack_columns, pack_step, side_of, slab_len,
};
use crate::kernels::panel::{Kernel, Side};
use crate::memory::Aligned;
use crate::scan::{Buffer, Context, fill_pieces, map_ordered, map_pieces, threads};

/// Slabs packed at once, unless there are more threads: a block of them stays in the second-level cache while it meets the
/// others, and a tile is loaded and stored once for all of them.
const CHUNK_SLABS: usize = 8;

/// Up to [`TILE`] neighbouring columns of one layer.
#[derive(Clone, Debug)]
struct Block {
    layer: usize,
    columns: Range<usize>,
}

/// The product of two blocks.
#[derive(Clone, Copy, Debug)]
struct Tile {
    a: usize,
    b: usize,
}

struct Layout {
    kernel: Kernel,
    blocks: Vec<Block>,
    tiles: Vec<Tile>,
    /// Columns of every layer; the norms come last.
    widths: Vec<usize>,
    /// Where every layer begins within a slab, and where the slab ends.
    first: Vec<usize>,
    /// Where every layer begins within a heavy row.
    offsets: Vec<usize>,
}

/// A row whose norm in some layer is far beyond what is usual there: all layers side by side, shifted and scaled, and its norms.
struct Heavy {
    row: usize,
    values: Vec<f32>,
    norms: Vec<f64>,
}

/// What packing a slab found.
struct Packed {
    margins: Vec<Margins>,
    heavy: Vec<Heavy>,
}

impl Layout {
    fn new(problem: &Problem<'_>) -> Self {
        let (kernel, norms) = (Kernel::of(problem.isa), problem.layers.len());
        let widths: Vec<usize> = problem.widths().chain([norms]).collect();
        let (mut blocks, mut first) = (Vec::new(), vec![0]);
        for (layer, &d) in widths.iter().enumerate() {
            first.push(first[layer] + slab_len(kernel, d));
            let starts = (0..d).step_by(TILE);
            blocks.extend(starts.map(|start| Block { layer, columns: start..d.min(start + TILE) }));
        }
        let mut wanted = problem.pairs.clone();
        if problem.estimator == Estimator::Debiased {
            wanted.extend((0..norms).map(|l| (l, norms)));
        }
        let mut blocks_of = vec![Vec::new(); norms + 1];
        blocks.iter().enumerate().for_each(|(i, block): (usize, &Block)| blocks_of[block.layer].push(i));
        let mut tiles = Vec::new();
        for (l, m) in wanted {
            for &a in &blocks_of[l] {
                tiles.extend(blocks_of[m].iter().filter(|&&b| l != m || a <= b).map(|&b| Tile { a, b }));
            }
        }
        let offsets = widths.iter().scan(0, |end, d| Some(std::mem::replace(end, *end + d))).collect();
        Self { kernel, blocks, tiles, widths, first, offsets }
    }

    /// Numbers in a slab of all layers.
    fn slab_len(&self) -> usize {
        self.first[self.widths.len()]
    }

    /// Where a layer lies within a slab.
    fn layer(&self, layer: usize) -> Range<usize> {
        self.first[layer]..self.first[layer + 1]
    }

    /// The columns of a block in a heavy row.
    fn columns<'a>(&'a self, block: usize, heavy: &'a Heavy) -> impl Iterator<Item = f64> + Clone + 'a {
        let Block { layer, columns } = &self.blocks[block];
        let start = self.offsets[*layer];
        columns.clone().map(move |c| {
            if *layer + 1 == self.widths.len() { heavy.norms[c] } else { heavy.values[start + c].into() }
        })
    }

    /// Adds a heavy row to the tile of two blocks.
    fn add_heavy(&self, Tile { a, b }: Tile, heavy: &Heavy, product: &mut [f64]) {
        let right: Vec<f64> = self.columns(b, heavy).collect();
        for (x, line) in self.columns(a, heavy).zip(product.chunks_exact_mut(TILE)) {
            line.iter_mut().zip(&right).for_each(|(sum, y)| *sum += x * y);
        }
    }

    /// Where one side of a block lies within a slab.
    fn side(&self, block: usize, side: Side) -> Range<usize> {
        let Block { layer, columns } = &self.blocks[block];
        let within = side_of(self.kernel, side, self.widths[*layer], columns.clone());
        self.first[*layer] + within.start..self.first[*layer] + within.end
    }
}

/// Sums over all rows that do not depend on the tiles.
struct Totals {
    sums: Vec<Vec<f64>>,
    norms: Vec<f64>,
    norm_products: Vec<f64>,
    /// Numbers of the heavy rows, rising: what every round takes out of the panels.
    heavy: Vec<usize>,
}

/// The sums of HSIC by the feature form.
pub fn sums(problem: &Problem<'_>, context: &Context<'_>) -> Result<Sums> {
    let layout = Layout::new(problem);
    let (chunk, per_round) = plan(&layout, problem, context)?;
    let count = problem.layers.len();
    let mut out = Sums::new(count);
    let mut totals = Totals {
        sums: problem.widths().map(|d| vec![0.0; d]).collect(),
        norms: vec![0.0; count],
        norm_products: vec![0.0; count * count],
        heavy: Vec::new(),
    };
    let rounds = layout.tiles.len().div_ceil(per_round);
    for (round, tiles) in layout.tiles.chunks(per_round).enumerate() {
        let products = multiply(problem, &layout, tiles, chunk, (round, rounds), &mut totals, context)?;
        let numbered: Vec<usize> = (0..tiles.len()).collect();
        let parts = map_ordered(&numbered, context, |&t| {
            Ok(reduce(problem, &layout, tiles[t], &products[t * TILE_LEN..(t + 1) * TILE_LEN], &totals))
        })?;
        for (tile, part) in tiles.iter().zip(parts) {
            part.add_to(&mut out, &layout, *tile);
        }
    }
    finish(problem, &totals, &mut out)
}

/// Slabs in a chunk and tiles in a round, from the memory budget.
fn plan(layout: &Layout, problem: &Problem<'_>, context: &Context<'_>) -> Result<(usize, usize)> {
    // A row takes its place on both sides of a slab, and half as much once more where it is heavy.
    let (slab, tile) = (layout.slab_len() * size_of::<f32>() * 3 / 2, TILE_LEN * size_of::<f64>());
    let slabs = problem.n.div_ceil(DEPTH).min(CHUNK_SLABS.max(threads()));
    let chunk = (context.memory_budget / 2 / slab).clamp(1, slabs);
    let tiles = context.memory_budget.saturating_sub(chunk * slab) / tile;
    if tiles == 0 {
        return Err(Error::Memory {
            what: "CKA of these layers".to_owned(),
            needed: slab + tile,
            budget: context.memory_budget,
            hint: "Raise memory_budget or compare fewer layers at once".to_owned(),
        });
    }
    Ok((chunk, tiles.min(layout.tiles.len())))
}

/// One pass over all rows: the tiles of one round.
fn multiply(
    problem: &Problem<'_>,
    layout: &Layout,
    tiles: &[Tile],
    chunk: usize,
    (round, rounds): (usize, usize),
    totals: &mut Totals,
    context: &Context<'_>,
) -> Result<Aligned<f64>> {
    let (n, slab_len) = (problem.n, layout.slab_len());
    let mut used: Vec<bool> = vec![round == 0; layout.widths.len()];
    for tile in tiles {
        used[layout.blocks[tile.a].layer] = true;
        used[layout.blocks[tile.b].layer] = true;
    }
    if used[problem.layers.len()] {
        used.fill(true);
    }
    let mut products = Aligned::zeros(tiles.len() * TILE_LEN);
    let mut packed = Aligned::zeros(chunk * slab_len);
    for first in (0..n).step_by(chunk * DEPTH) {
        let rows = (n - first).min(chunk * DEPTH);
        let packed = &mut packed[..rows.div_ceil(DEPTH) * slab_len];
        let known = (round > 0).then_some(&totals.heavy[..]);
        let slabs = map_pieces(packed, slab_len, context, |i, out| {
            let start = first + i * DEPTH;
            pack_slab(problem, layout, &used, start..n.min(start + DEPTH), known, out)
        })?;
        if round == 0 {
            for slab in &slabs {
                totals.add(&slab.margins);
                totals.heavy.extend(slab.heavy.iter().map(|heavy| heavy.row));
            }
        }
        fill_pieces(&mut products, TILE_LEN, context, |t, product| {
            let Tile { a, b } = tiles[t];
            let (left, right) = (layout.side(a, Side::Left), layout.side(b, Side::Right));
            for (i, (slab, Packed { heavy, .. })) in packed.chunks_exact(slab_len).zip(&slabs).enumerate() {
                let depth = (rows - i * DEPTH).min(DEPTH);
                add_slab(layout.kernel, &slab[left.clone()], &slab[right.clone()], depth, a == b, product);
                for heavy in heavy {
                    layout.add_heavy(tiles[t], heavy, product);
                }
            }
            Ok(())
        })?;
        let done = (round * n + first + rows) / rounds;
        context.done.store(done as u64, Ordering::Relaxed);
    }
    Ok(products)
}

/// Packs one slab of rows of the layers in use, and their norms behind them; without the heavy rows, which are `known` after the
/// first round.
fn pack_slab(
    problem: &Problem<'_>,
    layout: &Layout,
    used: &[bool],
    range: Range<usize>,
    known: Option<&[usize]>,
    out: &mut [f32],
) -> Result<Packed> {
    let mut buffer = Buffer::default();
    let mut margins = Vec::with_capacity(problem.layers.len());
    let mut is_heavy = vec![false; range.len()];
    let known_before = |row: usize| known.unwrap_or_default().partition_point(|known| *known < row);
    for row in &known.unwrap_or_default()[known_before(range.start)..known_before(range.end)] {
        is_heavy[row - range.start] = true;
    }
    for (l, layer) in problem.layers.iter().enumerate().filter(|(l, _)| used[*l]) {
        let rows = layer.source.read(range.clone(), &mut buffer)?;
        let margin = pack_columns(problem.isa, &rows, &problem.frames[l], &mut out[layout.layer(l)]);
        problem.check(l, &rows, range.start, &margin)?;
        if known.is_none() {
            let heavy = margin.norms.iter().map(|norm| problem.frames[l].is_heavy(*norm));
            is_heavy.iter_mut().zip(heavy).for_each(|(is, heavy)| *is |= heavy);
        }
        margins.push(margin);
    }
    let mut heavy: Vec<Heavy> = (0..range.len())
        .filter(|&i| is_heavy[i])
        .map(|i| Heavy {
            row: range.start + i,
            values: vec![0.0; layout.offsets[problem.layers.len()]],
            norms: margins.iter().map(|m| m.norms[i]).collect(),
        })
        .collect();
    take_out(problem, layout, used, &range, &mut heavy, out)?;
    if used[problem.layers.len()] {
        let out = &mut out[layout.layer(problem.layers.len())];
        let mut norms = vec![0.0; problem.layers.len()];
        for (i, is_heavy) in is_heavy.into_iter().enumerate() {
            let norm = |m: &Margins| if is_heavy { 0.0 } else { m.norms[i] as f32 };
            norms.iter_mut().zip(&margins).for_each(|(to, m)| *to = norm(m));
            pack_step(layout.kernel, &norms, i, out);
        }
    }
    Ok(Packed { margins, heavy })
}

/// Clears the heavy rows of a slab, after keeping what they hold: which they are is known once all layers were read, so where there are
/// any the slab is read again.
fn take_out(
    problem: &Problem<'_>,
    layout: &Layout,
    used: &[bool],
    range: &Range<usize>,
    heavy: &mut [Heavy],
    out: &mut [f32],
) -> Result<()> {
    if heavy.is_empty() {
        return Ok(());
    }
    let mut buffer = Buffer::default();
    for (l, layer) in problem.layers.iter().enumerate().filter(|(l, _)| used[*l]) {
        let rows = layer.source.read(range.clone(), &mut buffer)?;
        let (d, out) = (rows.d(), &mut out[layout.layer(l)]);
        let (zeros, mut sums) = (vec![0.0; d], vec![0.0; d]);
        for heavy in &mut *heavy {
            let i = heavy.row - range.start;
            let values = &mut heavy.values[layout.offsets[l]..][..d];
            problem.frames[l].apply(problem.isa, &rows, i, values, &mut sums);
            pack_step(layout.kernel, &zeros, i, out);
        }
    }
    Ok(())
}

impl Totals {
    fn add(&mut self, margins: &[Margins]) {
        let count = margins.len();
        for (l, a) in margins.iter().enumerate() {
            self.sums[l].iter_mut().zip(&a.sums).for_each(|(total, s)| *total += s);
            self.norms[l] += a.norms.iter().sum::<f64>();
            for (m, b) in margins.iter().enumerate().skip(l) {
                self.norm_products[l * count + m] +=
                    a.norms.iter().zip(&b.norms).map(|(a, b)| a * b).sum::<f64>();
            }
        }
    }
}

/// What one tile adds to the sums of its pair; a tile of norms adds to the pairs of its layer with every other.
enum Part {
    Product { inner: f64, rows: f64 },
    Norms(Vec<f64>),
}

/// Sums over a tile `C`: `|C|^2` and `s' C u`, or `s' C` for the columns of norms.
fn reduce(problem: &Problem<'_>, layout: &Layout, tile: Tile, product: &[f64], totals: &Totals) -> Part {
    let (a, b) = (&layout.blocks[tile.a], &layout.blocks[tile.b]);
    let s = &totals.sums[a.layer][a.columns.clone()];
    if b.layer == problem.layers.len() {
        let mut weighted = vec![0.0; problem.layers.len()];
        for (s, row) in s.iter().zip(product.chunks_exact(TILE)) {
            weighted[b.columns.clone()].iter_mut().zip(row).for_each(|(w, c)| *w += s * c);
        }
        return Part::Norms(weighted);
    }
    let u = &totals.sums[b.layer][b.columns.clone()];
    let (mut inner, mut rows) = (0.0, 0.0);
    // Of a block with itself only what is on and above the diagonal is made; the rest mirrors it.
    let diagonal = tile.a == tile.b;
    for (i, (s, row)) in s.iter().zip(product.chunks_exact(TILE)).enumerate() {
        for (j, (c, u)) in row.iter().zip(u).enumerate().skip(if diagonal { i } else { 0 }) {
            let weight = if diagonal && j > i { 2.0 } else { 1.0 };
            inner += weight * c * c;
            rows += weight * s * c * u;
        }
    }
    Part::Product { inner, rows }
}

impl Part {
    fn add_to(self, out: &mut Sums, layout: &Layout, tile: Tile) {
        let (l, m) = (layout.blocks[tile.a].layer, layout.blocks[tile.b].layer);
        match self {
            Self::Product { inner, rows } => {
                let twice = if l == m && tile.a != tile.b { 2.0 } else { 1.0 };
                out.inner[l * out.layers + m] += twice * inner;
                out.rows[l * out.layers + m] += twice * rows;
            }
            Self::Norms(weighted) => {
                for (m, w) in weighted.into_iter().enumerate() {
                    let both = if l == m { 2.0 } else { 1.0 };
                    out.rows[l.min(m) * out.layers + l.max(m)] -= both * w;
                }
            }
        }
    }
}

/// Takes the diagonal out, for the debiased estimator, and refuses sums that overflowed.
fn finish(problem: &Problem<'_>, totals: &Totals, out: &mut Sums) -> Result<Sums> {
    let debiased = problem.estimator == Estimator::Debiased;
    for (l, sums) in totals.sums.iter().enumerate() {
        out.totals[l] =
            sums.iter().map(|s| s * s).sum::<f64>() - if debiased { totals.norms[l] } else { 0.0 };
    }
    for &(l, m) in &problem.pairs {
        let at = l * out.layers + m;
        if debiased {
            out.inner[at] -= totals.norm_products[at];
            out.rows[at] += totals.norm_products[at];
        }
        if !(out.inner[at].is_finite() && out.rows[at].is_finite()) {
            return Err(too_large(&problem.layers[l].name));
        }
    }
    Ok(out.clone())
}
