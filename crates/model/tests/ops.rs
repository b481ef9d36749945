//! Every reference op against the formula it stands for, computed in f64 in another way: the
//! definitions that all backends are compared with are themselves compared with the text.

use model::config::{AttentionConfig, MoeConfig};
use model::reference::attention::{KeysValues, attention, softmax, visible};
use model::reference::linear::linear;
use model::reference::rms_norm::rms_norm;
use model::reference::rope::{angle, rope};
use model::reference::router::{route, sigmoid};
use model::reference::swiglu::swiglu;

/// Reproducible values in `-scale..scale` (splitmix64).
fn noise(len: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    (0..len)
        .map(|_| (next() as f32 / (1 << 23) as f32 - 1.0) * scale)
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[track_caller]
fn near(found: &[f32], wanted: &[f64], error_max: f64) {
    assert_eq!(found.len(), wanted.len());
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let error = (f64::from(*found) - wanted).abs();
        assert!(error <= error_max, "at {i}: {found}, not {wanted}");
    }
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    for (hidden, scale, eps) in [
        (1, 1.0, 1e-5f32),
        (64, 3.0, 1e-6),
        (577, 100.0, 1e-5),
        (8, 1e-4, 1e-5),
    ] {
        let (x, weight) = (noise(hidden, 1, scale), noise(hidden, 2, 2.0));
        let (wide_x, wide_weight) = (wide(&x), wide(&weight));
        let mean = wide_x.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
        let root = (mean + f64::from(eps)).sqrt();
        let wanted: Vec<f64> = wide_x
            .iter()
            .zip(wide_weight)
            .map(|(x, w)| x / root * w)
            .collect();
        let mut out = vec![0.0; hidden];
        rms_norm(&x, &weight, eps, &mut out);
        near(&out, &wanted, 1e-5);
    }
    let mut out = [1.0; 4];
    rms_norm(&[0.0; 4], &[1.0; 4], 1e-5, &mut out);
    assert_eq!(out, [0.0; 4], "a row of zeros stays one");
}

#[test]
fn linear_is_a_sum_of_products() {
    for (rows, cols) in [(1, 1), (3, 5), (17, 130)] {
        let (matrix, x) = (noise(rows * cols, 3, 1.0), noise(cols, 4, 1.0));
        let mut out = vec![f32::NAN; rows];
        linear(&matrix, &x, &mut out);
        let wanted: Vec<f64> = matrix
            .chunks(cols)
            .map(|row| wide(row).iter().zip(wide(&x)).map(|(w, x)| w * x).sum())
            .collect();
        near(&out, &wanted, 1e-4);
    }
}

/// The pair `(i, i + dims / 2)` is a complex number that is multiplied by `e^(i angle)`.
#[test]
fn rope_turns_pairs_and_leaves_the_rest() {
    for (head_dim, dims, theta, position) in [
        (24, 8, 1e4f32, 7u32),
        (192, 64, 1e7, 1000),
        (16, 16, 1e4, 131),
        (16, 0, 1e4, 5),
    ] {
        let before = noise(3 * head_dim, 5, 1.0);
        let mut heads = before.clone();
        rope(&mut heads, head_dim, dims, theta, position);
        let mut wanted = wide(&before);
        for head in wanted.chunks_mut(head_dim) {
            for i in 0..dims / 2 {
                let turn =
                    f64::from(position) * f64::from(theta).powf(-2.0 * i as f64 / dims as f64);
                let (a, b) = (head[i], head[i + dims / 2]);
                head[i] = a * turn.cos() - b * turn.sin();
                head[i + dims / 2] = a * turn.sin() + b * turn.cos();
            }
        }
        // An angle of 1000 radians is known to 1000 * 2^-24 in f32.
        near(&heads, &wanted, 2e-4);
        for (found, before) in heads.chunks(head_dim).zip(before.chunks(head_dim)) {
            assert_eq!(found[dims..], before[dims..]);
        }
    }
    let mut row = noise(16, 6, 1.0);
    let before = row.clone();
    rope(&mut row, 16, 8, 1e4, 0);
    assert_eq!(row, before, "position 0 does not turn");
    assert_eq!(angle(3, 0, 64, 1e7), 3.0);
}

