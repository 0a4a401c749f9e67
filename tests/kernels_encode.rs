//! The encoder against its definition in f64, on every instruction set of this processor.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::atomic::{AtomicBool, AtomicU64};

use microtome_core::kernels::gemm::dot::dot;
use microtome_core::kernels::gemm::{Certificate, Dictionary, Plan, Space, Terms, Wanted};
use microtome_core::kernels::isa::{Isa, VARIABLE};
use microtome_core::metrics::encode::{Activation, Weights};
use microtome_core::scan::Context;
use microtome_core::scan::encode::{Codes, encode, pack};
use microtome_core::{Data, Error, Result, Rows};
use proptest::prelude::*;

fn with_context<T>(work: impl FnOnce(&Context<'_>) -> T) -> T {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    work(&Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 })
}

/// Features whose score in f64 is best, ties to the lower feature: the definition.
fn best(x: &[f32], features: &[f32], k: usize, positive: bool) -> Vec<u32> {
    // Zero has one sign here: a sum of nothing but negative zeros ties with zero.
    let product = |w: &[f32]| x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() + 0.0;
    let scores: Vec<f64> = features.chunks(x.len()).map(product).collect();
    let mut order: Vec<u32> =
        (0..scores.len() as u32).filter(|&j| !positive || scores[j as usize] > 0.0).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// The features, with the terms of each panel.
fn dictionary_with(plan: &Plan, features: &[f32], terms: impl Fn(usize) -> Terms) -> Dictionary {
    Dictionary::of(plan, features, terms).unwrap()
}

fn dictionary(plan: &Plan, features: &[f32]) -> Dictionary {
    dictionary_with(plan, features, |_| Terms::default())
}

/// Compares the members of every row with the expected ones, in order.
fn assert_members(dictionary: &Dictionary, x: &[f32], wanted: Wanted, expected: &[Vec<u32>]) {
    assert_members_in(&mut Space::default(), dictionary, x, wanted, expected);
}

/// The same in a space that may have served before.
fn assert_members_in(
    space: &mut Space,
    dictionary: &Dictionary,
    x: &[f32],
    wanted: Wanted,
    expected: &[Vec<u32>],
) {
    let plan = dictionary.plan();
    dictionary.select(x, wanted, space);
    for (i, expected) in expected.iter().enumerate() {
        let found: Vec<u32> = space.found(i).iter().map(|s| s.feature).collect();
        assert_eq!(
            found,
            *expected,
            "{:?} {:?} row {i} d={} {wanted:?}",
            plan.isa(),
            plan.screen(),
            plan.d()
        );
    }
}

fn check(x: &[f32], features: &[f32], d: usize, k: usize) {
    for (certificate, positive) in [(Certificate::Deterministic, true), (Certificate::Dithered, false)] {
        let expected: Vec<_> = x.chunks(d).map(|row| best(row, features, k, positive)).collect();
        for plan in Plan::every(d, certificate, None) {
            assert_members(&dictionary(&plan, features), x, Wanted::Best { k, positive }, &expected);
        }
    }
}

/// As [`check`], for features ranked by score times weight, in multiples of `unit`.
fn check_weighted(x: &[f32], features: &[f32], d: usize, k: usize, unit: f64) {
    let weight = |j: usize| f64::from(1 + j as u32 * 7 % 13) / 4.0 * unit;
    let expected = |row: &[f32]| {
        let rank = |(j, w): (usize, &[f32])| {
            let score: f64 = row.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            (score * weight(j), j as u32)
        };
        let mut ranks: Vec<_> = features.chunks(d).enumerate().map(rank).filter(|r| r.0 > 0.0).collect();
        ranks.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranks.iter().take(k).map(|r| r.1).collect::<Vec<u32>>()
    };
    let expected: Vec<_> = x.chunks(d).map(expected).collect();
    for plan in
        [Certificate::Deterministic, Certificate::Dithered].into_iter().flat_map(|c| Plan::every(d, c, None))
    {
        let terms = |p| Terms { weight: std::array::from_fn(|c| weight(p * 32 + c)), ..Terms::default() };
        let wanted = Wanted::Best { k, positive: true };
        assert_members(&dictionary_with(&plan, features, terms), x, wanted, &expected);
    }
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn selection_equals_the_f64_definition(
        (d, f, n) in (1_usize..70, 1_usize..140, 1_usize..30),
        k in 1_usize..40,
        seed in any::<u64>(),
        coarse in any::<bool>(),
    ) {
        let round = |v: f32| if coarse { (v * 3.0).round() } else { v };
        let x: Vec<f32> = noise(n * d, seed).into_iter().map(round).collect();
        let w: Vec<f32> = noise(f * d, seed ^ 1).into_iter().map(round).collect();
        check(&x, &w, d, k.min(f));
    }
}

#[test]
fn many_features_pass_through_all_ranges() {
    let (d, f) = (48, 5000);
    check(&noise(40 * d, 3), &noise(f * d, 4), d, 20);
}

#[test]
fn a_sample_that_misleads_costs_a_second_screen_and_no_member() {
    // In every eighth panel, of which the sample is made, lie features that suit all rows: fewer than are wanted.
    let (d, f, k, n) = (64, 8192, 32, 100);
    let (mut w, mut x) = (noise(f * d, 41), noise(n * d, 42));
    x.chunks_mut(d).for_each(|x| x[0] = 3.0);
    w.chunks_mut(d).enumerate().filter(|(j, _)| j % 512 == 7).for_each(|(_, w)| w[0] = 9.0);
    let wanted = Wanted::Best { k, positive: true };
    let expected: Vec<_> = x.chunks(d).map(|row| best(row, &w, k, true)).collect();
    for plan in Plan::every(d, Certificate::Deterministic, None) {
        let (dictionary, mut space) = (dictionary(&plan, &w), Space::default());
        assert_members_in(&mut space, &dictionary, &x, wanted, &expected);
        let misjudged = space.effort.misjudged;
        assert!(misjudged > 50, "{misjudged} of {n} rows misjudged by {:?}", plan.screen());
        assert_members_in(&mut space, &dictionary, &x, wanted, &expected);
        assert_eq!(space.effort.misjudged, misjudged, "who is wrong too often guesses no more");
    }
}

#[test]
fn features_of_very_different_norms_are_dropped_as_well() {
    // The widest slack is then no measure of the others', and bounds guess too low.
    let (d, f, k, n) = (1536, 16_384, 128, 12);
    let (x, even) = (noise(n * d, 45), noise(f * d, 46));
    let sizes: Vec<f32> = noise(f * 6, 47).chunks(6).map(|u| (u.iter().sum::<f32>() * 0.8).exp()).collect();
    let mut one = vec![1.0; f];
    one[4321] = 10.0;
    for sizes in [sizes, one] {
        let w: Vec<f32> = even.iter().enumerate().map(|(i, w)| w * sizes[i / d]).collect();
        let expected: Vec<_> = x.chunks(d).map(|row| best(row, &w, k, true)).collect();
        for plan in Plan::every(d, Certificate::Deterministic, None) {
            let (dictionary, mut space) = (dictionary(&plan, &w), Space::default());
            assert_members_in(&mut space, &dictionary, &x, Wanted::Best { k, positive: true }, &expected);
            let per_member = space.effort.scored as f64 / (n * k) as f64;
            assert!(space.effort.escaped == 0 && per_member < 20.0, "{per_member} by {:?}", plan.screen());
        }
    }
}

#[test]
fn guesses_are_seldom_wrong() {
    let (d, f, k, n) = (48, 8192, 32, 600);
    let (x, w) = (noise(n * d, 43), noise(f * d, 44));
    for plan in Plan::every(d, Certificate::Deterministic, None) {
        let mut space = Space::default();
        dictionary(&plan, &w).select(&x, Wanted::Best { k, positive: true }, &mut space);
        assert!(space.effort.misjudged < n as u64 / 50, "{} by {:?}", space.effort.misjudged, plan.screen());
    }
}

#[test]
fn wide_rows_stay_exact() {
    let (d, f) = (1024, 3000);
    let mut x = noise(20 * d, 15);
    x[d..2 * d].fill(0.0);
    x[2 * d..3 * d].iter_mut().for_each(|v| *v *= 3e37);
    check(&x, &noise(f * d, 16), d, 12);
}

#[test]
fn what_a_block_leaves_in_a_space_does_not_show_in_the_next() {
    let (d, f, k) = (100, 300, 5);
    let features = noise(f * d, 31);
    // Rows that no screen takes, in other places each time, and fewer rows at the end: words of former rows stay where they were.
    let blocks = [(50, 1), (50, 7), (50, 3), (17, 2), (50, 49)].map(|(n, misfit)| {
        let mut x = noise(n * d, 32 + misfit as u64);
        x.chunks_mut(d).skip(misfit).step_by(9).flatten().for_each(|v| *v *= 3e37);
        x
    });
    let wanted = Wanted::Best { k, positive: true };
    for plan in Plan::every(d, Certificate::Deterministic, None) {
        let (dictionary, mut space) = (dictionary(&plan, &features), Space::default());
        for x in &blocks {
            let expected: Vec<_> = x.chunks(d).map(|row| best(row, &features, k, true)).collect();
            assert_members_in(&mut space, &dictionary, x, wanted, &expected);
        }
    }
}

#[test]
fn identical_features_defeat_every_screen_and_ties_still_go_to_the_lower_index() {
    let (d, f) = (32, 3000);
    let w: Vec<f32> = noise(d, 5).into_iter().cycle().take(f * d).collect();
    check(&noise(13 * d, 6), &w, d, 7);
}

#[test]
fn features_are_ranked_by_their_weights_behind_every_screen() {
    let d = 300;
    check_weighted(&noise(25 * d, 17), &noise(2000 * d, 18), d, 9, 1.0);
    // Equal features but for their weights: the first screen fails, and the f32 screen has to know the weights too.
    let d = 32;
    let same: Vec<f32> = noise(d, 19).into_iter().cycle().take(3000 * d).collect();
    check_weighted(&noise(13 * d, 20), &same, d, 7, 1.0);
}

/// `n` vectors of noise of a given size.
fn sized(n: usize, d: usize, seed: u64, size: f32) -> Vec<f32> {
    noise(n * d, seed).into_iter().map(|v| v * size).collect()
}

#[test]
fn features_whose_scales_f32_cannot_hold_are_ranked_all_the_same() {
    for (d, features, weight, rows) in
        [(64, 1e-20, 1e-20, 1e25), (64, 1.0, 1e-43, 1e20), (512, 1.0, 1e-39, 1e20)]
    {
        check_weighted(&sized(13, d, 30, rows), &sized(1500, d, 31, features), d, 8, weight);
    }
}

#[test]
fn features_that_their_rotation_takes_for_zero_are_ranked_all_the_same() {
    let (d, f, least) = (1024, 1500, f32::from_bits(4));
    let places: Vec<usize> = noise(f * 16, 32).into_iter().map(|v| ((v + 1.0) * 2.0) as usize % 4).collect();
    let mut w = vec![0.0; f * d];
    places.iter().enumerate().for_each(|(i, place)| w[i / 16 * d + i % 16 + 16 * place] = least);
    let mut x = vec![0.0; 13 * d];
    for (row, v) in x.chunks_mut(d).zip(noise(13 * 64, 33).chunks(64)) {
        row.iter_mut().zip(v).for_each(|(x, v)| *x = v.abs() * 1e28);
    }
    check(&x, &w, d, 8);
}

#[test]
fn zeros_denormals_and_huge_values_are_ranked_right() {
    let (d, f) = (24, 300);
    let w = noise(f * d, 8);
    for scale in [0.0, 1e-42, 1e-30, 1e30] {
        let x: Vec<f32> = noise(14 * d, 9).into_iter().map(|v| v * scale).collect();
        for plan in Plan::every(d, Certificate::Deterministic, None) {
            let expected: Vec<_> = x.chunks(d).map(|row| best(row, &w, 5, false)).collect();
            assert_members(&dictionary(&plan, &w), &x, Wanted::Best { k: 5, positive: false }, &expected);
        }
    }
}

#[test]
fn a_row_of_zeros_fires_where_its_biases_are_the_least_that_f32_holds() {
    // The rank, half of such a bias, lies below every positive f32.
    let (d, least) = (8, f64::from(f32::from_bits(1)));
    for plan in Plan::every(d, Certificate::Deterministic, None) {
        let terms = Terms { bias: [least; 32], weight: [0.5; 32], ..Terms::default() };
        let dictionary = dictionary_with(&plan, &noise(32 * d, 21), |_| terms.clone());
        let mut space = Space::default();
        for wanted in [Wanted::Best { k: 40, positive: true }, Wanted::Above] {
            dictionary.select(&vec![0.0; d], wanted, &mut space);
            assert_eq!(space.found(0).len(), 32, "{:?} {:?} {wanted:?}", plan.isa(), plan.screen());
        }
    }
}

/// The best ranks by definition: `x · w + bias`, in the order of additions that a score has.
fn best_ranked(x: &[f32], features: &[f32], bias: &[f64], k: usize) -> Vec<u32> {
    let score = |(w, bias): (&[f32], &f64)| dot(Isa::PLAIN, x, w) + bias;
    let scores: Vec<f64> = features.chunks(x.len()).zip(bias).map(score).collect();
    let mut order: Vec<u32> = (0..scores.len() as u32).filter(|&j| scores[j as usize] as f32 > 0.0).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// Features with biases, ranked behind every screen, centred where there is a centre.
fn check_biased(x: &[f32], features: &[f32], bias: &[f64], centre: Option<&[f32]>, (d, k): (usize, usize)) {
    let expected: Vec<_> = x.chunks(d).map(|row| best_ranked(row, features, bias, k)).collect();
    for plan in Plan::every(d, Certificate::Deterministic, centre) {
        let bias_of = |p| std::array::from_fn(|c| bias.get(p * 32 + c).copied().unwrap_or(0.0));
        let terms = |p| Terms { bias: bias_of(p), ..Terms::default() };
        let wanted = Wanted::Best { k, positive: true };
        assert_members(&dictionary_with(&plan, features, terms), x, wanted, &expected);
    }
}

#[test]
fn features_whose_errors_have_no_square_in_f32_are_not_lost() {
    let (d, f) = (64, 1500);
    let base = noise(d, 22);
    // Scores that differ in their fourth digit, of a size whose square is zero; one large feature beside them.
    for size in [1e-20, 1e-22, 1e-24] {
        let mut w: Vec<f32> =
            noise(f * d, 23).iter().enumerate().map(|(i, v)| (base[i % d].abs() + 1e-4 * v) * size).collect();
        w[3 * d..4 * d].fill(1.0);
        let mut x = vec![0.0; 13 * d];
        (0..13).for_each(|i| x[i * d + i * 4] = 1.0);
        check(&x, &w, d, 20);
    }
}

#[test]
fn a_feature_beyond_the_range_of_squares_leaves_the_bars_of_a_row_of_zeros_alone() {
    for (d, size) in [(8, 1e22), (64, 1e26), (330, 1e30)] {
        let f = 1024;
        let mut w = noise(f * d, 24);
        w[700 * d..701 * d].iter_mut().for_each(|v| *v *= size);
        let bias: Vec<f64> =
            (0..f).map(|j| if j < 13 { 1.0 + j as f64 } else { -1.0 - j as f64 / 100.0 }).collect();
        check_biased(&vec![0.0; 3 * d], &w, &bias, None, (d, 8));
    }
}

#[test]
fn a_centre_far_larger_than_what_it_leaves_keeps_scores_exact() {
    for (d, size) in [(8, 1e16), (64, 1e12), (330, 1e14)] {
        let (f, mut centre) = (2000, noise(d, 25));
        centre[1] = size;
        let (w, mut x) = (noise(f * d, 26), noise(14 * d, 27));
        x.chunks_mut(d).for_each(|x| x[1] = size);
        x[..d].copy_from_slice(&centre);
        let bias: Vec<f64> =
            w.chunks(d).zip(noise(f, 28)).map(|(w, b)| f64::from(b) - dot(Isa::PLAIN, &centre, w)).collect();
        check_biased(&x, &w, &bias, Some(&centre), (d, 9));
    }
}

#[test]
fn thresholds_are_of_pre_activations_whatever_the_weights() {
    let d = 16;
    for plan in Plan::every(d, Certificate::Deterministic, None) {
        let terms = Terms { threshold: [1.0; 32], weight: [0.25; 32], ..Terms::default() };
        let w: Vec<f32> = (0..32 * d).map(|i| if i % d == 0 { 1.0 } else { 0.0 }).collect();
        let dictionary = dictionary_with(&plan, &w, |_| terms.clone());
        let (mut space, mut x) = (Space::default(), vec![0.0; 2 * d]);
        (x[0], x[d]) = (1.5, 0.5);
        dictionary.select(&x, Wanted::Above, &mut space);
        assert_eq!((space.found(0).len(), space.found(1).len()), (32, 0), "{:?}", plan.screen());
    }
}

#[test]
fn outlier_dimensions_a_thousand_times_the_rest_stay_exact() {
    let (d, f) = (256, 2000);
    let mut x = noise(30 * d, 10);
    x.iter_mut().enumerate().filter(|(i, _)| matches!(i % d, 7 | 100)).for_each(|(_, v)| *v *= 1000.0);
    check(&x, &noise(f * d, 11), d, 10);
}

fn codes(x: &[f32], w_enc: Rows<'_>, b_enc: &[f32], activation: Activation) -> Result<Codes> {
    let weights = Weights { w_enc, b_enc: Some(b_enc), b_dec: None, norms: None, threshold: None };
    with_context(|context| {
        let encoder = pack(weights, activation, Certificate::Deterministic, context)?;
        Ok(encode(&encoder, &Rows::new(Data::F32(x), w_enc.n())?, context)?.0)
    })
}

#[test]
fn codes_have_the_same_bits_for_any_number_of_threads() {
    let (d, f, n) = (40, 700, 333);
    let (x, w, b) = (noise(n * d, 12), noise(d * f, 13), noise(f, 14));
    let w = Rows::new(Data::F32(&w), f).unwrap();
    for activation in [Activation::TopK(9), Activation::BatchTopK(5), Activation::Relu] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| codes(&x, w, &b, activation)).unwrap()
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{activation:?} on {threads} threads");
        }
    }
}

