//! The chance level of `IoU`, exactly.
//!
//! Two random circuits of `a` and `b` among `n` nodes share `I` of them, and `I` is hypergeometric. `IoU` is a function of it:
//!
//! ```text
//! P(I = i+1) / P(I = i) = (a - i)(b - i) / ((i + 1)(n - a - b + i + 1))          IoU(i) = i / (a + b - i)
//! ```
//!
//! The ratios are followed from the mode in both directions until the terms vanish; dividing by their sum replaces the
//! factorials, so nothing overflows and no digits are lost to differences of large logarithms. Circuits drawn within strata
//! (layers, types, positions) have independent intersections, whose distributions are convolved.

use crate::error::{Error, Result};

/// Terms smaller than this share of the largest are left out: 10^300 of them would not show in an `f64` mean.
const NEGLIGIBLE: f64 = 1e-300;
/// The same within a convolution, where every stratum's tail multiplies the work.
const NEGLIGIBLE_IN_STRATA: f64 = 1e-22;

/// Nodes in a circuit, or left out of it, at most: as many as give ten million terms.
const MOST_NODES: u64 = 1 << 40;

/// Nodes and circuit sizes of one stratum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stratum {
    /// Nodes to choose from.
    pub n: u64,
    /// Size of the first circuit.
    pub a: u64,
    /// Size of the second.
    pub b: u64,
}

/// `IoU` of two random circuits.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    /// Mean.
    pub mean: f64,
    /// Variance.
    pub variance: f64,
    /// Probability of an intersection at least as large as the observed one, 0 where it lies below what the sums keep (some 1e-22 over
    /// several strata); NaN when none was given.
    pub p_value: f64,
}

/// Probabilities of `first, first + 1, ...`; they add up to 1.
struct Distribution {
    first: u64,
    probabilities: Vec<f64>,
}

/// Mean, variance and p-value of the `IoU` of circuits drawn at random within each stratum.
///
/// # Errors
/// [`Error::Shape`] when there is no stratum, or a circuit is larger than its stratum or beyond all reason.
pub fn chance(strata: &[Stratum], intersection: Option<u64>) -> Result<Chance> {
    for stratum in strata {
        for (name, size) in [("size_a", stratum.a), ("size_b", stratum.b)] {
            if size > stratum.n {
                return Err(Error::shape(name, format!("at most n = {}", stratum.n), size.to_string()));
            }
            if size.min(stratum.n - size) > MOST_NODES {
                let expected = format!("at most {MOST_NODES} nodes, or all but as many");
                return Err(Error::shape(name, expected, size.to_string()));
            }
        }
    }
    let total = strata.iter().map(|s| s.a + s.b).sum::<u64>();
    let law = match strata {
        [] => return Err(Error::shape("n", "at least one stratum", "none")),
        [one] => hypergeometric(*one, NEGLIGIBLE),
        many => many
            .iter()
            .map(|s| hypergeometric(*s, NEGLIGIBLE_IN_STRATA))
            .reduce(|a, b| convolve(&a, &b))
            .unwrap_or_else(|| hypergeometric(strata[0], NEGLIGIBLE)),
    };
    let terms = || (law.first..).zip(&law.probabilities).map(|(i, p)| (iou(i, total - i), *p));
    let mean: f64 = terms().map(|(iou, p)| iou * p).sum();
    let variance = terms().map(|(iou, p)| (iou - mean).powi(2) * p).sum();
    // Probabilities add up to 1 but for rounding; of none at all the sum is zero, not negative zero.
    let tail = |least: u64| {
        let above = (law.first..).zip(&law.probabilities).filter(|(i, _)| *i >= least);
        above.fold(0.0, |sum: f64, (_, p)| sum + p).min(1.0)
    };
    Ok(Chance { mean, variance, p_value: intersection.map_or(f64::NAN, tail) })
}

/// `IoU` from the sizes of intersection and union; of two empty sets 1.
pub fn iou(intersection: u64, union: u64) -> f64 {
    if union == 0 { 1.0 } else { intersection as f64 / union as f64 }
}

fn hypergeometric(Stratum { n, a, b }: Stratum, negligible: f64) -> Distribution {
    let (least, most) = ((a + b).saturating_sub(n), a.min(b));
    let mode = ((u128::from(a + 1) * u128::from(b + 1) / u128::from(n + 2)) as u64).clamp(least, most);
    // P(i + 1) / P(i)
    let ratio = |i: u64| (a - i) as f64 * (b - i) as f64 / ((i + 1) as f64 * (n + i + 1 - a - b) as f64);
    let mut above = vec![1.0];
    let mut term = 1.0;
    for i in mode..most {
        term *= ratio(i);
        if term < negligible {
            break;
        }
        above.push(term);
    }
    let mut below = Vec::new();
    term = 1.0;
    for i in (least..mode).rev() {
        term /= ratio(i);
        if term < negligible {
            break;
        }
        below.push(term);
    }
    let first = mode - below.len() as u64;
    let mut probabilities: Vec<f64> = below.into_iter().rev().chain(above).collect();
    // Smallest terms first: the sum is as good as its terms.
    let total: f64 = probabilities.iter().sum();
    for p in &mut probabilities {
        *p /= total;
    }
    Distribution { first, probabilities }
}

fn convolve(a: &Distribution, b: &Distribution) -> Distribution {
    let mut probabilities = vec![0.0; a.probabilities.len() + b.probabilities.len() - 1];
    for (i, p) in a.probabilities.iter().enumerate() {
        for (sum, q) in probabilities[i..].iter_mut().zip(&b.probabilities) {
            *sum += p * q;
        }
    }
    Distribution { first: a.first + b.first, probabilities }.trimmed()
}

impl Distribution {
    /// Without the tails that no longer matter.
    fn trimmed(mut self) -> Self {
        let matters = |p: &f64| *p >= NEGLIGIBLE_IN_STRATA;
        let last = self.probabilities.iter().rposition(matters).map_or(0, |i| i + 1);
        self.probabilities.truncate(last.max(1));
        let from = self.probabilities.iter().position(matters).unwrap_or(0);
        self.probabilities.drain(..from);
        self.first += from as u64;
        self
    }
}

/// Probability that a random circuit of `size` among `n` slots holds at least one of a given `positions` of them: the
/// share of nodes that a position-free circuit contains.
///
/// # Errors
/// [`Error::Shape`] when `size` or `positions` exceeds `n`.
pub fn inclusion_rate(n: u64, size: u64, positions: u64) -> Result<f64> {
    for (name, value) in [("size", size), ("positions", positions)] {
        if value > n {
            return Err(Error::shape(name, format!("at most n = {n}"), value.to_string()));
        }
    }
    // P(none) = prod (1 - size / (n - i)); as logarithms, so that small rates keep their digits.
    let none: f64 = (0..positions).map(|i| (-(size as f64) / (n - i) as f64).max(-1.0).ln_1p()).sum();
    Ok(-none.exp_m1())
}
