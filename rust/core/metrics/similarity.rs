//! Decoder cosines of equal index, and the best matches between dictionaries.
//!
//! Matching screens all pairs of rows with a certified bound and scores what is left open in `f64`
//! (see [`cosine`](crate::kernels::cosine)): the result is that of computing every cosine in `f64`, ties to the lower index.

use crate::error::{Error, Result};
use crate::kernels::cosine::{Candidates, Screen, cosine, dots};
use crate::kernels::tile::{PANEL, PRODUCT, Word};
use crate::rows::Rows;
use crate::scan::{Context, fill_pieces, grid, map_ordered, map_pieces};

/// Rows per task where every row is one cosine.
const BLOCK_ROWS: usize = 256;
/// Rows of `a` that meet a panel of `b` while it is in cache.
const STRIP_ROWS: usize = 4 * PANEL;
/// Least rows of `b` packed at once.
const CHUNK_ROWS: usize = 32 * PANEL;

/// The best matches of every row.
#[derive(Clone, Debug)]
pub struct Matches {
    /// `k` rows of `b` for each row of `a`, best first; -1 where there is none.
    pub indices: Vec<i64>,
    /// Their cosines; NaN where there is none.
    pub cosines: Vec<f64>,
    /// Rows of `a` that are zero.
    pub zero_a: Vec<usize>,
    /// Rows of `b` that are zero, which match nothing.
    pub zero_b: Vec<usize>,
}

/// Cosine of row `i` of `a` with row `i` of `b`, in `f64`; NaN where one of them is zero.
///
/// # Errors
/// [`Error::Shape`] when the shapes differ; [`Error::NonFinite`]; [`Error::Cancelled`].
pub fn row_cosines(a: Rows<'_>, b: Rows<'_>, names: [&str; 2], context: &Context<'_>) -> Result<Vec<f64>> {
    if (a.n(), a.d()) != (b.n(), b.d()) {
        let expected = format!("shape ({}, {}), as {}", a.n(), a.d(), names[0]);
        return Err(Error::shape(names[1], expected, format!("shape ({}, {})", b.n(), b.d())));
    }
    let mut out = vec![0.0; a.n()];
    fill_pieces(&mut out, BLOCK_ROWS, context, |i, piece| {
        let range = i * BLOCK_ROWS..i * BLOCK_ROWS + piece.len();
        let (x, y) = (widened(a, range.clone()), widened(b, range.clone()));
        for (j, (value, (x, y))) in piece.iter_mut().zip(x.chunks(a.d()).zip(y.chunks(b.d()))).enumerate() {
            let (ab, aa, bb) = dots(x, y);
            check(names[0], aa, x, range.start + j)?;
            check(names[1], bb, y, range.start + j)?;
            *value = ab / (aa.sqrt() * bb.sqrt());
        }
        Ok(())
    })?;
    Ok(out)
}

/// The `k` rows of `b` with the largest cosine for every row of `a`, exactly; of equal cosines the lower row.
///
/// `word` forces what the screen rounds to; the result does not depend on it.
///
/// # Errors
/// [`Error::Shape`] when the widths differ or `k` is not in `1..=b.n()`; [`Error::NonFinite`]; [`Error::Cancelled`].
pub fn match_rows(
    a: Rows<'_>,
    b: Rows<'_>,
    k: usize,
    names: [&str; 2],
    word: Option<Word>,
    context: &Context<'_>,
) -> Result<Matches> {
    let d = a.d();
    if b.d() != d {
        return Err(Error::shape(
            names[1],
            format!("width {d}, as {}", names[0]),
            format!("width {}", b.d()),
        ));
    }
    if k == 0 || k > b.n() {
        return Err(Error::shape("k", format!("1 to {}, the rows of {}", b.n(), names[1]), k.to_string()));
    }
    let screen = word.and_then(|word| Screen::with(word, d)).unwrap_or_else(|| Screen::best(d));
    let (norms_a, norms_b) = (norms(a, names[0], context)?, norms(b, names[1], context)?);
    let (used_a, used_b) = (nonzero(&norms_a), nonzero(&norms_b));
    let problem =
        Problem { a, b, norms_a: &norms_a, norms_b: &norms_b, used_a: &used_a, used_b: &used_b, k, screen };
    let mut strips = problem.screen(context)?;
    let best = problem.score(&mut strips, context)?;

    let mut out = Matches {
        indices: vec![-1; a.n() * k],
        cosines: vec![f64::NAN; a.n() * k],
        zero_a: (0..a.n()).filter(|&i| norms_a[i] == 0.0).collect(),
        zero_b: (0..b.n()).filter(|&i| norms_b[i] == 0.0).collect(),
    };
    for (&row, matches) in used_a.iter().zip(best) {
        for (slot, (cosine, index)) in matches.into_iter().enumerate() {
            out.indices[row as usize * k + slot] = i64::from(index);
            out.cosines[row as usize * k + slot] = cosine;
        }
    }
    Ok(out)
}

/// Two dictionaries without their zero rows.
struct Problem<'a> {
    a: Rows<'a>,
    b: Rows<'a>,
    norms_a: &'a [f64],
    norms_b: &'a [f64],
    used_a: &'a [u32],
    used_b: &'a [u32],
    k: usize,
    screen: Screen,
}

/// Candidates of the rows of one strip of `a`.
type Strip = Vec<Candidates>;

