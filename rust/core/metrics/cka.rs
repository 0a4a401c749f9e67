//! Linear CKA over all pairs of layers, exact over every row, debiased by default.
//!
//! With Gram matrices `K = X X^T` and `L = Y Y^T` of `n` rows, and with `K~` being `K` with a zero diagonal,
//!
//! ```text
//! HSIC_1(K, L) = [ <K~, L~> + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1 ] / (n(n-3))         debiased, n >= 4
//! HSIC_0(K, L) = [ <K, L>   + 1'K1 1'L1 / n^2            - 2/n     1'KL1   ] / (n-1)^2           biased
//! CKA(X, Y)    = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
//! ```
//!
//! (Song et al., JMLR 2012; Kornblith et al., ICML 2019; Nguyen et al., ICLR 2021.) Three sums a pair are all that is
//! needed: `inner = <K, L>`, `rows = 1'KL1`, `total = 1'K1`. There are two ways to them, which agree in real arithmetic;
//! the cheaper one is taken:
//!
//! * the [feature form](feature) multiplies columns, `|X^T Y|^2`, at a cost of `n d_x d_y` a pair, in a single pass for any
//!   number of rows;
//! * the [Gram form](gram) multiplies rows, `<K, L>`, at `n^2 d / 2` a layer, and wins for `n` below about the sum of widths.
//!
//! Neither writes an n x n matrix. Rows are shifted by a provisional mean first: large offsets cost no digits. What needs
//! whole kernel matrices is apart: the [RBF kernel](rbf) and the [interval].

mod dense;
mod feature;
mod gram;
pub mod interval;
pub mod minibatch;
pub mod rbf;

use crate::error::{Error, Result};
use crate::kernels::gram::{Frame, Margins};
use crate::kernels::isa::Isa;
use crate::rows::Rows;
use crate::scan::{Buffer, Context, Source, map_ordered};

/// Runs of neighbouring rows that the provisional mean is taken from, evenly spread, and their length.
const SAMPLE_RUNS: usize = 16;
const RUN_ROWS: usize = 16;

/// Which HSIC estimator CKA is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// The U-statistic: 0 on average for independent layers, whatever their widths.
    Debiased,
    /// The V-statistic of Kornblith et al.; near 1 for independent layers that are wider than there are rows.
    Biased,
}

impl Estimator {
    /// Fewest rows that it is defined for.
    pub fn min_rows(self) -> usize {
        match self {
            Self::Debiased => 4,
            Self::Biased => 2,
        }
    }

    /// HSIC of `n` rows from its three sums.
    pub fn hsic(self, n: usize, inner: f64, rows: f64, totals: f64) -> f64 {
        let n = n as f64;
        match self {
            Self::Debiased => {
                (inner + totals / ((n - 1.0) * (n - 2.0)) - 2.0 / (n - 2.0) * rows) / (n * (n - 3.0))
            }
            Self::Biased => (inner + totals / (n * n) - 2.0 / n * rows) / ((n - 1.0) * (n - 1.0)),
        }
    }
}

/// One layer's activations, and what messages call them.
#[derive(Clone)]
pub struct Layer<'a> {
    /// Name of the argument.
    pub name: String,
    /// The rows.
    pub source: &'a dyn Source,
}

/// CKA of every layer of `xs` with every layer of `ys`.
#[derive(Clone, Debug)]
pub struct CkaMatrix {
    /// Row-major, one row for each of `xs`.
    pub values: Vec<f64>,
    /// Layers, counted through `xs` and then `ys`, whose HSIC with themselves is not positive; their rows and columns are NaN.
    pub undefined: Vec<usize>,
}

/// The two ways to the sums of HSIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Products of columns.
    Feature,
    /// Products of rows.
    Gram,
}

/// The sums that HSIC is made of, for some pairs of layers.
#[derive(Clone, Debug)]
struct Sums {
    layers: usize,
    inner: Vec<f64>,
    rows: Vec<f64>,
    totals: Vec<f64>,
}

