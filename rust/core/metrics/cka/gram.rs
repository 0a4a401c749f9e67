//! The Gram form: tiles of `K = X X^T` for every layer at once, multiplied with each other and forgotten.
//!
//! Row tiles are packed once when the memory budget allows, else in bands, every pair of which is packed again. With squared
//! row norms `a`, column sums `s` and `g = X s`, the remaining sums are `1'K1 = 1'g` and `1'KL1 = g'h`, and the same with
//! `g - a` in place of `g` once the diagonal is taken out.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Estimator, Problem, Sums, too_large};
use crate::error::{Error, Result};
use crate::kernels::gram::{
    DEPTH, Margins, TILE, TILE_LEN, add_slab, dot, mirror, pack_rows, side_of, slab_len,
};
use crate::kernels::panel::{Kernel, Side};
use crate::memory::Aligned;
use crate::scan::{Buffer, Context, grid, map_ordered, map_pieces, reduce_ordered};

/// Tiles that one task computes, one after the other, in the same memory.
const STRIP_TILES: usize = 4;
/// Elements of the tiles of all layers that are multiplied while they are in cache.
const SEGMENT: usize = 1024;

/// Where the layers lie within a packed row tile.
pub(super) struct Layout {
    kernel: Kernel,
    first: Vec<usize>,
}

impl Layout {
    pub(super) fn new(problem: &Problem<'_>) -> Self {
        let (kernel, mut first) = (Kernel::of(problem.isa), vec![0]);
        for d in problem.widths() {
            first.push(first[first.len() - 1] + d.div_ceil(DEPTH) * slab_len(kernel, TILE));
        }
        Self { kernel, first }
    }

    pub(super) fn tile_len(&self) -> usize {
        self.first[self.first.len() - 1]
    }

    fn layer(&self, l: usize) -> Range<usize> {
        self.first[l]..self.first[l + 1]
    }

    /// Row tiles in a band, so that two bands fit into the budget; 0 when not even two tiles do. The tiles that threads
    /// hold come on top: counting them would make the choice of form, and with it the bits, depend on the threads.
    fn band(&self, problem: &Problem<'_>, context: &Context<'_>) -> usize {
        let tiles = problem.n.div_ceil(TILE);
        let room = context.memory_budget / (self.tile_len() * size_of::<f32>());
        if room >= tiles { tiles } else { room / 2 }
    }
}

/// Whether the Gram form fits into the memory budget.
pub fn fits(problem: &Problem<'_>, context: &Context<'_>) -> bool {
    Layout::new(problem).band(problem, context) > 0
}

/// Bytes that `rows` rows take once all are packed.
pub fn packed_bytes(problem: &Problem<'_>, rows: usize) -> usize {
    rows.div_ceil(TILE).saturating_mul(Layout::new(problem).tile_len() * size_of::<f32>())
}

/// A packed band of row tiles.
pub(super) struct Band {
    tiles: Range<usize>,
    values: Aligned<f32>,
    pub(super) margins: Vec<Vec<Margins>>,
}

/// A row tile of a band, packed, all layers.
#[derive(Clone, Copy)]
pub(super) struct RowTile<'a> {
    index: usize,
    rows: usize,
    values: &'a [f32],
}