impl Problem<'_> {
    /// The candidates of every row, in strips.
    fn screen(&self, context: &Context<'_>) -> Result<Vec<Strip>> {
        let panel_bytes = self.screen.panel_words() * size_of::<u32>();
        let affordable = context.memory_budget / panel_bytes * PANEL;
        let chunk = affordable.max(CHUNK_ROWS).next_multiple_of(PANEL);
        let mut strips: Vec<Strip> = vec![Vec::new(); self.used_a.len().div_ceil(STRIP_ROWS)];
        for (c, used) in self.used_b.chunks(chunk).enumerate() {
            let (packed, error_b) = self.pack(self.b, self.norms_b, used, context)?;
            fill_pieces(&mut strips, 1, context, |s, strip| {
                self.screen_strip(s, &mut strip[0], &packed, (c * chunk, used.len()), error_b, context)
            })?;
        }
        Ok(strips)
    }

    /// Screens one strip of `a` against packed rows of `b`, the first of which has number `first`.
    fn screen_strip(
        &self,
        number: usize,
        strip: &mut Strip,
        packed: &[u32],
        (first, count): (usize, usize),
        error_b: f64,
        context: &Context<'_>,
    ) -> Result<()> {
        let rows = &self.used_a[number * STRIP_ROWS..self.used_a.len().min((number + 1) * STRIP_ROWS)];
        let words = self.screen.panel_words();
        let mut panels = vec![0_u32; rows.len().div_ceil(PANEL) * words];
        let mut error_a = 0.0_f64;
        for (rows, panel) in rows.chunks(PANEL).zip(panels.chunks_exact_mut(words)) {
            error_a = error_a.max(self.pack_panel(self.a, self.norms_a, rows, panel));
        }
        strip.resize(rows.len(), Candidates::new(self.k));
        strip.iter_mut().for_each(|candidates| candidates.allow(self.screen.bound(error_a, error_b)));
        let mut product = [0.0_f32; PRODUCT];
        for (p, b) in packed.chunks_exact(words).enumerate() {
            context.check()?;
            let valid = (count - p * PANEL).min(PANEL);
            for (a, strip) in panels.chunks_exact(words).zip(strip.chunks_mut(PANEL)) {
                self.screen.product(a, b, &mut product);
                for (candidates, values) in strip.iter_mut().zip(product.chunks_exact(PANEL)) {
                    candidates.offer(&values[..valid], first + p * PANEL);
                }
            }
        }
        Ok(())
    }

    /// The k best of the candidates of every row, by their cosines in `f64`.
    fn score(&self, strips: &mut [Strip], context: &Context<'_>) -> Result<Vec<Vec<(f64, u32)>>> {
        let scored = map_pieces(strips, 1, context, |s, strip| {
            let mut x = vec![0.0; self.a.d()];
            let mut y = x.clone();
            let mut out = Vec::with_capacity(STRIP_ROWS);
            for (i, candidates) in strip[0].iter_mut().enumerate() {
                let row = self.used_a[s * STRIP_ROWS + i] as usize;
                self.a.widen(row..row + 1, &mut x);
                let mut best: Vec<(f64, u32)> = candidates
                    .finish()
                    .into_iter()
                    .map(|candidate| {
                        let index = self.used_b[candidate as usize];
                        self.b.widen(index as usize..index as usize + 1, &mut y);
                        (cosine(&x, &y) + 0.0, index)
                    })
                    .collect();
                best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                best.truncate(self.k);
                out.push(best);
            }
            Ok(out)
        })?;
        Ok(scored.into_iter().flatten().collect())
    }

    /// Packed rows, and the largest rounding error among them.
    fn pack(
        &self,
        rows: Rows<'_>,
        norms: &[f64],
        used: &[u32],
        context: &Context<'_>,
    ) -> Result<(Vec<u32>, f64)> {
        let words = self.screen.panel_words();
        let mut packed = vec![0; used.len().div_ceil(PANEL) * words];
        let errors = map_pieces(&mut packed, words, context, |p, panel| {
            Ok(self.pack_panel(rows, norms, &used[p * PANEL..used.len().min((p + 1) * PANEL)], panel))
        })?;
        Ok((packed, errors.into_iter().fold(0.0, f64::max)))
    }

    fn pack_panel(&self, rows: Rows<'_>, norms: &[f64], used: &[u32], panel: &mut [u32]) -> f64 {
        let d = rows.d();
        let mut values = vec![0.0; used.len() * d];
        let mut lengths = Vec::with_capacity(used.len());
        for (value, &row) in values.chunks_exact_mut(d).zip(used) {
            rows.widen(row as usize..row as usize + 1, value);
            lengths.push(norms[row as usize]);
        }
        self.screen.pack(&values, &lengths, panel)
    }
}

fn nonzero(norms: &[f64]) -> Vec<u32> {
    (0..norms.len() as u32).filter(|&i| norms[i as usize] > 0.0).collect()
}

fn widened(rows: Rows<'_>, range: std::ops::Range<usize>) -> Vec<f32> {
    let mut out = vec![0.0; range.len() * rows.d()];
    rows.widen(range, &mut out);
    out
}

/// Lengths of all rows.
fn norms(rows: Rows<'_>, name: &str, context: &Context<'_>) -> Result<Vec<f64>> {
    let blocks: Vec<_> = grid(rows.n(), BLOCK_ROWS).collect();
    let parts = map_ordered(&blocks, context, |range| {
        let values = widened(rows, range.clone());
        let lengths = values.chunks(rows.d()).enumerate().map(|(i, row)| {
            let squared = dots(row, row).0;
            check(name, squared, row, range.start + i)?;
            Ok(squared.sqrt())
        });
        lengths.collect::<Result<Vec<f64>>>()
    })?;
    Ok(parts.concat())
}

fn check(name: &str, squared: f64, row: &[f32], i: usize) -> Result<()> {
    if squared.is_finite() {
        return Ok(());
    }
    let column = row.iter().position(|x| !x.is_finite()).unwrap_or(0);
    Err(Error::non_finite(name, row[column], i, column))
}
