//! Decoder cosines of equal index, and the best matches between dictionaries.
//!
//! Matching ranks the rows `w` of `b` by `x'w / |w|` for every row `x` of `a`: the product has a certified low-precision
//! screen before it and `f64` behind it (see [`gemm`](crate::kernels::gemm)), so the result is that of ranking all pairs in
//! `f64`, ties to the lower row.

mod search;
mod sketch;

use std::ops::Range;

use self::search::Search;

use crate::error::{Error, Result};
use crate::kernels::cosine::dots;
use crate::kernels::gemm::tile::COLS;
use crate::kernels::gemm::{Certificate, Dictionary, Plan, Terms};
use crate::kernels::isa::Isa;
use crate::kernels::topk::Scored;
use crate::rows::Rows;
use crate::scan::pack::pack_features;
use crate::scan::{Context, fill_pieces, grid, map_ordered};

/// Rows per task where every row is one cosine.
const BLOCK_ROWS: usize = 256;
/// Least rows of `b` packed at once.
const CHUNK_ROWS: usize = 1024;

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
    let isa = Isa::choose()?;
    let mut out = vec![0.0; a.n()];
    fill_pieces(&mut out, BLOCK_ROWS, context, |i, piece| {
        let range = i * BLOCK_ROWS..i * BLOCK_ROWS + piece.len();
        let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
        let (x, y) = (a.slice(range.clone()).floats(&mut of_a), b.slice(range.clone()).floats(&mut of_b));
        for (j, (value, (x, y))) in piece.iter_mut().zip(x.chunks(a.d()).zip(y.chunks(b.d()))).enumerate() {
            let (ab, aa, bb) = dots(isa, x, y);
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
/// # Errors
/// [`Error::Shape`] when the widths differ or `k` is not in `1..=b.n()`; [`Error::NonFinite`]; [`Error::Refused`] when the system has
/// less memory than `b` takes packed; [`Error::Cancelled`].
pub fn match_rows(
    a: Rows<'_>,
    b: Rows<'_>,
    k: usize,
    names: [&str; 2],
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
    let plan = Plan::new(d, Certificate::Deterministic, None)?;
    let lengths_a = lengths(plan.isa(), a, names[0], context)?;
    let lengths_b = lengths(plan.isa(), b, names[1], context)?;
    let (zero_a, zero_b) = (zeros(&lengths_a), zeros(&lengths_b));
    let used_b: Vec<usize> = (0..b.n()).filter(|&i| lengths_b[i] > 0.0).collect();
    // A packed row is its f32 and, at most, as many words; and its sketch the same of half of the width.
    let chunk = (context.memory_budget / (12 * d)).max(CHUNK_ROWS).next_multiple_of(COLS);
    let mut best: Vec<Vec<Scored>> = vec![Vec::new(); a.n()];
    for rows in used_b.chunks(chunk) {
        let dictionary = pack(&plan, b, &lengths_b, rows, context)?;
        let k_here = k.min(dictionary.n_features());
        let search = Search { dictionary: &dictionary, rows: a, lengths: &lengths_a, k: k_here, context };
        let found = search.run()?;
        for (best, found) in best.iter_mut().zip(found) {
            best.extend(found.into_iter().map(|s| Scored { feature: rows[s.feature as usize] as u32, ..s }));
            best.sort_by(Scored::order);
            best.truncate(k);
        }
    }
    let mut out =
        Matches { indices: vec![-1; a.n() * k], cosines: vec![f64::NAN; a.n() * k], zero_a, zero_b };
    let slots = out.indices.chunks_mut(k).zip(out.cosines.chunks_mut(k));
    for (((indices, cosines), best), length) in slots.zip(best).zip(lengths_a).filter(|(_, l)| *l > 0.0) {
        for ((index, cosine), scored) in indices.iter_mut().zip(cosines).zip(best) {
            (*index, *cosine) = (i64::from(scored.feature), scored.rank / length);
        }
    }
    Ok(out)
}

/// The listed rows as a dictionary that ranks by `x'w / |w|`. Short rows are lengthened by powers of two, which changes no bit of
/// a rank: a screen allows for what f32 loses below its range, and the factor `1 / |w|` would make that more than any score.
fn pack(
    plan: &Plan,
    b: Rows<'_>,
    lengths: &[f64],
    rows: &[usize],
    context: &Context<'_>,
) -> Result<Dictionary> {
    pack_features(plan, rows.len(), context, |p, values| {
        let mut terms = Terms::default();
        for ((value, weight), &row) in values.chunks_mut(b.d()).zip(&mut terms.weight).zip(&rows[p * COLS..])
        {
            b.widen(row..row + 1, value);
            let factor = (-lengths[row].log2().floor()).max(0.0).exp2();
            for v in &mut *value {
                *v = (f64::from(*v) * factor) as f32;
            }
            *weight = 1.0 / (lengths[row] * factor);
        }
        Ok(terms)
    })
}

fn zeros(lengths: &[f64]) -> Vec<usize> {
    (0..lengths.len()).filter(|&i| lengths[i] == 0.0).collect()
}

/// Lengths of all rows.
fn lengths(isa: Isa, rows: Rows<'_>, name: &str, context: &Context<'_>) -> Result<Vec<f64>> {
    let blocks: Vec<Range<usize>> = grid(rows.n(), BLOCK_ROWS).collect();
    let parts = map_ordered(&blocks, context, |range| {
        let mut buffer = Vec::new();
        let values = rows.slice(range.clone()).floats(&mut buffer);
        let lengths = values.chunks(rows.d()).enumerate().map(|(i, row)| {
            let squared = dots(isa, row, row).0;
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
