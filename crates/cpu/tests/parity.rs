//! Every op against its definition in `model::reference`, over odd shapes and every instruction set
//! of this machine. Bounds cover rounding and the order of sums only.

use cpu::attention::{AttentionScratch, Head, Row, attention};
use cpu::isa::Isa;
use cpu::kv::{KvCache, LayerShape};
use cpu::rope::RopeTable;
use model::config::{AttentionConfig, MoeConfig};
use model::reference;
use model::reference::attention::{KeysValues, visible};

/// Values in -1..1, the same in every run.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn near(found: &[f32], wanted: &[f32], bound: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!(
            (a - b).abs() <= bound * b.abs().max(1.0),
            "{what}[{i}]: {a}, expected {b}"
        );
    }
}

fn sets() -> Vec<Isa> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx];
    let best = all.iter().position(|isa| *isa == Isa::detect()).unwrap();
    all[..=best].to_vec()
}

/// What every instruction set gives, which must be the same bits.
fn same_bits(mut run: impl FnMut(Isa) -> Vec<f32>) -> Vec<f32> {
    let all: Vec<Vec<f32>> = sets().into_iter().map(&mut run).collect();
    for found in &all {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(found), bits(&all[0]), "instruction sets disagree");
    }
    all.into_iter().next().unwrap()
}

#[test]
fn rms_norm() {
    for hidden in [1, 15, 16, 17, 576, 4096] {
        let (x, weight) = (values(hidden, 1), values(hidden, 2));
        for eps in [1e-6, 1e-5] {
            let found = same_bits(|isa| {
                let mut out = vec![0.0; hidden];
                // SAFETY: the machine has `isa`.
                unsafe { cpu::rms_norm::rms_norm(isa, &x, &weight, eps, &mut out) };
                out
            });
            let mut wanted = vec![0.0; hidden];
            reference::rms_norm::rms_norm(&x, &weight, eps, &mut wanted);
            near(&found, &wanted, 1e-5, "rms_norm");
        }
    }
}

#[test]
fn rope() {
    for (head_dim, dims, theta) in [(64, 64, 1e5), (192, 64, 1e7), (18, 6, 1e4), (10, 0, 1e4)] {
        let mut table = RopeTable::new(dims, theta);
        table.reach(3000);
        for position in [0, 1, 127, 128, 2999] {
            let mut wanted = values(3 * head_dim, 3);
            let found = same_bits(|isa| {
                let mut heads = wanted.clone();
                // SAFETY: the machine has `isa`.
                unsafe { table.rotate(isa, &mut heads, head_dim, position) };
                heads
            });
            reference::rope::rope(&mut wanted, head_dim, dims, theta, position);
            near(&found, &wanted, 1e-6, "rope");
        }
    }
}

#[test]
fn router() {
    for (experts, active, norm_topk) in
        [(8, 8, true), (5, 2, false), (256, 8, true), (384, 1, true)]
    {
        let config = MoeConfig {
            experts,
            active,
            intermediate: 32,
            norm_topk,
            scaling: 1.5,
        };
        for seed in 0..20 {
            // Whole steps, so that equal scores occur.
            let logits: Vec<f32> = values(experts, seed)
                .iter()
                .map(|x| (x * 8.0).round() / 2.0)
                .collect();
            let bias: Vec<f32> = values(experts, seed + 100)
                .iter()
                .map(|x| (x * 4.0).round() / 16.0)
                .collect();
            let mut chosen = vec![(0, 0.0); active];
            cpu::router::route(&config, &mut logits.clone(), &bias, &mut chosen);
            let wanted = reference::router::route(&config, &logits, &bias);
            let ids = |list: &[(u32, f32)]| list.iter().map(|c| c.0 as usize).collect::<Vec<_>>();
            assert_eq!(ids(&chosen), wanted.iter().map(|w| w.0).collect::<Vec<_>>());
            let weights = |i: usize| (chosen[i].1, wanted[i].1);
            (0..active).for_each(|i| near(&[weights(i).0], &[weights(i).1], 1e-5, "router"));
        }
    }
}

