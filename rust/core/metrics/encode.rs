//! Sparse codes of activations: which features of a dictionary fire, and how strongly.
//!
//! The pre-activation of feature `j` is `(x − b_dec) · W_enc[:, j] + b_enc[j]` of the stored numbers, computed in f64 as
//! `x · W_enc[:, j] + (b_enc[j] − b_dec · W_enc[:, j])` and rounded to f32. What fires is said by [`Activation`]:
//!
//! * Top-K keeps the k largest positive ones of a row (Gao et al., arXiv 2406.04093),
//! * Batch Top-K the `k · n` largest positive ones of all `n` rows together (Bussmann et al., arXiv 2412.06410),
//! * `JumpReLU` those above the feature's threshold (Rajamanoharan et al., arXiv 2407.14435), and `ReLU` those above zero.
//!
//! With norms, Top-K and Batch Top-K rank by pre-activation times norm and still return the pre-activation.

use crate::error::{Error, Result};
use crate::kernels::gemm::dot::dot;
use crate::kernels::gemm::tile::COLS;
use crate::kernels::gemm::{Certificate, Dictionary, Plan, Scored, Space, Terms, Wanted};
use crate::kernels::isa::Isa;
use crate::rows::{Data, Rows};

/// What of the pre-activations fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The k largest positive ones of each row.
    TopK(usize),
    /// The `k · n` largest positive ones of all rows.
    BatchTopK(usize),
    /// Those above the feature's threshold.
    JumpRelu,
    /// Those above zero.
    Relu,
}

/// The weights of an encoder, as stored.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `(d_in, d_sae)`.
    pub w_enc: Rows<'a>,
    /// `(d_sae,)`, or nothing for zero.
    pub b_enc: Option<&'a [f32]>,
    /// `(d_in,)`, subtracted from every row first.
    pub b_dec: Option<&'a [f32]>,
    /// `(d_sae,)`, positive: factors of the ranks.
    pub norms: Option<&'a [f32]>,
    /// `(d_sae,)`, for [`Activation::JumpRelu`].
    pub threshold: Option<&'a [f32]>,
}

/// An encoder with its weights packed.
#[derive(Debug)]
pub struct Encoder {
    dictionary: Dictionary,
    activation: Activation,
}

/// Weights on their way into an [`Encoder`], panel by panel.
#[derive(Debug)]
pub struct Packing<'a> {
    weights: Weights<'a>,
    activation: Activation,
    plan: Plan,
}

/// Memory of one worker.
#[derive(Debug, Default)]
pub struct Workspace {
    x: Vec<f32>,
    /// Memory and counts of the selection.
    pub space: Space,
}

/// Codes of a block with as many entries per row as fired.
#[derive(Debug, Default)]
pub struct RaggedBlock {
    /// Entries of each row.
    pub counts: Vec<u32>,
    /// The entries, row by row, largest activation first.
    pub entries: Vec<Scored>,
}

impl<'a> Packing<'a> {
    /// Checks shapes and ranges, and decides how to round.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::NonFinite`] naming the argument.
    pub fn new(weights: Weights<'a>, activation: Activation, certificate: Certificate) -> Result<Self> {
        let (d_in, d_sae) = (weights.w_enc.n(), weights.w_enc.d());
        if d_in == 0 {
            return Err(Error::shape("W_enc", "at least one row", format!("shape (0, {d_sae})")));
        }
        if let Activation::TopK(k) | Activation::BatchTopK(k) = activation
            && (k == 0 || k > d_sae)
        {
            return Err(Error::shape("k", format!("1 to d_sae = {d_sae}"), k.to_string()));
        }
        if u32::try_from(d_sae).is_err() {
            return Err(Error::shape("W_enc", "fewer than 2^32 features", format!("{d_sae}")));
        }
        check_vector("b_enc", weights.b_enc, d_sae)?;
        check_vector("b_dec", weights.b_dec, d_in)?;
        check_vector("norms", weights.norms, d_sae)?;
        check_vector("threshold", weights.threshold, d_sae)?;
        if let Some((j, norm)) =
            weights.norms.unwrap_or_default().iter().enumerate().find(|(_, n)| **n <= 0.0)
        {
            return Err(Error::shape("norms", "positive values", format!("{norm} at {j}")));
        }
        let plan = Plan::new(d_in, certificate, weights.b_dec.map(<[f32]>::to_vec))?;
        Ok(Self { weights, activation, plan })
    }

