//! Overlap of circuits against counting, and its chance level against enumeration.

#![allow(clippy::unwrap_used, clippy::float_cmp, clippy::cast_possible_wrap, clippy::doc_markdown)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64};

use microtome_core::metrics::circuit::chance::{Stratum, chance, inclusion_rate, iou};
use microtome_core::metrics::circuit::top::top_n;
use microtome_core::metrics::circuit::{from_nodes, intersection_and_union, size, to_nodes};
use microtome_core::scan::Context;
use proptest::prelude::*;

fn with_context<T>(work: impl FnOnce(&Context<'_>) -> T) -> T {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    work(&Context { cancel: &cancel, done: &done, memory_budget: 0 })
}

/// Scores that tie often, with signs, zeros of both signs, infinities and NaN.
fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-5_i32..5).prop_map(|i| i as f32 / 4.0),
        1 => prop::sample::select(vec![0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-42, -1e30]),
        1 => any::<f32>(),
    ]
}

proptest! {
    #[test]
    fn sets_count_as_sets_do(
        n in 1_usize..500,
        a in prop::collection::vec(0_i64..500, 0..200),
        b in prop::collection::vec(0_i64..500, 0..200),
    ) {
        let n = n.max(a.iter().chain(&b).max().map_or(0, |m| *m as usize + 1));
        let (words_a, words_b) = (from_nodes(&a, n).unwrap(), from_nodes(&b, n).unwrap());
        let (a, b): (BTreeSet<i64>, BTreeSet<i64>) = (a.into_iter().collect(), b.into_iter().collect());
        let counted = (a.intersection(&b).count() as u64, a.union(&b).count() as u64);
        prop_assert_eq!(with_context(|c| intersection_and_union(&words_a, &words_b, c)).unwrap(), counted);
        prop_assert_eq!(with_context(|c| size(&words_a, c)).unwrap(), a.len() as u64);
        prop_assert_eq!(with_context(|c| to_nodes(&words_a, c)).unwrap(), a.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn top_n_is_a_stable_sort_by_score_then_node(scores in prop::collection::vec(score(), 1..400), share in 0.0..1.0) {
        let n = (share * scores.len() as f64) as usize;
        let value = |i: i64| if scores[i as usize].is_nan() { f32::NEG_INFINITY } else { scores[i as usize] + 0.0 };
        let mut order: Vec<i64> = (0..scores.len() as i64).collect();
        order.sort_by(|&i, &j| value(j).total_cmp(&value(i)).then(i.cmp(&j)));
        let mut expected = order[..n].to_vec();
        expected.sort_unstable();
        prop_assert_eq!(with_context(|c| top_n(&scores, n, c)).unwrap(), expected);
    }
}

#[test]
fn top_n_of_many_scores_is_found_from_a_sample_and_checked() {
    // Long runs and an outlying block: an evenly spread sample misjudges both.
    let hash = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 44) as f32;
    for (name, scores) in [
        ("random", (0..300_000).map(hash).collect::<Vec<f32>>()),
        ("constant", vec![1.5; 300_000]),
        ("a block", (0..300_000).map(|i| if (70_001..70_004).contains(&i) { 9.0 } else { 0.0 }).collect()),
        ("periodic", (0..300_000).map(|i| if i % 5 == 0 { 1.0 } else { hash(i) + 2.0 }).collect()),
    ] {
        for n in [1, 2, 1000, 60_000, 299_999, 300_000] {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]).then(i.cmp(&j)));
            let mut expected: Vec<i64> = order[..n].iter().map(|&i| i as i64).collect();
            expected.sort_unstable();
            assert!(with_context(|c| top_n(&scores, n, c)).unwrap() == expected, "{name}, n = {n}");
        }
    }
}

/// IoU of every pair of circuits of the given sizes, all equally likely.
fn enumerate(n: u32, a: u32, b: u32, least: u32) -> (f64, f64, f64) {
    let circuits = |size: u32| (0_u32..1 << n).filter(move |set| set.count_ones() == size);
    let pairs: Vec<(u32, f64)> = circuits(a)
        .flat_map(|x| circuits(b).map(move |y| (x, y)))
        .map(|(x, y)| {
            ((x & y).count_ones(), iou(u64::from((x & y).count_ones()), u64::from((x | y).count_ones())))
        })
        .collect();
    let count = pairs.len() as f64;
    let mean = pairs.iter().map(|p| p.1).sum::<f64>() / count;
    let variance = pairs.iter().map(|p| (p.1 - mean).powi(2)).sum::<f64>() / count;
    (mean, variance, pairs.iter().filter(|p| p.0 >= least).count() as f64 / count)
}