impl Sums {
    fn new(layers: usize) -> Self {
        Self {
            layers,
            inner: vec![0.0; layers * layers],
            rows: vec![0.0; layers * layers],
            totals: vec![0.0; layers],
        }
    }

    fn hsic(&self, estimator: Estimator, n: usize, (l, m): (usize, usize)) -> f64 {
        let at = l.min(m) * self.layers + l.max(m);
        estimator.hsic(n, self.inner[at], self.rows[at], self.totals[l] * self.totals[m])
    }
}

/// What both forms start from.
struct Problem<'a> {
    layers: &'a [Layer<'a>],
    frames: Vec<Frame>,
    /// Pairs `(l, m)` with `l <= m` whose sums are wanted.
    pairs: Vec<(usize, usize)>,
    n: usize,
    estimator: Estimator,
    isa: Isa,
}

impl<'a> Problem<'a> {
    fn new(
        layers: &'a [Layer<'a>],
        pairs: Vec<(usize, usize)>,
        estimator: Estimator,
        min_rows: usize,
        context: &Context<'_>,
    ) -> Result<Self> {
        let n = common_rows(layers, min_rows)?;
        let frames = frames(layers, n, context)?;
        Ok(Self { layers, frames, pairs, n, estimator, isa: Isa::choose()? })
    }
}

impl Problem<'_> {
    fn widths(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().map(|l| l.source.d())
    }

    /// Multiply-adds of each form.
    fn cost(&self, form: Form) -> f64 {
        let n = self.n as f64;
        let width = |l: usize| self.layers[l].source.d() as f64;
        match form {
            Form::Feature => {
                n * self
                    .pairs
                    .iter()
                    .map(|&(l, m)| width(l) * width(m) * if l == m { 0.5 } else { 1.0 })
                    .sum::<f64>()
            }
            Form::Gram => n * n / 2.0 * (self.widths().sum::<usize>() + 2 * self.pairs.len()) as f64,
        }
    }

    /// Refuses rows that are not finite, by name, after packing found a norm that is not.
    fn check(&self, layer: usize, rows: &Rows<'_>, first_row: usize, margins: &Margins) -> Result<()> {
        match margins.norms.iter().position(|norm| !norm.is_finite()) {
            Some(i) => Err(non_finite(&self.layers[layer].name, rows, i, first_row)),
            None => Ok(()),
        }
    }
}