    /// How features and rows are rounded, and how many features there are.
    pub fn shape(&self) -> (&Plan, usize) {
        (&self.plan, self.weights.w_enc.d())
    }

    /// Writes the features of panel `p`, row-major; returns what belongs to them.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a weight is NaN or infinite.
    pub fn fill(&self, p: usize, rows: &mut [f32]) -> Result<Terms> {
        let (d_in, d_sae) = (self.weights.w_enc.n(), self.weights.w_enc.d());
        let columns = p * COLS..d_sae.min((p + 1) * COLS);
        let width = columns.len();
        let mut line = [0.0; COLS];
        for i in 0..d_in {
            let start = i * d_sae;
            widen(self.weights.w_enc.data(), start + columns.start..start + columns.end, &mut line[..width]);
            if let Some((c, v)) = line[..width].iter().enumerate().find(|(_, v)| !v.is_finite()) {
                return Err(Error::non_finite("W_enc", *v, i, columns.start + c));
            }
            for (c, v) in line[..width].iter().enumerate() {
                rows[c * d_in + i] = *v;
            }
        }
        let thresholds = self.weights.threshold.filter(|_| self.activation == Activation::JumpRelu);
        let mut terms = Terms::default();
        for (c, j) in columns.enumerate() {
            let feature = &rows[c * d_in..(c + 1) * d_in];
            let centre = self.weights.b_dec.map_or(0.0, |b| dot(self.plan.isa(), b, feature));
            terms.bias[c] = self.weights.b_enc.map_or(0.0, |b| f64::from(b[j])) - centre;
            terms.weight[c] = self.weights.norms.map_or(1.0, |n| f64::from(n[j]));
            terms.threshold[c] = thresholds.map_or(0.0, |t| f64::from(t[j]).max(0.0));
        }
        Ok(terms)
    }

    /// The encoder of the packed features.
    pub fn finish(self, dictionary: Dictionary) -> Encoder {
        Encoder { dictionary, activation: self.activation }
    }
}

impl Encoder {
    /// What fires.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Width of the input.
    pub fn d_in(&self) -> usize {
        self.dictionary.plan().d()
    }

    /// Number of features.
    pub fn d_sae(&self) -> usize {
        self.dictionary.n_features()
    }

    /// The packed dictionary.
    pub fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// Writes the Top-K codes of a block: `k` slots per row, largest first, empty slots 0.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with row (counted from the start of the scan) and column.
    pub fn fill(
        &self,
        rows: Rows<'_>,
        first_row: usize,
        k: usize,
        work: &mut Workspace,
        indices: &mut [u32],
        values: &mut [f32],
    ) -> Result<()> {
        self.select(rows, first_row, Wanted::Best { k, positive: true }, work)?;
        for (i, (indices, values)) in indices.chunks_exact_mut(k).zip(values.chunks_exact_mut(k)).enumerate()
        {
            indices.fill(0);
            values.fill(0.0);
            let mut members: Vec<_> = work.space.found(i).to_vec();
            members.sort_unstable_by(by_activation);
            for ((index, value), member) in indices.iter_mut().zip(values).zip(members) {
                (*index, *value) = (member.feature, member.activation as f32);
            }
        }
        Ok(())
    }

