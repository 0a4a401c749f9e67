//! Best matches that few coordinates decide.
//!
//! For unit vectors `u`, `v` and a rotation `R`, with `s(u)` some coordinates of `Ru` and `r(u)` the others,
//!
//! ```text
//! u·v  =  s(u)·s(v) + r(u)·r(v)  ≤  s(u)·s(v) + ½|r(u)|² + ½|r(v)|²
//! ```
//!
//! (partial distances, Bei & Gray 1985: `u·v = 1 − ½|u − v|²`, and fewer coordinates give less of a distance). Only pairs
//! with `s(u)·s(v) + ½|r(v)|²` above a bar are scored, one bar for all; a row whose best matches all exceed the bar and
//! `½|r(u)|²` has found them. Dictionaries trained from one another, or on the same activations, share most of their
//! features at cosines of 0.8 and more, where a quarter of the coordinates tells a match from everything else.
//!
//! Width and bar come from a sample: pairs taken blindly say which bar leaves few of them, and the best cosines of sampled
//! rows how many rows it settles.

use crate::error::Result;
use crate::kernels::gemm::dot::dot;
use crate::kernels::gemm::rotate::Rotation;
use crate::kernels::isa::Isa;
use crate::scan::{Context, map_ordered};

/// Widths are multiples of this: whole lines of a tile register.
const LINE: usize = 32;
/// Widths that are tried at most, up to half of the full one.
const MOST_STEPS: usize = 8;
/// Rows that reach the floor by chance, for each row that is matched.
const CHANCE_HITS: usize = 2;
/// Share of a full search that products must save in the sample: half as much goes into sketches, bounds and scores.
const WORTH: f64 = 0.2;
/// What separates a cosine from the floor beyond the rounding of scores in f64.
const APART: f64 = 1e-9;

/// Rotation of unit vectors.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    isa: Isa,
    d: usize,
    rotation: Rotation,
}

impl Turn {
    /// A rotation of vectors of width `d`.
    pub(super) fn new(isa: Isa, d: usize) -> Self {
        Self { isa, d, rotation: Rotation::new(d) }
    }

    /// Writes the rotated unit vector of `row`, of a length above zero.
    fn apply(&self, row: &[f32], length: f64, to: &mut [f32]) {
        let inverse = 1.0 / length;
        to.iter_mut().zip(row).for_each(|(to, x)| *to = (f64::from(*x) * inverse) as f32);
        self.rotation.apply(self.isa, to);
    }

    /// Bound on the norm of the error of a rotated unit vector: half an ulp of every element, and the rotation's.
    fn error(&self) -> f64 {
        self.rotation.rounding() + 2.0_f64.powi(-23)
    }

    /// Half of the square of what a sketch leaves out.
    fn rest(&self, turned: &[f32], width: usize) -> f64 {
        let rest = &turned[..self.d - width];
        dot(self.isa, rest, rest) / 2.0
    }

    /// A row as part of a sample.
    pub(super) fn sampled(&self, row: &[f32], length: f64) -> Sampled {
        let mut turned = vec![0.0; self.d];
        self.apply(row, length, &mut turned);
        let rests = widths(self.d).map(|width| self.rest(&turned, width)).collect();
        Sampled { turned, rests }
    }

    /// The parts of the bounds of a pair that do not depend on `u` alone, by sketches of rising widths.
    fn bounds(&self, u: &Sampled, v: &Sampled) -> Vec<f64> {
        let (mut kept, mut end) = (0.0, self.d);
        let bound = |(w, width): (usize, usize)| {
            let start = self.d - width;
            kept += dot(self.isa, &u.turned[start..end], &v.turned[start..end]);
            end = start;
            kept + v.rests[w]
        };
        widths(self.d).enumerate().map(bound).collect()
    }
}

/// A row as part of a sample.
#[derive(Debug)]
pub(super) struct Sampled {
    turned: Vec<f32>,
    /// What a sketch leaves out, for each width.
    rests: Vec<f64>,
}

/// The widths that are tried, rising.
fn widths(d: usize) -> impl Iterator<Item = usize> {
    let step = (d / 16).next_multiple_of(LINE);
    (1..=MOST_STEPS).map(move |i| i * step).take_while(move |width| 2 * width <= d)
}