#[test]
fn bad_weights_and_rows_are_refused_by_name() {
    let w = Rows::new(Data::F32(&[1.0, 2.0, f32::NAN, 4.0]), 2).unwrap();
    assert!(
        matches!(codes(&[1.0, 1.0], w, &[0.0; 2], Activation::TopK(1)), Err(Error::NonFinite { argument, found })
        if argument == "W_enc" && found.contains("row 1, column 0"))
    );
    let w = Rows::new(Data::F32(&[1.0, 2.0, 3.0, 4.0]), 2).unwrap();
    assert!(
        matches!(codes(&[1.0, f32::INFINITY], w, &[0.0; 2], Activation::TopK(1)), Err(Error::NonFinite { argument, .. })
        if argument == "x")
    );
    assert!(
        matches!(codes(&[1.0, 1.0], w, &[0.0; 2], Activation::TopK(3)), Err(Error::Shape { argument, .. })
        if argument == "k")
    );
    assert!(matches!(codes(&[1.0, 1.0], w, &[0.0; 3], Activation::Relu), Err(Error::Shape { argument, .. })
        if argument == "b_enc"));
}

#[test]
fn the_environment_names_the_path() {
    // Other tests of this file name their paths directly, so the variable disturbs none of them.
    let chosen = std::env::var(VARIABLE).ok();
    let isa = Isa::choose().unwrap();
    assert!(chosen.is_none_or(|name| name == isa.path().name()));
}
