//! `reference::sample` against a definition that sorts everything in f64.

use model::TokenId;
use model::random::{Purpose, uniform};
use model::reference::sample::{self, Distribution, Truncation};

/// A row with the given number of columns; `steps` > 0 rounds so that ties occur.
fn row(seed: u64, columns: u32, scale: f32, steps: f32) -> Vec<f32> {
    (0..columns)
        .map(|i| {
            let x = (uniform(seed, i, Purpose::Target) as f32 - 0.5) * scale;
            if steps > 0.0 {
                (x * steps).round() / steps
            } else {
                x
            }
        })
        .collect()
}

/// Straight from the documentation of `SamplingParams`.
fn definition(logits: &[f32], t: &Truncation) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let best = f64::from(logits[order[0]]);
    let weight = |i: usize| ((f64::from(logits[i]) - best) / f64::from(t.temperature)).exp();
    if t.top_k > 0 {
        order.truncate(t.top_k as usize);
    }
    let total: f64 = order.iter().map(|i| weight(*i)).sum();
    let mut mass = 0.0;
    let kept = order.iter().position(|i| {
        mass += weight(*i);
        mass >= f64::from(t.top_p) * total
    });
    if t.top_p < 1.0 {
        order.truncate(kept.map_or(order.len(), |n| n + 1));
    }
    order.retain(|i| weight(*i) >= f64::from(t.min_p));
    let total: f64 = order.iter().map(|i| weight(*i)).sum();
    let mut p = vec![0.0; logits.len()];
    for i in order {
        p[i] = weight(i) / total;
    }
    p
}

#[test]
fn distribution_is_the_definition() {
    let mut ours = Distribution::default();
    for (case, columns) in [5u32, 64, 300, 5_000, 50_000].into_iter().enumerate() {
        for (steps, scale) in [(0.0, 12.0), (2.0, 6.0), (0.0, 1.0)] {
            let logits = row(case as u64, columns, scale, steps);
            for top_k in [0, 1, 4, 40, 1000] {
                for top_p in [1.0, 0.999, 0.9, 0.3, 1e-4] {
                    for (min_p, temperature) in [(0.0, 1.0), (0.1, 0.7), (0.02, 1.7)] {
                        let t = Truncation {
                            temperature,
                            top_k,
                            top_p,
                            min_p,
                        };
                        assert!(ours.fill(&logits, &t));
                        compare(&ours, &definition(&logits, &t), &t);
                    }
                }
            }
        }
    }
}

fn compare(ours: &Distribution, expected: &[f64], t: &Truncation) {
    let mut p = vec![0.0; expected.len()];
    for (p, token) in p.iter_mut().zip(0..) {
        *p = ours.probability(token);
    }
    let entries = p.iter().filter(|p| **p > 0.0).count();
    let distance =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum() };
    if distance(&p, expected) < 1e-5 {
        return;
    }
    // Rounding to f32 may move one token over the edge of a truncation, or swap two tokens there
    // that have all but equal weights; nothing else may differ.
    let mut sorted = expected.to_vec();
    sorted.sort_by(f64::total_cmp);
    p.sort_by(f64::total_cmp);
    let kept = expected.iter().filter(|p| **p > 0.0).count();
    let edge = if entries == kept {
        1e-5
    } else {
        2.5 / kept as f64
    };
    assert!(
        entries.abs_diff(kept) <= 1 && distance(&p, &sorted) < edge,
        "{t:?}: {} entries, {kept} expected, distance {}",
        entries,
        distance(&p, &sorted)
    );
}

#[test]
fn argmax_takes_the_lowest_of_equals_and_finds_what_is_not_finite() {
    for columns in [1u32, 15, 16, 17, 255, 256, 257, 1000] {
        let logits = row(3, columns, 8.0, 2.0);
        let best = sample::argmax(&logits).unwrap();
        let expected = (0..columns)
            .rev()
            .max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]));
        assert_eq!(Some(best.0), expected);
        assert_eq!(sample::first_largest(&logits), expected);
        for at in 0..columns as usize {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut broken = logits.clone();
                broken[at] = bad;
                assert_eq!(sample::argmax(&broken), None);
            }
        }
    }
}

#[test]
fn exp_is_close_to_the_real_one() {
    let worst = (0..87_000).map(|i| {
        let x = -(i as f32) / 1000.0;
        let exact = f64::from(x).exp();
        let error = (f64::from(sample::exp(x)) - exact).abs() / exact;
        error / (2e-7 - f64::from(x) * 1e-7)
    });
    let worst = worst.fold(0.0, f64::max);
    assert!(worst < 1.0, "{worst} of the error allowed");
    assert_eq!(sample::exp(0.0), 1.0);
    assert_eq!(sample::exp(-1000.0), 0.0);
    assert_eq!(sample::exp(f32::NEG_INFINITY), 0.0);
}

#[test]
fn logprobs_sum_to_one_and_are_ordered() {
    let logits = row(5, 3000, 10.0, 0.0);
    let mut buffer = Vec::new();
    let report = sample::logprobs(&logits, 17, 3000, &mut buffer);
    let sum: f64 = report.top.iter().map(|(_, l)| f64::from(*l).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    assert!(report.top.is_sorted_by(|a, b| a.1 >= b.1));
    let own = report.top.iter().find(|(token, _)| *token == 17).unwrap();
    assert_eq!(own.1, report.chosen);
    let few = sample::logprobs(&logits, 17, 5, &mut buffer);
    assert_eq!(few.top[..], report.top[..5]);
}

#[test]
fn the_largest_are_found_among_ties() {
    let logits = row(8, 5000, 4.0, 3.0);
    let mut order: Vec<TokenId> = (0..5000).collect();
    order.sort_by(|a, b| {
        logits[*b as usize]
            .total_cmp(&logits[*a as usize])
            .then(a.cmp(b))
    });
    let mut out = Vec::new();
    for k in [1, 2, 63, 64, 400, 4999] {
        sample::largest(&logits, k, f32::MIN, &mut out);
        let mut got: Vec<TokenId> = out.iter().map(|entry| entry.0).collect();
        let mut expected = order[..k].to_vec();
        got.sort_unstable();
        expected.sort_unstable();
        assert_eq!(got, expected);
    }
}
