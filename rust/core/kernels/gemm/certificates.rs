//! Bounds against real scores, pair by pair.

use super::dot::dot;
use super::features::{Packed, Terms};
use super::plan::{Certificate, Plan, Screen};
use super::strips::Strips;
use super::tile::{COLS, ROWS};
use crate::kernels::isa::Path;
use crate::memory::Aligned;

/// A number of mean zero and spread one, and the next state: enough of a Gaussian to test bounds.
fn normal(state: &mut u64) -> f32 {
    let mut sum = 0.0;
    for _ in 0..4 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sum += (*state >> 40) as f32 / (1 << 24) as f32 - 0.5;
    }
    sum * 1.732
}

fn vectors(n: usize, d: usize, kind: usize, state: &mut u64) -> Vec<f32> {
    (0..n * d)
        .map(|i| match kind {
            0 => normal(state),
            1 if i % d % 61 == 3 => normal(state) * 1000.0,
            2 => normal(state) * 2.0_f32.powi((normal(state) * 8.0) as i32),
            3 => normal(state).round(),
            _ => normal(state) + 5.0,
        })
        .collect()
}

/// Rows of several strips, the last one incomplete: what tile registers take at once.
const SEVERAL: usize = 40;

/// Compares bounds and real scores of about `pairs` pairs; says how much of its slack each path and screen ever needed.
fn shares_of_slack(pairs: usize, certificate: Certificate) -> Vec<(Path, Screen, f64)> {
    let mut worst: Vec<(Path, Screen, f64)> = Vec::new();
    let mut state = 7;
    let tiles = pairs / (ROWS * COLS) / Plan::every(16, certificate, None).len() + 1;
    for t in 0..tiles {
        let d = [16, 64, 100, 300, 513][t % 5];
        let w = vectors(COLS, d, t / 5 % 5, &mut state);
        let x = vectors(if t % 8 == 0 { SEVERAL } else { ROWS }, d, t / 25 % 5, &mut state);
        let centre = (t % 3 == 0).then(|| vectors(1, d, 0, &mut state));
        for plan in Plan::every(d, certificate, centre.as_deref()) {
            let share = worst_of_tile(&plan, t, &x, &w);
            let (path, screen) = (plan.isa().path(), plan.screen());
            match worst.iter_mut().find(|(p, s, _)| (*p, *s) == (path, screen)) {
                Some((_, _, worst)) => *worst = worst.max(share),
                None => worst.push((path, screen, share)),
            }
        }
    }
    worst
}

/// Biases and weights of the features of every other tile.
fn terms(t: usize) -> Terms {
    let mut terms = Terms::default();
    if t % 2 == 1 {
        terms.bias = std::array::from_fn(|c| c as f64 / 3.0 - 5.0);
        terms.weight = std::array::from_fn(|c| ((c as f64 - 16.0) / 2.0).exp2());
    }
    terms
}

/// The largest share of its own slack that a pair of the tile needed: 1 less what was left, in slacks. No pair may need more.
fn worst_of_tile(plan: &Plan, t: usize, x: &[f32], w: &[f32]) -> f64 {
    let (d, terms) = (plan.d(), terms(t));
    let mut words = Aligned::zeros(plan.panel_words());
    let panel = plan.panel(t, w, &mut words, &terms);
    let mut strips = Strips::default();
    assert!(plan.strips(x, panel.largest_norm, false, &mut strips).is_empty());
    let (mut tiles, mut worst) = (plan.tiles(false), 0.0_f64);
    let columns = if plan.screen() == Screen::Floats { &panel.float_columns } else { &panel.columns };
    for first in (0..strips.lines.len()).step_by(tiles.of_strips.len()) {
        plan.screen_strips(
            x,
            &strips,
            first,
            Packed { panel: &panel, rows: w, words: &words },
            false,
            &mut tiles,
        );
        for (tile, s) in tiles.of_strips.iter().zip(first..) {
            let line = &strips.lines[s];
            for (r, x) in x.chunks(d).skip(s * ROWS).take(ROWS).enumerate() {
                let gap = panel.largest_slack().gap(line.slack[r], line.norm[r], false);
                for (c, w) in w.chunks(d).enumerate() {
                    let rank = (dot(plan.isa(), x, w) + terms.bias[c]) * terms.weight[c];
                    let above = f64::from(tile.upper[r][c]) - rank;
                    assert!(
                        (0.0..=gap).contains(&above),
                        "{plan:?} tile {t} ({s}, {r}, {c}): {above} of {gap}"
                    );
                    let slack = line.slack[r] * columns.norm[c] + line.norm[r] * columns.residual[c];
                    if slack > 0.0 {
                        worst = worst.max(1.0 - above / f64::from(slack));
                    }
                }
            }
        }
    }
    worst
}

/// Tiles after which every width, kind of row and kind of feature has met every other.
const KINDS: usize = 125;

#[test]
fn every_kind_of_vector_keeps_its_certificate() {
    for certificate in [Certificate::Deterministic, Certificate::Dithered] {
        let pairs = KINDS * ROWS * COLS * Plan::every(16, certificate, None).len();
        assert!(shares_of_slack(pairs, certificate).iter().all(|(_, _, share)| *share < 1.0));
    }
}

#[test]
fn a_million_random_pairs_keep_their_certificate() {
    for certificate in [Certificate::Deterministic, Certificate::Dithered] {
        assert!(shares_of_slack(500_000, certificate).iter().all(|(_, _, share)| *share < 1.0));
    }
}

#[test]
#[ignore = "full tier: minutes"]
#[allow(clippy::print_stderr)] // the shares are what one wants to know of so many pairs
fn a_hundred_million_random_pairs_keep_their_certificate() {
    for certificate in [Certificate::Deterministic, Certificate::Dithered] {
        let shares = shares_of_slack(100_000_000, certificate);
        eprintln!("{certificate:?}: largest share of the slack needed {shares:?}");
        assert!(shares.iter().all(|(_, _, share)| *share < 1.0));
    }
}
