//! How much a selection scores in f64 on paths that this processor lacks: pairs per row and per member, and rows that escape.
//!
//! `MICROTOME_EMULATED=avx512,avx512bf16,avx512vnni,amx cargo run --release -p emulated-avx512 --example candidates`, with the
//! names of paths and the widths that are wanted, else all.
//!
//! Rows are Gaussian, features are too, divided by the square root of the width: the numbers of the encoding benchmark.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use emulated_avx512::trap;
use microtome_core::kernels::gemm::{Certificate, Dictionary, Plan, Space, Terms, Wanted};
use microtome_core::kernels::isa::{Isa, Path};

const ROWS: usize = 64;
const SHAPES: [(usize, usize, usize); 2] = [(512, 16_384, 32), (2048, 16_384, 50)];

/// Gaussian numbers, by the polar form of a fixed uniform sequence.
fn gaussian(n: usize, seed: u64, scale: f64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    };
    let next = || {
        let (radius, angle) = ((-2.0 * (1.0 - uniform()).ln()).sqrt(), uniform() * std::f64::consts::TAU);
        (radius * angle.cos() * scale) as f32
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn main() {
    trap::install();
    println!(
        "path        screen       certificate    d     k   pairs/row  pairs/k  escaped  instructions  seconds"
    );
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (widths, names): (Vec<_>, Vec<_>) = words.into_iter().partition(|word| word.parse::<usize>().is_ok());
    let asked = |words: &[String], word: &str| words.is_empty() || words.iter().any(|w| w == word);
    for (d, n_features, k) in SHAPES.into_iter().filter(|(d, ..)| asked(&widths, &d.to_string())) {
        let x = gaussian(ROWS * d, 1, 1.0);
        let w = gaussian(n_features * d, 2, (d as f64).sqrt().recip());
        let wanted = |isa: &Isa| isa.path() >= Path::Avx2 && asked(&names, isa.path().name());
        for isa in Isa::available().filter(wanted) {
            for certificate in [Certificate::Deterministic, Certificate::Dithered] {
                let plan = Plan::with_isa(isa, d, certificate, None);
                let screen = format!("{:?}", plan.screen());
                let dictionary = Dictionary::of(&plan, &w, |_| Terms::default()).expect("some mebibytes");
                let (start, before, mut space) = (Instant::now(), trap::counts()[2], Space::default());
                dictionary.select(&x, Wanted::Best { k, positive: true }, &mut space);
                let per_row = space.effort.scored as f64 / ROWS as f64;
                println!(
                    "{:11} {screen:12} {:13} {d:5} {k:4} {per_row:10.1} {:8.3} {:8} {:13} {:8.1}",
                    isa.path().name(),
                    format!("{certificate:?}"),
                    per_row / k as f64,
                    space.effort.escaped,
                    trap::counts()[2] - before,
                    start.elapsed().as_secs_f64(),
                );
            }
        }
    }
}
