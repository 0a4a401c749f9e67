//! Feature statistics, top samples and FVU: equal to their definitions, for any thread count and any way to cut the rows.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};

use half::bf16;
use microtome_core::kernels::moments::Moments;
use microtome_core::kernels::residual::Decoder;
use microtome_core::metrics::features::{Accumulator, FeatureFold, Labelled};
use microtome_core::metrics::firing::{Firing, sample_fires};
use microtome_core::metrics::fvu::{BLOCK_ROWS, Fvu, Reconstruction, Variance};
use microtome_core::metrics::top::{Table, TopSamples};
use microtome_core::scan::{Context, Source, scan, scan_into};
use microtome_core::{Codes, Data, Error, Result, Rows};
use proptest::prelude::*;

/// Runs `work` in a pool of `threads` threads.
fn with_threads<T: Send>(threads: usize, work: impl FnOnce(&Context<'_>) -> T + Send) -> T {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 30 };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| work(&context))
}

/// A small deterministic generator: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform over [-1, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

struct Sample {
    indices: Vec<u32>,
    values: Vec<f32>,
    groups: Vec<u32>,
    samples: Vec<u64>,
    positions: Vec<u32>,
}

/// `n` rows of `k` slots over `d_sae` features; about a fifth of the slots is unfilled, values come in few sizes.
fn random_codes(seed: u64, n: usize, k: usize, d_sae: usize) -> Sample {
    let mut random = Random(seed);
    Sample {
        indices: (0..n * k).map(|_| random.below(d_sae) as u32).collect(),
        values: (0..n * k).map(|_| random.below(5) as f32 * 0.25).collect(),
        groups: (0..n).map(|_| random.below(3) as u32).collect(),
        samples: (0..n).map(|_| random.below(n / 3 + 1) as u64).collect(),
        positions: (0..n).map(|r| r as u32).collect(),
    }
}

impl Sample {
    fn labelled(&self, k: usize, d_sae: usize, rows: std::ops::Range<usize>) -> Labelled<'_> {
        let slots = rows.start * k..rows.end * k;
        Labelled {
            codes: Codes::fixed(&self.indices[slots.clone()], &self.values[slots], k, d_sae).unwrap(),
            groups: Some(&self.groups[rows.clone()]),
            samples: &self.samples[rows.clone()],
            positions: &self.positions[rows],
        }
    }
}