/// Scores depend only on the distance of the positions.
#[test]
fn rope_is_relative() {
    let (q, k) = (noise(16, 7, 1.0), noise(16, 8, 1.0));
    let score = |at: u32, from: u32| {
        let (mut q, mut k) = (q.clone(), k.clone());
        rope(&mut q, 16, 16, 1e4, at);
        rope(&mut k, 16, 16, 1e4, from);
        q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>()
    };
    assert!((score(9, 4) - score(105, 100)).abs() < 1e-4);
}

fn shape(heads: usize, kv_heads: usize, qk_dim: usize, v_dim: usize) -> AttentionConfig {
    AttentionConfig {
        heads,
        kv_heads,
        qk_dim,
        v_dim,
        rope_dims: 0,
        rope_theta: 1e4,
        window: None,
        sinks: false,
        value_scale: 1.0,
    }
}

/// softmax(q K^T / sqrt(d) with the sink as one more column) without that column, times V.
fn attention_in_f64(
    c: &AttentionConfig,
    q: &[f32],
    cache: KeysValues<'_>,
    seen: &[usize],
    sinks: Option<&[f32]>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for head in 0..c.heads {
        let kv = head / (c.heads / c.kv_heads);
        let query = &wide(q)[head * c.qk_dim..][..c.qk_dim];
        let weight = |position: &usize| {
            let key = &wide(cache.keys)[(position * c.kv_heads + kv) * c.qk_dim..][..c.qk_dim];
            let dot: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
            (dot / (c.qk_dim as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = seen.iter().map(weight).collect();
        let sink = sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
        let total = weights.iter().sum::<f64>() + sink;
        for column in 0..c.v_dim {
            let value = |position: usize| {
                f64::from(cache.values[(position * c.kv_heads + kv) * c.v_dim + column])
            };
            let parts = weights.iter().zip(seen).map(|(w, p)| w / total * value(*p));
            out.push(parts.sum());
        }
    }
    out
}

#[test]
fn attention_with_groups_windows_and_sinks() {
    let positions = 140;
    for (heads, kv_heads, qk_dim, v_dim) in [(1, 1, 4, 4), (8, 2, 24, 16), (6, 6, 8, 12)] {
        let c = shape(heads, kv_heads, qk_dim, v_dim);
        let keys = noise(positions * kv_heads * qk_dim, 9, 2.0);
        let values = noise(positions * kv_heads * v_dim, 10, 1.0);
        let cache = KeysValues {
            keys: &keys,
            values: &values,
        };
        let q = noise(heads * qk_dim, 11, 2.0);
        let sink_logits = noise(heads, 12, 4.0);
        for (position, window) in [
            (0, None),
            (139, None),
            (139, Some(128)),
            (128, Some(128)),
            (5, Some(1)),
        ] {
            let seen: Vec<usize> = visible(position, window).collect();
            for sinks in [None, Some(&sink_logits[..])] {
                let mut out = vec![f32::NAN; heads * v_dim];
                attention(&c, &q, cache, seen.iter().copied(), sinks, &mut out);
                near(&out, &attention_in_f64(&c, &q, cache, &seen, sinks), 1e-5);
            }
        }
    }
}

/// mimo-v2.md A.6: sliding_window_size previous tokens and the query's own.
#[test]
fn visible_positions() {
    assert_eq!(visible(0, None), 0..1);
    assert_eq!(visible(500, None), 0..501);
    assert_eq!(visible(500, Some(128)).len(), 129);
    assert_eq!(visible(128, Some(128)), 0..129);
    assert_eq!(visible(129, Some(128)), 1..130);
    assert_eq!(visible(7, Some(0)), 7..8);
}

#[test]
fn softmax_with_large_scores_and_a_dominant_sink() {
    let mut scores = [1000.0, 999.0, -1000.0];
    softmax(&mut scores, None);
    let e = (-1.0f64).exp();
    near(&scores, &[1.0 / (1.0 + e), e / (1.0 + e), 0.0], 1e-6);
    let mut scores = [1.0, 2.0];
    softmax(&mut scores, Some(500.0));
    near(&scores, &[0.0, 0.0], 1e-6);
    let mut scores = [3.0];
    softmax(&mut scores, Some(3.0));
    assert_eq!(scores, [0.5]);
}

#[test]
fn swiglu_is_silu_of_the_gate_times_up() {
    let (mut gate, up) = (noise(100, 13, 20.0), noise(100, 14, 3.0));
    let wanted: Vec<f64> = wide(&gate)
        .iter()
        .zip(wide(&up))
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect();
    swiglu(&mut gate, &up);
    near(&gate, &wanted, 1e-5);
    let mut gate = [200.0, -200.0, 0.0];
    swiglu(&mut gate, &[2.0, 2.0, 2.0]);
    assert_eq!(gate[0], 400.0, "not clamped");
    assert!(gate[1].abs() < 1e-30 && gate[2] == 0.0);
}

fn moe(experts: usize, active: usize) -> MoeConfig {
    MoeConfig {
        experts,
        active,
        intermediate: 1,
        norm_topk: true,
        scaling: 1.0,
    }
}

/// noaux_tc by a search for the best set instead of a sort.
#[test]
fn route_chooses_by_biased_score_and_weighs_without_bias() {
    for seed in 0..50 {
        let config = MoeConfig {
            norm_topk: seed % 2 == 0,
            scaling: 1.0 + seed as f32 / 10.0,
            ..moe(16, 1 + seed as usize % 8)
        };
        let (logits, bias) = (noise(16, seed, 3.0), noise(16, seed + 100, 0.5));
        let score = |e: usize| 1.0 / (1.0 + (-f64::from(logits[e])).exp());
        let biased = |e: usize| score(e) + f64::from(bias[e]);
        let better = |e: usize| (0..16).filter(|&o| biased(o) > biased(e)).count();
        let wanted: Vec<usize> = (0..16).filter(|&e| better(e) < config.active).collect();
        let sum: f64 = wanted.iter().map(|&e| score(e)).sum();
        let divisor = if config.norm_topk { sum } else { 1.0 };
        let scaling = f64::from(config.scaling);
        let weights: Vec<f64> = wanted
            .iter()
            .map(|&e| score(e) / divisor * scaling)
            .collect();
        let (chosen, found): (Vec<usize>, Vec<f32>) =
            route(&config, &logits, &bias).into_iter().unzip();
        assert_eq!(chosen, wanted);
        near(&found, &weights, 1e-5);
    }
}

#[test]
fn route_gives_ties_to_the_lower_expert() {
    let equal = route(&moe(8, 3), &[0.5; 8], &[0.0; 8]);
    assert_eq!(equal.iter().map(|(e, _)| *e).collect::<Vec<_>>(), [0, 1, 2]);
    near(&[equal[0].1, equal[1].1], &[1.0 / 3.0, 1.0 / 3.0], 1e-6);
    // A bias decides who is chosen and not how much: the chosen weigh the same.
    let bias = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.5];
    let chosen = route(&moe(8, 3), &[0.5; 8], &bias);
    assert_eq!(
        chosen.iter().map(|(e, _)| *e).collect::<Vec<_>>(),
        [0, 6, 7]
    );
    assert_eq!(chosen[0].1, chosen[2].1);
    // Every expert active, as in the model that ships: an equal router gives equal weights.
    let all = route(&moe(8, 8), &[0.0; 8], &[0.0; 8]);
    assert!(all.iter().all(|(_, weight)| *weight == 0.125));
    // No score at all: the divisor is not 0.
    let none = route(&moe(4, 2), &[-200.0; 4], &[0.0; 4]);
    assert!(none.iter().all(|(_, weight)| *weight == 0.0));
}

#[test]
fn sigmoid_at_its_ends() {
    assert_eq!(
        (sigmoid(0.0), sigmoid(200.0), sigmoid(-200.0)),
        (0.5, 1.0, 0.0)
    );
    near(&[sigmoid(1.5)], &[1.0 / (1.0 + (-1.5f64).exp())], 1e-7);
}