/// Linear CKA of every layer of `xs` with every layer of `ys`; without `ys`, of all pairs of `xs`.
///
/// `form` is chosen by cost when it is `None`. `context.memory_budget` bounds the memory beyond the inputs. The bits of the result
/// depend on the form, so on the budget where the cheaper one does not fit; never on the number of threads.
///
/// # Errors
/// [`Error::Shape`] when layers differ in rows, when there are too few, or when there is no layer; [`Error::NonFinite`];
/// [`Error::Memory`] when the budget has no room for the smallest plan; [`Error::Cancelled`].
pub fn cka_matrix(
    xs: &[Layer<'_>],
    ys: Option<&[Layer<'_>]>,
    estimator: Estimator,
    form: Option<Form>,
    context: &Context<'_>,
) -> Result<CkaMatrix> {
    let layers: Vec<Layer<'_>> = xs.iter().chain(ys.unwrap_or_default()).cloned().collect();
    let problem =
        Problem::new(&layers, pairs(xs.len(), ys.map(<[_]>::len)), estimator, estimator.min_rows(), context)?;
    let cheaper = problem.cost(Form::Gram) < problem.cost(Form::Feature) && gram::fits(&problem, context);
    let sums = match form {
        Some(Form::Gram) => gram::sums(&problem, context)?,
        None if cheaper => gram::sums(&problem, context)?,
        _ => feature::sums(&problem, context)?,
    };
    let hsic = |pair| sums.hsic(estimator, problem.n, pair);
    Ok(ratios(xs.len(), ys.map(<[_]>::len), &hsic))
}

/// The pairs of layers that a matrix needs: its entries, and every layer with itself.
fn pairs(xs: usize, ys: Option<usize>) -> Vec<(usize, usize)> {
    let Some(ys) = ys else {
        return (0..xs).flat_map(|l| (l..xs).map(move |m| (l, m))).collect();
    };
    let entries = (0..xs).flat_map(|l| (xs..xs + ys).map(move |m| (l, m)));
    (0..xs + ys).map(|l| (l, l)).chain(entries).collect()
}

/// CKA from HSIC of the [`pairs`].
fn ratios(xs: usize, ys: Option<usize>, hsic: &dyn Fn((usize, usize)) -> f64) -> CkaMatrix {
    let layers = xs + ys.unwrap_or(0);
    let own: Vec<f64> = (0..layers).map(|l| hsic((l, l))).collect();
    let undefined = (0..layers).filter(|&l| own[l].is_nan() || own[l] <= 0.0).collect();
    let entry = |l: usize, m: usize| {
        let scale = own[l].sqrt() * own[m].sqrt();
        if scale > 0.0 { hsic((l, m)) / scale } else { f64::NAN }
    };
    let columns = if ys.is_some() { xs..layers } else { 0..xs };
    let values =
        (0..xs).flat_map(|l| columns.clone().map(move |m| (l, m))).map(|(l, m)| entry(l, m)).collect();
    CkaMatrix { values, undefined }
}

fn common_rows(layers: &[Layer<'_>], least: usize) -> Result<usize> {
    let Some(first) = layers.first() else {
        return Err(Error::shape("xs", "at least one layer", "none"));
    };
    let n = first.source.n_rows();
    if let Some(other) = layers.iter().find(|l| l.source.n_rows() != n) {
        let expected = format!("{n} rows, as in {}", first.name);
        return Err(Error::shape(&other.name, expected, format!("{} rows", other.source.n_rows())));
    }
    if n < least {
        let found = if n == 0 { "no rows selected".to_owned() } else { format!("{n} rows") };
        return Err(Error::shape(&first.name, format!("at least {least} rows"), found));
    }
    Ok(n)
}

/// The frame of every layer, from rows spread evenly over it.
fn frames(layers: &[Layer<'_>], n: usize, context: &Context<'_>) -> Result<Vec<Frame>> {
    let starts: Vec<usize> = if n <= SAMPLE_RUNS * RUN_ROWS {
        (0..n).step_by(RUN_ROWS).collect()
    } else {
        (0..SAMPLE_RUNS).map(|i| i * (n - RUN_ROWS) / (SAMPLE_RUNS - 1)).collect()
    };
    map_ordered(layers, context, |layer| {
        let d = layer.source.d();
        let mut sample = Vec::with_capacity(starts.len() * RUN_ROWS * d);
        let mut buffer = Buffer::default();
        for &start in &starts {
            let rows = layer.source.read(start..n.min(start + RUN_ROWS), &mut buffer)?;
            let end = sample.len();
            sample.resize(end + rows.n() * d, 0.0);
            rows.widen(0..rows.n(), &mut sample[end..]);
            if let Some(at) = sample[end..].iter().position(|x| !x.is_finite()) {
                return Err(Error::non_finite(&layer.name, sample[end + at], start + at / d, at % d));
            }
        }
        Ok(Frame::of(&sample, d))
    })
}

/// The error for row `i` of `rows`, whose norm is not finite.
fn non_finite(name: &str, rows: &Rows<'_>, i: usize, first_row: usize) -> Error {
    let mut values = vec![0.0; rows.d()];
    rows.widen(i..i + 1, &mut values);
    match values.iter().position(|x| !x.is_finite()) {
        Some(column) => Error::non_finite(name, values[column], first_row + i, column),
        None => too_large(name),
    }
}

/// Values so far beyond the rest that their squares leave the range of `f32`.
fn too_large(name: &str) -> Error {
    Error::NonFinite {
        argument: name.to_owned(),
        found: "values 1e18 times larger than those of the rows sampled first".to_owned(),
    }
}