fn cells<F: FeatureFold>(
    fold: F,
    blocks: &[Labelled<'_>],
    context: &Context<'_>,
) -> Result<(F, Vec<F::Cell>)> {
    let mut state = Accumulator::new(fold);
    blocks.iter().try_for_each(|block| state.update(block, context))?;
    state.finish(context)
}

fn moments(d_sae: usize, groups: usize, n: usize, blocks: &[Labelled<'_>], threads: usize) -> Vec<Moments> {
    with_threads(threads, |context| cells(Firing::new(d_sae, groups, n), blocks, context).unwrap().1)
}

fn top(d_sae: usize, n: usize, per_sample: bool, blocks: &[Labelled<'_>], threads: usize) -> Table {
    with_threads(threads, |context| {
        let (fold, cells) =
            cells(TopSamples::new(d_sae, n, per_sample, 3).unwrap(), blocks, context).unwrap();
        fold.table(&cells)
    })
}

/// (group, feature, rank, sample, position, activation)
type Top = (u32, u32, u32, u64, u32, f32);
/// (activation, sample, position)
type Hit = (f32, u64, u32);

/// The table by sorting everything that fires.
fn top_definition(s: &Sample, k: usize, n: usize, per_sample: bool) -> Vec<Top> {
    let mut lists: BTreeMap<(u32, u32), Vec<Hit>> = BTreeMap::new();
    for (slot, (&f, &h)) in s.indices.iter().zip(&s.values).enumerate().filter(|(_, (_, h))| **h > 0.0) {
        let r = slot / k;
        lists.entry((s.groups[r], f)).or_default().push((h, s.samples[r], s.positions[r]));
    }
    let mut table = Vec::new();
    for ((group, feature), mut hits) in lists {
        hits.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        let mut seen = BTreeSet::new();
        let kept = hits.into_iter().filter(|h| !per_sample || seen.insert(h.1)).take(n);
        table.extend((1..).zip(kept).map(|(rank, (h, s, p))| (group, feature, rank, s, p, h)));
    }
    table
}

fn rows_of(t: &Table) -> Vec<(u32, u32, u32, u64, u32, f32)> {
    (0..t.rank.len())
        .map(|i| (t.group[i], t.list[i], t.rank[i], t.sample[i], t.position[i], t.activation[i]))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn statistics_equal_their_definition(
        seed: u64, n in 1..200_usize, k in 1..6_usize, d_sae in 1..20_usize,
    ) {
        let s = random_codes(seed, n, k, d_sae);
        let found = moments(d_sae, 3, n, &[s.labelled(k, d_sae, 0..n)], 2);
        let mut expected = vec![Moments::default(); 3 * d_sae];
        for (slot, (&f, &h)) in s.indices.iter().zip(&s.values).enumerate() {
            let cell = &mut expected[s.groups[slot / k] as usize * d_sae + f as usize];
            cell.sum += f64::from(h);
            cell.sum_sq += f64::from(h) * f64::from(h);
            cell.fires += u64::from(h > 0.0);
            cell.max = cell.max.max(h);
        }
        prop_assert_eq!(found, expected); // quarters: the sums are exact in any order
    }

    #[test]
    fn top_samples_equal_a_full_sort(
        seed: u64, n in 1..120_usize, k in 1..4_usize, keep in 1..4_usize, per_sample: bool,
    ) {
        let s = random_codes(seed, n, k, 6);
        let found = top(6, keep, per_sample, &[s.labelled(k, 6, 0..n)], 2);
        prop_assert_eq!(rows_of(&found), top_definition(&s, k, keep, per_sample));
    }

    #[test]
    fn sample_counts_equal_their_definition(seed: u64, n in 1..100_usize, k in 1..4_usize) {
        let s = random_codes(seed, n, k, 9);
        let mut order: Vec<u64> = (0..n as u64).collect();
        order.sort_by_key(|&r| s.samples[r as usize]);
        let sample = |i: usize| s.samples[order[i] as usize];
        let mut starts: Vec<u64> =
            (0..n).filter(|&i| i == 0 || sample(i) != sample(i - 1)).map(|i| i as u64).collect();
        starts.push(n as u64);
        let codes = s.labelled(k, 9, 0..n).codes;
        let found = with_threads(2, |context| sample_fires(&codes, &order, &starts, context).unwrap());
        let mut pairs = BTreeSet::new();
        for (slot, (&f, &h)) in s.indices.iter().zip(&s.values).enumerate() {
            if h > 0.0 {
                pairs.insert((f, s.samples[slot / k]));
            }
        }
        let fires = |f| pairs.iter().filter(|p| p.0 == f).count() as u64;
        let expected: Vec<u64> = (0..9).map(fires).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn fvu_equals_its_definition(seed: u64, n in 2..700_usize, d in 1..40_usize) {
        let mut random = Random(seed);
        let x: Vec<f32> = (0..n * d).map(|_| random.unit()).collect();
        let y: Vec<bf16> = (0..n * d).map(|_| bf16::from_f32(random.unit())).collect();
        let (rx, ry) = (Rows::new(Data::F32(&x), d).unwrap(), Rows::new(Data::Bf16(&y), d).unwrap());
        let fold = Fvu { reconstruction: Reconstruction::Given };
        let sums = with_threads(2, |context| scan(&[&rx, &ry], &fold, BLOCK_ROWS, context).unwrap());
        let column = |j: usize| (0..n).map(move |i| i * d + j);
        let mean: Vec<f64> =
            (0..d).map(|j| column(j).map(|i| f64::from(x[i])).sum::<f64>() / n as f64).collect();
        let error: f64 = x.iter().zip(&y).map(|(a, b)| (f64::from(*a) - b.to_f64()).powi(2)).sum();
        let centred: f64 = (0..n * d).map(|i| (f64::from(x[i]) - mean[i % d]).powi(2)).sum();
        prop_assert!((sums.fvu() / (error / centred) - 1.0).abs() < 1e-12);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (n, k, d_sae) = (50_000, 3, 1500);
    let mut s = random_codes(1, n, k, d_sae);
    let mut random = Random(2);
    s.values.iter_mut().for_each(|v| *v = random.unit().abs());
    let block = [s.labelled(k, d_sae, 0..n)];
    let one = (moments(d_sae, 3, n, &block, 1), rows_of(&top(d_sae, 4, true, &block, 1)));
    for threads in [2, 3, 7, 16] {
        assert!(one.0 == moments(d_sae, 3, n, &block, threads), "{threads} threads");
        assert!(one.1 == rows_of(&top(d_sae, 4, true, &block, threads)), "{threads} threads");
    }
}

#[test]
fn rows_that_come_in_pieces_give_the_bits_of_one_piece() {
    let (n, k, d_sae) = (40_000, 2, 300);
    let mut s = random_codes(3, n, k, d_sae);
    let mut random = Random(4);
    s.values.iter_mut().for_each(|v| *v = random.unit().abs());
    let whole = moments(d_sae, 3, n, &[s.labelled(k, d_sae, 0..n)], 2);
    let best = rows_of(&top(d_sae, 5, true, &[s.labelled(k, d_sae, 0..n)], 2));
    for cuts in [vec![1], vec![16_384], vec![5000, 5001, 30_000], vec![16_383, 32_769, 39_999]] {
        let bounds: Vec<usize> = [vec![0], cuts, vec![n]].concat();
        let pieces: Vec<_> = bounds.windows(2).map(|w| s.labelled(k, d_sae, w[0]..w[1])).collect();
        assert!(whole == moments(d_sae, 3, n, &pieces, 3), "{bounds:?}");
        assert!(best == rows_of(&top(d_sae, 5, true, &pieces, 3)), "{bounds:?}");
    }
}

#[test]
fn fvu_of_pieces_of_whole_blocks_has_the_bits_of_one_scan() {
    let (n, d) = (5 * BLOCK_ROWS + 17, 6);
    let mut random = Random(5);
    let x: Vec<f32> = (0..n * d).map(|_| random.unit() + 1000.0).collect();
    let y: Vec<f32> = (0..n * d).map(|_| random.unit() + 1000.0).collect();
    let (rx, ry) = (Rows::new(Data::F32(&x), d).unwrap(), Rows::new(Data::F32(&y), d).unwrap());
    let fold = Fvu { reconstruction: Reconstruction::Given };
    let whole = with_threads(1, |context| scan(&[&rx, &ry], &fold, BLOCK_ROWS, context).unwrap());
    let mut total = Variance::default();
    with_threads(3, |context| {
        for part in [0..2 * BLOCK_ROWS, 2 * BLOCK_ROWS..n] {
            let sources: [&dyn Source; 2] = [&rx.slice(part.clone()), &ry.slice(part)];
            scan_into(&mut total, &sources, &fold, BLOCK_ROWS, context).unwrap();
        }
    });
    assert_eq!(whole, total);
}

#[test]
fn codes_are_decoded_as_a_dense_product() {
    let (n, k, d_sae, d) = (300, 3, 12, 7);
    let s = random_codes(6, n, k, d_sae);
    let mut random = Random(7);
    let x: Vec<f32> = (0..n * d).map(|_| random.unit()).collect();
    let w: Vec<f32> = (0..d_sae * d).map(|_| random.unit()).collect();
    let bias: Vec<f32> = (0..d).map(|_| random.unit()).collect();
    let rows = Rows::new(Data::F32(&x), d).unwrap();
    let decoder = Decoder { weights: Rows::new(Data::F32(&w), d).unwrap(), bias: Some(&bias) };
    let codes = s.labelled(k, d_sae, 0..n).codes;
    let fold = Fvu { reconstruction: Reconstruction::Decoded(codes, decoder) };
    let found = with_threads(2, |context| scan(&[&rows], &fold, BLOCK_ROWS, context).unwrap());
    let mut error = 0.0;
    for i in 0..n {
        for j in 0..d {
            let mut x_hat = f64::from(bias[j]);
            for slot in i * k..(i + 1) * k {
                x_hat += f64::from(s.values[slot]) * f64::from(w[s.indices[slot] as usize * d + j]);
            }
            error += (f64::from(x[i * d + j]) - x_hat).powi(2);
        }
    }
    assert!((found.error / error - 1.0).abs() < 1e-12);
}

#[test]
fn rows_that_do_not_vary_have_no_fvu() {
    let x = vec![0.1_f32; 999];
    let rows = Rows::new(Data::F32(&x), 3).unwrap();
    let fold = Fvu { reconstruction: Reconstruction::Given };
    let sums = with_threads(2, |context| scan(&[&rows, &rows], &fold, BLOCK_ROWS, context).unwrap());
    assert_eq!((sums.error, sums.centred), (0.0, 0.0));
    assert!(sums.fvu().is_nan());
}

#[test]
fn faults_of_codes_are_named() {
    let update = |indices: &[u32], values: &[f32]| {
        let codes = Codes::fixed(indices, values, 1, 4).unwrap();
        with_threads(2, |context| cells(Firing::new(4, 1, 2), &[codes.into()], context).unwrap_err())
    };
    assert_eq!(
        update(&[1, 4], &[1.0, 1.0]).to_string(),
        "codes.indices: expected features below d_sae = 4, found 4 at row 1, slot 0"
    );
    assert!(matches!(update(&[1, 2], &[1.0, f32::NAN]), Error::NonFinite { .. }));
    assert!(matches!(update(&[1, 2], &[f32::INFINITY, 1.0]), Error::NonFinite { .. }));
    assert!(matches!(Codes::ragged(&[0, 2, 1, 2], &[0, 0], &[1.0, 1.0], 4), Err(Error::Shape { .. })));
    assert!(matches!(Codes::fixed(&[0], &[1.0, 2.0], 1, 4), Err(Error::Shape { .. })));
    assert!(matches!(TopSamples::new(4, 0, true, 1), Err(Error::Shape { .. })));
}

#[test]
fn an_unfilled_slot_may_hold_any_index() {
    let codes = Codes::fixed(&[u32::MAX, 1], &[0.0, 2.0], 2, 4).unwrap();
    let found = moments(4, 1, 1, &[codes.into()], 1);
    assert_eq!(found.iter().map(|m| m.fires).collect::<Vec<_>>(), [0, 1, 0, 0]);
}

#[test]
fn too_many_groups_for_the_memory_budget_are_refused() {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1000 };
    let codes = Codes::fixed(&[0], &[1.0], 1, 100).unwrap();
    let error = cells(Firing::new(100, 1, 1), &[codes.into()], &context).unwrap_err();
    assert!(matches!(error, Error::Memory { needed: 3200, budget: 1000, .. }), "{error}");
}

#[test]
fn a_cancelled_scan_stops() {
    let (cancel, done) = (AtomicBool::new(true), AtomicU64::new(0));
    let context = Context { cancel: &cancel, done: &done, memory_budget: 1 << 20 };
    let codes = Codes::fixed(&[0], &[1.0], 1, 4).unwrap();
    assert!(matches!(cells(Firing::new(4, 1, 1), &[codes.into()], &context), Err(Error::Cancelled)));
}