    /// All features of a block that fire under `wanted`, row by row.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    pub fn list(
        &self,
        rows: Rows<'_>,
        first_row: usize,
        wanted: Wanted,
        work: &mut Workspace,
    ) -> Result<RaggedBlock> {
        self.select(rows, first_row, wanted, work)?;
        let mut block = RaggedBlock::default();
        for i in 0..rows.n() {
            let start = block.entries.len();
            block.entries.extend_from_slice(work.space.found(i));
            block.entries[start..].sort_unstable_by(by_activation);
            block.counts.push((block.entries.len() - start) as u32);
        }
        Ok(block)
    }

    fn select(&self, rows: Rows<'_>, first_row: usize, wanted: Wanted, work: &mut Workspace) -> Result<()> {
        let x = rows.floats(&mut work.x);
        check_rows(x, rows.d(), first_row)?;
        self.dictionary.select(x, wanted, &mut work.space);
        Ok(())
    }
}

fn by_activation(a: &Scored, b: &Scored) -> std::cmp::Ordering {
    b.activation.total_cmp(&a.activation).then(a.feature.cmp(&b.feature))
}

/// The rank that the `budget` best of `ranks` reach: zero when there are fewer.
pub fn batch_threshold(mut ranks: Vec<f64>, budget: usize) -> f64 {
    if budget == 0 || ranks.len() < budget {
        return 0.0;
    }
    *ranks.select_nth_unstable_by(budget - 1, |a, b| b.total_cmp(a)).1
}

/// Keeps the `budget` entries of highest rank of all blocks, equal ranks by lower row, then by lower feature; returns the least rank
/// that an entry of a later row needs to be kept beside them.
pub fn trim(blocks: &mut [RaggedBlock], budget: usize) -> f64 {
    let total: usize = blocks.iter().map(|b| b.entries.len()).sum();
    if total <= budget {
        return 0.0;
    }
    let ranks: Vec<f64> = blocks.iter().flat_map(|b| &b.entries).map(|e| e.rank).collect();
    let last = batch_threshold(ranks, budget);
    let above = blocks.iter().flat_map(|b| &b.entries).filter(|e| e.rank > last).count();
    let mut ties = budget - above;
    for block in blocks {
        let mut kept = Vec::with_capacity(block.entries.len());
        let mut start = 0;
        for count in &mut block.counts {
            let row = &block.entries[start..start + *count as usize];
            start += row.len();
            let mut tied: Vec<u32> =
                row.iter().filter(|e| e.rank.total_cmp(&last).is_eq()).map(|e| e.feature).collect();
            tied.sort_unstable();
            tied.truncate(ties);
            ties -= tied.len();
            let before = kept.len();
            kept.extend(row.iter().filter(|e| e.rank > last || tied.binary_search(&e.feature).is_ok()));
            *count = (kept.len() - before) as u32;
        }
        kept.shrink_to_fit();
        block.entries = kept;
    }
    last
}

fn check_vector(name: &str, vector: Option<&[f32]>, len: usize) -> Result<()> {
    let Some(vector) = vector else { return Ok(()) };
    if vector.len() != len {
        return Err(Error::shape(name, format!("shape ({len},)"), format!("shape ({},)", vector.len())));
    }
    match vector.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((i, v)) => Err(Error::NonFinite { argument: name.to_owned(), found: format!("{v} at {i}") }),
        None => Ok(()),
    }
}

fn check_rows(x: &[f32], d: usize, first_row: usize) -> Result<()> {
    let infinity = f32::INFINITY.to_bits();
    let largest = x.iter().fold(0, |m, v| v.abs().to_bits().max(m));
    if largest < infinity {
        return Ok(());
    }
    let at = x.iter().position(|v| !v.is_finite()).unwrap_or_default();
    Err(Error::non_finite("x", x[at], first_row + at / d, at % d))
}

fn widen(data: Data<'_>, span: std::ops::Range<usize>, to: &mut [f32]) {
    crate::with_elements!(data, s => crate::Element::widen_slice(&s[span], to));
}

/// The path that a new encoder would take.
///
/// # Errors
/// As [`Isa::choose`].
pub fn path() -> Result<&'static str> {
    Isa::choose().map(|isa| isa.path().name())
}