/// Some coordinates of rotated unit vectors, and what bounds by them must reach.
#[derive(Clone, Debug)]
pub(super) struct Sketch {
    turn: Turn,
    /// Coordinates kept: the last ones, into which a rotation mixes all others.
    pub(super) width: usize,
    /// What `s(u)·s(v) + ½|r(v)|²` reaches where a pair counts.
    pub(super) bar: f64,
}

impl Sketch {
    /// The sketch that saves most of a full search among `n` rows, if one saves enough; `last` are the cosines of the last of the
    /// best matches of the rows `a`, and `b` are some of the `n`.
    pub(super) fn choose(
        turn: &Turn,
        a: &[Sampled],
        b: &[Sampled],
        last: &[f64],
        n: usize,
        context: &Context<'_>,
    ) -> Result<Option<Self>> {
        let bounds =
            map_ordered(a, context, |u| Ok(b.iter().map(|v| turn.bounds(u, v)).collect::<Vec<_>>()))?;
        let bounds = bounds.concat();
        let by_chance = bounds.len() * CHANCE_HITS / n;
        let (mut chosen, mut least) = (None, 1.0 - WORTH);
        for (w, width) in widths(turn.d).enumerate() {
            let mut bounds: Vec<f64> = bounds.iter().map(|bounds| bounds[w]).collect();
            let bar = bounds.select_nth_unstable_by(by_chance, |p, q| q.total_cmp(p)).1.max(0.0);
            let sketch = Self { turn: turn.clone(), width, bar };
            let open = a.iter().zip(last).filter(|(u, last)| **last < sketch.floor(u.rests[w])).count();
            let cost = width as f64 / turn.d as f64 + open as f64 / last.len() as f64;
            if cost < least {
                (chosen, least) = (Some(sketch), cost);
            }
        }
        Ok(chosen)
    }

    /// The sketch of a row, and half of the square of what it leaves out.
    pub(super) fn of<'a>(&self, row: &[f32], length: f64, space: &'a mut Vec<f32>) -> (&'a [f32], f64) {
        space.resize(self.turn.d, 0.0);
        self.turn.apply(row, length, space);
        (&space[self.turn.d - self.width..], self.turn.rest(space, self.width))
    }

    /// Cosine of a row with half a square `rest` that none of the pairs below the bar comes close to.
    pub(super) fn floor(&self, rest: f64) -> f64 {
        self.bar + rest + 3.0 * self.turn.error() + APART
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of many lengths, some with an element far larger than the others, each with one that differs from it by `noise`.
    fn pairs(n: usize, d: usize, noise: f32) -> (Vec<f32>, Vec<f32>) {
        let mut state = 3_u64;
        let mut number = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut a: Vec<f32> = (0..n * d).map(|_| number()).collect();
        for (i, row) in a.chunks_mut(d).enumerate() {
            row[i % d] *= [1.0, 30.0, 1e3][i % 3];
            for x in row {
                *x *= [1e-30, 1.0, 1e20][i / 3 % 3];
            }
        }
        let size = |i: usize| a[i / d * d..(i / d + 1) * d].iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let b = (0..n * d).map(|i| a[i] + noise * size(i) * number()).collect();
        (a, b)
    }

    #[test]
    fn no_cosine_exceeds_the_bound_of_its_sketches() {
        for (d, noise) in [(64, 0.0), (100, 1e-6), (512, 0.1), (768, 1.0)] {
            let (a, b) = pairs(18, d, noise);
            let turn = Turn::new(Isa::PLAIN, d);
            for width in widths(d) {
                let sketch = Sketch { turn: turn.clone(), width, bar: 0.0 };
                let (mut of_u, mut of_v) = (Vec::new(), Vec::new());
                for (u, v) in a.chunks(d).flat_map(|u| b.chunks(d).map(move |v| (u, v))) {
                    let length = |x: &[f32]| dot(Isa::PLAIN, x, x).sqrt();
                    let cosine = dot(Isa::PLAIN, u, v) / (length(u) * length(v));
                    let (kept_u, rest_u) = sketch.of(u, length(u), &mut of_u);
                    let (kept_v, rest_v) = sketch.of(v, length(v), &mut of_v);
                    let bar = dot(Isa::PLAIN, kept_u, kept_v) + rest_v;
                    let floor = Sketch { bar, ..sketch.clone() }.floor(rest_u);
                    assert!(cosine < floor, "d={d} width={width}: {cosine} {floor}");
                }
            }
        }
    }
}