impl Band {
    /// Row tile `index` of all rows.
    pub(super) fn tile(&self, problem: &Problem<'_>, layout: &Layout, index: usize) -> RowTile<'_> {
        let start = (index - self.tiles.start) * layout.tile_len();
        let rows = (problem.n - index * TILE).min(TILE);
        RowTile { index, rows, values: &self.values[start..start + layout.tile_len()] }
    }
}

/// The sums of HSIC by the Gram form.
pub fn sums(problem: &Problem<'_>, context: &Context<'_>) -> Result<Sums> {
    let layout = Layout::new(problem);
    let band_tiles = layout.band(problem, context);
    if band_tiles == 0 {
        return Err(Error::Memory {
            what: "the Gram form of CKA".to_owned(),
            needed: 2 * layout.tile_len() * size_of::<f32>(),
            budget: context.memory_budget,
            hint: "Raise memory_budget or compare fewer layers at once".to_owned(),
        });
    }
    let bands: Vec<Range<usize>> = grid(problem.n.div_ceil(TILE), band_tiles).collect();
    // One line a row tile, which meets its columns in ascending order whatever the bands: the bits do not depend on them.
    let mut inner = vec![0.0; problem.n.div_ceil(TILE) * problem.pairs.len()];
    let mut margins: Vec<Margins> = problem.widths().map(Margins::of_width).collect();
    for (i, tiles) in bands.iter().enumerate() {
        let mut own = pack(problem, &layout, tiles.clone(), context)?;
        for tile in own.margins.drain(..) {
            margins.iter_mut().zip(&tile).for_each(|(all, tile)| all.append(tile));
        }
        multiply(problem, &layout, (&own, &own), &mut inner, context)?;
        for tiles in &bands[i + 1..] {
            let other = pack(problem, &layout, tiles.clone(), context)?;
            multiply(problem, &layout, (&own, &other), &mut inner, context)?;
        }
        let rest = 1.0 - ((bands.len() - i - 1) as f64 / bands.len() as f64).powi(2);
        context.done.store((rest * problem.n as f64) as u64, Ordering::Relaxed);
    }
    let mut total = vec![0.0; problem.pairs.len()];
    for line in inner.chunks_exact(total.len()) {
        total.iter_mut().zip(line).for_each(|(total, p)| *total += p);
    }
    finish(problem, &total, &margins, context)
}

pub(super) fn pack(
    problem: &Problem<'_>,
    layout: &Layout,
    tiles: Range<usize>,
    context: &Context<'_>,
) -> Result<Band> {
    let mut values = Aligned::zeros(tiles.len() * layout.tile_len());
    let margins = map_pieces(&mut values, layout.tile_len(), context, |i, out| {
        let first = (tiles.start + i) * TILE;
        let (mut buffer, mut block) = (Buffer::default(), Vec::new());
        let mut margins = Vec::with_capacity(problem.layers.len());
        for (l, layer) in problem.layers.iter().enumerate() {
            let rows = layer.source.read(first..problem.n.min(first + TILE), &mut buffer)?;
            let out = &mut out[layout.layer(l)];
            let margin = pack_rows(problem.isa, &rows, &problem.frames[l], &mut block, out);
            problem.check(l, &rows, first, &margin)?;
            margins.push(margin);
        }
        Ok(margins)
    })?;
    Ok(Band { tiles, values, margins })
}

/// Adds `<K~, L~>` over all tiles of two bands, on and above the diagonal, to the lines of `inner`.
fn multiply(
    problem: &Problem<'_>,
    layout: &Layout,
    (rows, columns): (&Band, &Band),
    inner: &mut [f64],
    context: &Context<'_>,
) -> Result<()> {
    let mut strips = Vec::new();
    for i in rows.tiles.clone() {
        let from = columns.tiles.start.max(i);
        strips.extend((from..columns.tiles.end).step_by(STRIP_TILES).map(|j| (i, j)));
    }
    let work = |&(i, from): &(usize, usize)| {
        let mut tiles = Aligned::zeros(problem.layers.len() * TILE_LEN);
        (from..columns.tiles.end.min(from + STRIP_TILES))
            .map(|j| {
                context.check()?;
                let tile = (rows.tile(problem, layout, i), columns.tile(problem, layout, j));
                Ok(tile_products(problem, layout, tile, &mut tiles))
            })
            .collect::<Result<Vec<_>>>()
    };
    reduce_ordered(&strips, context, work, |&(i, _), products| {
        let line = &mut inner[i * problem.pairs.len()..][..problem.pairs.len()];
        for product in products {
            line.iter_mut().zip(product).for_each(|(total, p)| *total += p);
        }
        Ok(())
    })
}

/// The tile of the Gram matrix of layer `l` that two row tiles make.
pub(super) fn gram_tile(
    problem: &Problem<'_>,
    layout: &Layout,
    l: usize,
    (a, b): (RowTile<'_>, RowTile<'_>),
    tile: &mut [f64],
) {
    tile.fill(0.0);
    let (kernel, d, diagonal) = (layout.kernel, problem.layers[l].source.d(), a.index == b.index);
    let left = side_of(kernel, Side::Left, TILE, 0..a.rows);
    let right = side_of(kernel, Side::Right, TILE, 0..b.rows);
    let [a, b] = [a, b].map(|rows| rows.values[layout.layer(l)].chunks_exact(slab_len(kernel, TILE)));
    for (slab, (a, b)) in a.zip(b).enumerate() {
        let depth = (d - slab * DEPTH).min(DEPTH);
        add_slab(kernel, &a[left.clone()], &b[right.clone()], depth, diagonal, tile);
    }
    if diagonal {
        mirror(tile);
    }
}

/// `<K~, L~>` over one tile, for every pair of layers; a tile above the diagonal stands for the one below as well.
fn tile_products(
    problem: &Problem<'_>,
    layout: &Layout,
    (a, b): (RowTile<'_>, RowTile<'_>),
    tiles: &mut [f64],
) -> Vec<f64> {
    let diagonal = a.index == b.index;
    for (l, tile) in tiles.chunks_exact_mut(TILE_LEN).enumerate() {
        gram_tile(problem, layout, l, (a, b), tile);
        if diagonal {
            (0..TILE).for_each(|i| tile[i * TILE + i] = 0.0);
        }
    }
    let weight = if diagonal { 1.0 } else { 2.0 };
    let mut products = vec![0.0; problem.pairs.len()];
    for segment in (0..TILE_LEN).step_by(SEGMENT) {
        let part = |l: usize| &tiles[l * TILE_LEN + segment..][..SEGMENT];
        for (product, &(l, m)) in products.iter_mut().zip(&problem.pairs) {
            *product += weight * dot(problem.isa, part(l), part(m));
        }
    }
    products
}

/// The sums that need no Gram matrix, from norms and projections of the rows.
fn finish(problem: &Problem<'_>, inner: &[f64], margins: &[Margins], context: &Context<'_>) -> Result<Sums> {
    let debiased = problem.estimator == Estimator::Debiased;
    let count = problem.layers.len();
    let layers: Vec<usize> = (0..count).collect();
    let row_sums = map_ordered(&layers, context, |&l| {
        let mut row_sums = project(problem, l, &margins[l].sums)?;
        if debiased {
            row_sums.iter_mut().zip(&margins[l].norms).for_each(|(g, a)| *g -= a);
        }
        Ok(row_sums)
    })?;
    let mut out = Sums::new(count);
    for (&(l, m), inner) in problem.pairs.iter().zip(inner) {
        let diagonal = if debiased { 0.0 } else { dot(problem.isa, &margins[l].norms, &margins[m].norms) };
        out.inner[l * count + m] = inner + diagonal;
        out.rows[l * count + m] = dot(problem.isa, &row_sums[l], &row_sums[m]);
        if !inner.is_finite() {
            return Err(too_large(&problem.layers[l].name));
        }
    }
    for (total, row_sums) in out.totals.iter_mut().zip(&row_sums) {
        *total = row_sums.iter().sum();
    }
    Ok(out)
}

/// `X s`: the row sums of the Gram matrix.
fn project(problem: &Problem<'_>, layer: usize, sums: &[f64]) -> Result<Vec<f64>> {
    let mut buffer = Buffer::default();
    let mut out = Vec::with_capacity(problem.n);
    let mut row = vec![0.0; sums.len()];
    for range in grid(problem.n, DEPTH) {
        let rows = problem.layers[layer].source.read(range, &mut buffer)?;
        for i in 0..rows.n() {
            rows.widen(i..i + 1, &mut row);
            out.push(problem.frames[layer].project(problem.isa, &row, sums));
        }
    }
    Ok(out)
}