#[test]
fn chance_level_equals_enumeration_of_all_circuits() {
    for n in 0..=7_u32 {
        for (a, b) in (0..=n).flat_map(|a| (0..=n).map(move |b| (a, b))) {
            for least in 0..=a.min(b) {
                let law = Stratum { n: n.into(), a: a.into(), b: b.into() };
                let found = chance(&[law], Some(least.into())).unwrap();
                let (mean, variance, p_value) = enumerate(n, a, b, least);
                assert!((found.mean - mean).abs() < 1e-13, "{n} {a} {b}: {} {mean}", found.mean);
                assert!((found.variance - variance).abs() < 1e-13);
                assert!((found.p_value - p_value).abs() < 1e-13);
            }
        }
    }
    let found = chance(&[Stratum { n: 12, a: 5, b: 3 }], Some(2)).unwrap();
    // The enumeration itself adds 174,240 rounded terms.
    let (mean, variance, p_value) = enumerate(12, 5, 3, 2);
    assert!((found.mean - mean).abs() < 1e-11 && (found.variance - variance).abs() < 1e-11);
    assert!((found.p_value - p_value).abs() < 1e-11);
}

#[test]
fn strata_are_convolved() {
    // Three nodes and four nodes: all pairs of circuits that respect the strata.
    let circuits = |low: u32, high: u32| {
        (0_u32..1 << 7).filter(move |s| (s & 7).count_ones() == low && (s >> 3).count_ones() == high)
    };
    let mut ious = Vec::new();
    for x in circuits(2, 1) {
        ious.extend(
            circuits(1, 3).map(|y| f64::from((x & y).count_ones()) / f64::from((x | y).count_ones())),
        );
    }
    let mean = ious.iter().sum::<f64>() / ious.len() as f64;
    let found = chance(&[Stratum { n: 3, a: 2, b: 1 }, Stratum { n: 4, a: 1, b: 3 }], None).unwrap();
    assert!((found.mean - mean).abs() < 1e-14 && found.p_value.is_nan());
}

#[test]
fn p_values_stay_between_zero_and_one() {
    let strata = [Stratum { n: 400, a: 30, b: 40 }; 3];
    for least in 0..=90 {
        let p = chance(&strata, Some(least)).unwrap().p_value;
        assert!((0.0..=1.0).contains(&p) && p.is_sign_positive(), "{least}: {p}");
    }
    assert!(chance(&strata, Some(60)).unwrap().p_value < 1e-20);
}

#[test]
fn chance_level_of_a_hundred_million_nodes_is_near_its_large_number_limit() {
    let (n, a, b) = (100_000_000_u64, 7_000_000_u64, 15_000_000_u64);
    let found = chance(&[Stratum { n, a, b }], Some(1_050_000)).unwrap();
    let (alpha, beta) = (0.07, 0.15);
    assert!((found.mean - alpha * beta / (alpha + beta - alpha * beta)).abs() < 1e-7);
    assert!(found.variance > 0.0 && found.variance < 1e-8);
    assert!((found.p_value - 0.5).abs() < 1e-2, "{}", found.p_value);
    let strata = vec![Stratum { n: n / 100, a: a / 100, b: b / 100 }; 100];
    assert!((chance(&strata, None).unwrap().mean - found.mean).abs() < 1e-6);
}

#[test]
fn inclusion_rate_counts_the_circuits_that_touch_a_node() {
    let (n, size, positions) = (8_u32, 3, 2);
    let circuits: Vec<u32> = (0_u32..1 << n).filter(|s| s.count_ones() == size).collect();
    let touching = circuits.iter().filter(|&s| s & 3 != 0).count() as f64 / circuits.len() as f64;
    assert!((inclusion_rate(n.into(), size.into(), positions).unwrap() - touching).abs() < 1e-14);
    assert_eq!(inclusion_rate(10, 10, 1).unwrap(), 1.0);
    assert_eq!(inclusion_rate(10, 0, 4).unwrap(), 0.0);
}

#[test]
fn bad_input_is_refused_by_name() {
    let error = with_context(|c| top_n(&[1.0], 2, c)).unwrap_err().to_string();
    assert_eq!(error, "n: expected at most 1, the number of scores, found 2");
    let error = from_nodes(&[3, -1], 10).unwrap_err().to_string();
    assert_eq!(error, "indices: expected nodes in 0..10, found -1");
    let error = chance(&[Stratum { n: 3, a: 4, b: 1 }], None).unwrap_err().to_string();
    assert_eq!(error, "size_a: expected at most n = 3, found 4");
    let error = with_context(|c| intersection_and_union(&[1], &[1, 2], c)).unwrap_err().to_string();
    assert_eq!(error, "b: expected 1 words, as in a, found 2 words");
}
