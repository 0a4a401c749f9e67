//! Linear CKA against its definition in `f64`, and the properties that make it worth computing.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicU64};

use half::bf16;
use microtome_core::metrics::cka::interval::half_samples;
use microtome_core::metrics::cka::minibatch::minibatch_cka;
use microtome_core::metrics::cka::{CkaMatrix, Estimator, Form, Layer, cka_matrix};
use microtome_core::scan::Context;
use microtome_core::{Data, Error, Rows};
use proptest::prelude::*;

const FORMS: [Form; 2] = [Form::Feature, Form::Gram];

/// Normal-looking numbers: the sum of four uniforms, from a counter.
fn gaussian(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let uniform = |i: u64| {
        let mut z = i.wrapping_add(seed << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..(n * d) as u64).map(|i| 1.732 * (0..4).map(|j| uniform(4 * i + j)).sum::<f32>()).collect()
}

/// The definition: n x n Gram matrices of centred rows, in f64. The debiased estimator is the same for any centre: that of a row keeps
/// the digits where another one is far larger.
fn definition(x: &[f32], dx: usize, y: &[f32], dy: usize, estimator: Estimator) -> f64 {
    let n = x.len() / dx;
    let gram = |x: &[f32], d: usize| -> Vec<f64> {
        let mean = |c: usize| (0..n).map(|i| f64::from(x[i * d + c])).sum::<f64>() / n as f64;
        let debiased = estimator == Estimator::Debiased;
        let centre: Vec<f64> = (0..d).map(|c| if debiased { x[d + c].into() } else { mean(c) }).collect();
        let at = |i: usize, c: usize| f64::from(x[i * d + c]) - centre[c];
        let entry = |i: usize, j: usize| {
            let off = estimator == Estimator::Biased || i != j;
            if off { (0..d).map(|c| at(i, c) * at(j, c)).sum() } else { 0.0 }
        };
        (0..n * n).map(|ij| entry(ij / n, ij % n)).collect()
    };
    let (k, l) = (gram(x, dx), gram(y, dy));
    let hsic = |k: &[f64], l: &[f64]| {
        let inner: f64 = k.iter().zip(l).map(|(a, b)| a * b).sum();
        let rows = |k: &[f64]| -> Vec<f64> { k.chunks(n).map(|row| row.iter().sum()).collect() };
        let (r, t) = (rows(k), rows(l));
        let cross: f64 = r.iter().zip(&t).map(|(a, b)| a * b).sum();
        estimator.hsic(n, inner, cross, r.iter().sum::<f64>() * t.iter().sum::<f64>())
    };
    hsic(&k, &l) / (hsic(&k, &k) * hsic(&l, &l)).sqrt()
}

fn with_context<T>(budget: usize, work: impl FnOnce(&Context<'_>) -> T) -> T {
    let (cancel, done) = (AtomicBool::new(false), AtomicU64::new(0));
    work(&Context { cancel: &cancel, done: &done, memory_budget: budget })
}

fn matrix(
    xs: &[(&[f32], usize)],
    estimator: Estimator,
    form: Option<Form>,
    budget: usize,
) -> Result<CkaMatrix, Error> {
    let rows: Vec<Rows<'_>> = xs.iter().map(|&(x, d)| Rows::new(Data::F32(x), d).unwrap()).collect();
    let layers: Vec<Layer<'_>> =
        rows.iter().enumerate().map(|(i, r)| Layer { name: format!("xs[{i}]"), source: r }).collect();
    with_context(budget, |context| cka_matrix(&layers, None, estimator, form, context))
}

fn pair(x: (&[f32], usize), y: (&[f32], usize), estimator: Estimator, form: Form) -> f64 {
    matrix(&[x, y], estimator, Some(form), 1 << 28).unwrap().values[1]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn both_forms_agree_with_the_definition(
        n in 4_usize..160, dx in 1_usize..140, dy in 1_usize..40, seed in 0_u64..1000, offset in -100.0_f32..100.0,
    ) {
        let x: Vec<f32> = gaussian(n, dx, seed).iter().map(|v| v + offset).collect();
        let mut y = gaussian(n, dy, seed + 5000);
        y.chunks_mut(dy).zip(x.chunks(dx)).for_each(|(y, x)| y[0] += 2.0 * (x[0] - offset));
        for estimator in [Estimator::Debiased, Estimator::Biased] {
            let expected = definition(&x, dx, &y, dy, estimator);
            for form in FORMS {
                let found = pair((&x, dx), (&y, dy), estimator, form);
                // A debiased self-term near zero divides by almost nothing: compare where it is defined at all.
                let tolerance = 2e-5 * (1.0 + expected.abs());
                if expected.abs() < 20.0 {
                    prop_assert!((found - expected).abs() < tolerance, "{estimator:?} {form:?}: {found} {expected}");
                }
            }
        }
    }
}

#[test]
fn cka_of_a_layer_with_itself_is_one_and_of_independent_layers_near_zero() {
    let (n, d) = (600, 90);
    let (x, y) = (gaussian(n, d, 1), gaussian(n, d, 2));
    for form in FORMS {
        let found = matrix(&[(&x, d), (&y, d)], Estimator::Debiased, Some(form), 1 << 28).unwrap();
        assert!((found.values[0] - 1.0).abs() < 1e-14 && (found.values[3] - 1.0).abs() < 1e-14);
        assert!(found.values[1].abs() < 0.01, "{}", found.values[1]);
        assert_eq!(found.values[1].to_bits(), found.values[2].to_bits());
        assert!(pair((&x, d), (&y, d), Estimator::Biased, form) > 0.1, "the biased estimator shows its bias");
    }
}

#[test]
fn a_few_rows_a_thousand_times_larger_leave_the_digits_of_the_others() {
    // Massive activations: the rows of the first tokens. Wide layers take the Gram form where the choice is free.
    for (n, d, size, every) in [
        (120, 8, 1e4_f32, 1000),
        (300, 40, 1e3, 100),
        (500, 64, 300.0, 64),
        (40, 300, 1e3, 1000),
        (12, 300, 3e4, 1000),
        (40, 160, 1e6, 1000),
    ] {
        let (mut x, e) = (gaussian(n, d, 7), gaussian(n, d, 8));
        let mut y: Vec<f32> = x.iter().zip(&e).map(|(x, e)| x + e + 3.0).collect();
        for layer in [&mut x, &mut y] {
            layer.chunks_mut(d).skip(5).step_by(every).flatten().for_each(|v| *v *= size);
        }
        let expected = definition(&x, d, &y, d, Estimator::Debiased);
        // Squares of norms lose what is below 1e-16 of the largest, which the feature form has to take off again.
        let forms = if size > 1e4 { [None, Some(Form::Gram)] } else { [None, Some(Form::Feature)] };
        for form in forms {
            let whole = matrix(&[(&x, d), (&y, d)], Estimator::Debiased, form, 1 << 28).unwrap();
            let off = (whole.values[1] - expected).abs();
            assert!(off < 1e-6, "{form:?} n={n} d={d} size={size}: off by {off} of {expected}");
        }
        let rows = [&x, &y].map(|layer| Rows::new(Data::F32(layer), d).unwrap());
        let layers = rows.each_ref().map(|rows| Layer { name: "x".to_owned(), source: rows });
        let (batch, all) = with_context(1 << 28, |context| {
            let batch = minibatch_cka(&layers, None, n, context).unwrap().values[1];
            (batch, half_samples(&layers, 20, 0, None, context).unwrap().estimate)
        });
        let off = [batch - expected, all - expected];
        assert!(off.iter().all(|off| off.abs() < 1e-6), "batch, interval n={n} size={size}: off by {off:?}");
    }
}

#[test]
fn heavy_rows_are_the_same_bits_whatever_the_budget() {
    let (n, d) = (700, 200);
    let mut x = gaussian(n, d, 9);
    let mut y: Vec<f32> = gaussian(n, d, 10).iter().zip(&x).map(|(e, x)| e + x).collect();
    x.chunks_mut(d).step_by(150).flatten().for_each(|v| *v *= 900.0);
    y[300 * d..301 * d].iter_mut().for_each(|v| *v *= 4000.0);
    let of = |budget| matrix(&[(&x, d), (&y, d)], Estimator::Debiased, Some(Form::Feature), budget).unwrap();
    let (roomy, tight) = (of(1 << 28), of(1 << 20));
    assert_eq!(roomy.values[1].to_bits(), tight.values[1].to_bits());
    assert!((roomy.values[1] - definition(&x, d, &y, d, Estimator::Debiased)).abs() < 1e-6);
}

#[test]
fn scale_and_offset_do_not_change_cka() {
    let (n, d) = (400, 50);
    let x = gaussian(n, d, 3);
    let y: Vec<f32> = gaussian(n, d, 4).iter().zip(&x).map(|(e, x)| e + x).collect();
    for form in FORMS {
        let plain = pair((&x, d), (&y, d), Estimator::Debiased, form);
        for (scale, offset, tolerance) in
            [(1.0_f32, 10.0_f32, 1e-6), (1.0, 1000.0, 1e-5), (1e25, 0.0, 1e-6), (1e-30, 0.0, 1e-6)]
        {
            let moved: Vec<f32> = x.iter().map(|v| v * scale + offset).collect();
            let found = pair((&moved, d), (&y, d), Estimator::Debiased, form);
            assert!((found - plain).abs() < tolerance, "{form:?} {scale} {offset}: {found} {plain}");
        }
    }
}

#[test]
fn half_precision_input_equals_its_widened_values() {
    let (n, d) = (300, 40);
    let words: Vec<bf16> = gaussian(n, d, 5).into_iter().map(bf16::from_f32).collect();
    let wide: Vec<f32> = words.iter().map(|w| w.to_f32()).collect();
    let y = gaussian(n, 7, 6);
    for form in FORMS {
        let (a, b) = (Rows::new(Data::Bf16(&words), d).unwrap(), Rows::new(Data::F32(&y), 7).unwrap());
        let layers = [Layer { name: "x".into(), source: &a }, Layer { name: "y".into(), source: &b }];
        let found = with_context(1 << 28, |context| {
            cka_matrix(&layers[..1], Some(&layers[1..]), Estimator::Debiased, Some(form), context).unwrap()
        });
        assert_eq!(found.values[0].to_bits(), pair((&wide, d), (&y, 7), Estimator::Debiased, form).to_bits());
    }
}

#[test]
fn bits_depend_neither_on_threads_nor_on_the_memory_budget() {
    let (n, d) = (1500, 200);
    let layers: Vec<Vec<f32>> = (0..3).map(|l| gaussian(n, d, 10 + l)).collect();
    let xs: Vec<(&[f32], usize)> = layers.iter().map(|x| (x.as_slice(), d)).collect();
    for form in FORMS {
        let run = |threads: usize, budget: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| matrix(&xs, Estimator::Debiased, Some(form), budget).unwrap());
            found.values.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let reference = run(1, 1 << 30);
        for (threads, budget) in [(2, 1 << 30), (3, 4 << 20), (7, 8 << 20), (16, 5 << 20)] {
            assert_eq!(run(threads, budget), reference, "{form:?} with {threads} threads and {budget} bytes");
        }
    }
}

#[test]
fn constant_columns_are_fine_and_a_constant_layer_is_undefined_and_listed() {
    let (n, d) = (64, 6);
    let mut x = gaussian(n, d, 7);
    x.chunks_mut(d).for_each(|row| row[2] = 3.7);
    let constant = vec![0.1_f32; n * 3];
    for form in FORMS {
        let found = matrix(&[(&x, d), (&constant, 3)], Estimator::Debiased, Some(form), 1 << 28).unwrap();
        assert!((found.values[0] - 1.0).abs() < 1e-14);
        assert!(found.values[1].is_nan() && found.values[2].is_nan() && found.values[3].is_nan());
        assert_eq!(found.undefined, [1]);
    }
}

#[test]
fn bad_input_is_refused_by_name() {
    let x = gaussian(20, 4, 8);
    let message =
        |xs: &[(&[f32], usize)]| matrix(xs, Estimator::Debiased, None, 1 << 28).unwrap_err().to_string();
    assert_eq!(message(&[(&x, 4), (&x[..40], 4)]), "xs[1]: expected 20 rows, as in xs[0], found 10 rows");
    assert_eq!(message(&[(&x[..12], 4)]), "xs[0]: expected at least 4 rows, found 3 rows");
    assert_eq!(message(&[]), "xs: expected at least one layer, found none");
    let mut bad = x.clone();
    bad[4 * 7 + 2] = f32::INFINITY;
    assert_eq!(message(&[(&x, 4), (&bad, 4)]), "xs[1]: expected finite values, found inf at row 7, column 2");
    let error = matrix(&[(&x, 4)], Estimator::Debiased, Some(Form::Feature), 1000).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
}

#[test]
fn a_value_that_is_not_finite_beyond_the_sampled_rows_is_found() {
    let (n, d) = (6000, 4);
    let mut x = gaussian(n, d, 9);
    x[4 * 300 + 1] = f32::NAN;
    for form in FORMS {
        let error = matrix(&[(&x, d)], Estimator::Debiased, Some(form), 1 << 28).unwrap_err();
        assert_eq!(error.to_string(), "xs[0]: expected finite values, found NaN at row 300, column 1");
    }
}