#[test]
fn swiglu() {
    let mut gate = values(1000, 5);
    gate.iter_mut().for_each(|x| *x *= 30.0);
    gate.extend([0.0, -0.0, 1e-20, 88.0, -88.0, 200.0, -200.0]);
    let up = values(gate.len(), 6);
    let found = same_bits(|isa| {
        let mut out = vec![0.0; gate.len()];
        // SAFETY: the machine has `isa`.
        unsafe { cpu::swiglu::swiglu(isa, &gate, &up, &mut out) };
        out
    });
    reference::swiglu::swiglu(&mut gate, &up);
    near(&found, &gate, 1e-5, "swiglu");
}

/// Rows of a cache, query heads that share a key head, sinks and windows; positions on both sides of
/// pages, groups and chunks.
#[test]
fn attention_over_pages_and_rings() {
    for (heads, kv_heads, qk_dim, v_dim) in [(9, 3, 64, 64), (4, 1, 192, 128), (4, 2, 18, 10)] {
        for (window, sinks) in [(None, false), (Some(128), true), (Some(16), false)] {
            let shape = LayerShape {
                kv_heads,
                qk_dim,
                v_dim,
                window,
            };
            let config = AttentionConfig {
                heads,
                kv_heads,
                qk_dim,
                v_dim,
                rope_dims: 0,
                rope_theta: 1e4,
                window,
                sinks,
                value_scale: 1.0,
            };
            check_attention(&config, shape, sinks.then(|| values(heads, 9)).as_deref());
        }
    }
}

fn check_attention(config: &AttentionConfig, shape: LayerShape, sinks: Option<&[f32]>) {
    const POSITIONS: usize = 600;
    let mut cache = KvCache::new(&[shape], POSITIONS.div_ceil(cpu::kv::PAGE));
    let mut sequence = cache.open();
    let keys = values(POSITIONS * config.kv_heads * config.qk_dim, 7);
    let written = values(POSITIONS * config.kv_heads * config.v_dim, 8);
    let group = config.heads / config.kv_heads;
    for position in 0..POSITIONS {
        cache
            .reserve(&mut sequence, position, position + 1)
            .unwrap();
        let key = &keys[position * config.kv_heads * config.qk_dim..];
        let value = &written[position * config.kv_heads * config.v_dim..];
        // SAFETY: one thread; the position was reserved.
        unsafe { cache.write(&sequence, 0, position, key, value) };
        cache.advance(&mut sequence, position + 1, false);
        if ![0, 1, 15, 16, 63, 64, 127, 128, 129, 255, 256, 511, 599].contains(&position) {
            continue;
        }
        let q = values(config.heads * config.qk_dim, position as u64 + 10);
        let seen = visible(position, config.window);
        let mut wanted = vec![0.0; config.heads * config.v_dim];
        let rows = KeysValues {
            keys: &keys,
            values: &written,
        };
        reference::attention::attention(config, &q, rows, seen.clone(), sinks, &mut wanted);
        for isa in sets() {
            let mut found = vec![0.0; wanted.len()];
            for (kv_head, out) in found.chunks_exact_mut(group * config.v_dim).enumerate() {
                let (qk_dim, v_dim) = (config.qk_dim, config.v_dim);
                let head = Head {
                    cache: &cache,
                    sequence: &sequence,
                    layer: 0,
                    kv_head,
                    qk_dim,
                    v_dim,
                };
                let q = &q[kv_head * group * qk_dim..][..group * qk_dim];
                let sinks = sinks.map(|sinks| &sinks[kv_head * group..][..group]);
                let mut scratch = AttentionScratch::default();
                // Beside a row that sees one position less: neither changes the other.
                let mut shorter = vec![0.0; out.len()];
                let less = seen.start..(seen.end - 1).max(seen.start + 1);
                let other = Row {
                    q,
                    visible: less,
                    out: &mut shorter,
                };
                let mut rows = [
                    Row {
                        q,
                        visible: seen.clone(),
                        out,
                    },
                    other,
                ];
                // SAFETY: one thread, which writes nothing meanwhile.
                unsafe { attention(isa, head, &mut rows, sinks, &mut scratch) };
                let visible = rows[1].visible.clone();
                let (mut alone, bits) = (vec![0.0; shorter.len()], f32::to_bits);
                let mut row = [Row {
                    q,
                    visible,
                    out: &mut alone,
                }];
                // SAFETY: as above.
                unsafe { attention(isa, head, &mut row, sinks, &mut scratch) };
                assert!(
                    alone
                        .iter()
                        .zip(&shorter)
                        .all(|(a, b)| bits(*a) == bits(*b))
                );
            }
            near(&found, &wanted, 1e-5, "attention");
        }
    }
}
