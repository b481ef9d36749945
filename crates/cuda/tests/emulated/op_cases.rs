//! Parity of the small ops with `model::reference`, for any machine that runs `kernels/ops.cuh`:
//! the emulator and a GPU. A machine gets the sizes and the buffers as 32-bit words, in the order
//! that ops.cuh says, and writes the buffers back.

use cuda::layout::OpArgs;
use formats::bf16;
use model::config::{AttentionConfig, MoeConfig};
use model::reference::attention::{KeysValues, attention};
use model::reference::rms_norm::rms_norm;
use model::reference::rope::{angle, rope};
use model::reference::router::route;
use model::reference::swiglu::swiglu;
use model::reference::{accept, sample};

use crate::cases::{Random, relative_error};

/// Runs one op.
pub(crate) type Run<'a> = &'a dyn Fn(OpArgs, &mut [Vec<u32>]);

const RMS_NORM: i32 = 0;
const ROPE: i32 = 1;
const SWIGLU: i32 = 2;
const ROUTER: i32 = 3;
const ATTENTION: i32 = 4;
const ARGMAX: i32 = 5;
const ACCEPT: i32 = 6;

fn args(op: i32, sizes: &[usize], f: f32) -> OpArgs {
    let mut n = [0; 8];
    for (slot, size) in n.iter_mut().zip(sizes) {
        *slot = *size as i32;
    }
    OpArgs {
        op,
        n,
        f: [f, 0.0, 0.0],
        ..OpArgs::default()
    }
}

fn words(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&w| f32::from_bits(w)).collect()
}

fn poison(count: usize) -> Vec<u32> {
    vec![f32::NAN.to_bits(); count]
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    let error = relative_error(found, expected);
    assert!(error < 2e-6, "{what}: relative L2 error {error:.2e}");
}

pub(crate) fn rms_norm_rows(run: Run) {
    let (rows, hidden) = (9, 1000);
    let mut random = Random(11);
    let x: Vec<f32> = (0..rows * hidden).map(|_| random.value()).collect();
    let weight: Vec<f32> = (0..hidden).map(|_| random.value()).collect();
    let mut buffers = [words(&x), words(&weight), poison(x.len())];
    run(args(RMS_NORM, &[rows, hidden], 1e-5), &mut buffers);
    let mut expected = vec![0.0; x.len()];
    for (x, out) in x.chunks(hidden).zip(expected.chunks_mut(hidden)) {
        rms_norm(x, &weight, 1e-5, out);
    }
    close("rms_norm", &floats(&buffers[2]), &expected);
}

pub(crate) fn rope_heads(run: Run) {
    let (heads, head_dim, dims) = (17, 192, 64);
    let mut random = Random(12);
    for (position, theta) in [(0, 1e4), (5, 1e7), (131_071, 1e4)] {
        let turn: Vec<f32> = (0..dims / 2)
            .flat_map(|i| {
                let (sin, cos) = angle(position, i, dims, theta).sin_cos();
                [cos, sin]
            })
            .collect();
        let mut expected: Vec<f32> = (0..heads * head_dim).map(|_| random.value()).collect();
        let mut buffers = [words(&expected), words(&turn)];
        run(args(ROPE, &[heads, head_dim, dims], 0.0), &mut buffers);
        rope(&mut expected, head_dim, dims, theta, position);
        close("rope", &floats(&buffers[0]), &expected);
    }
}

pub(crate) fn swiglu_values(run: Run) {
    let mut random = Random(13);
    let mut gate: Vec<f32> = (0..700).map(|_| random.value()).collect();
    let up: Vec<f32> = (0..700).map(|_| random.value()).collect();
    let mut buffers = [words(&gate), words(&up)];
    run(args(SWIGLU, &[700], 0.0), &mut buffers);
    swiglu(&mut gate, &up);
    close("swiglu", &floats(&buffers[0]), &gate);
}

/// The choice must be equal, the weights close; the list is the ascending union.
pub(crate) fn router_choices(run: Run) {
    let mut random = Random(14);
    for (tokens, experts, active, ties) in [(8, 384, 8, false), (3, 16, 4, true), (1, 512, 8, true)]
    {
        let config = MoeConfig {
            experts,
            active,
            intermediate: 32,
            norm_topk: true,
            scaling: 1.0,
        };
        let value = |r: &mut Random| {
            if ties {
                (r.bits() % 3) as f32
            } else {
                r.value()
            }
        };
        let logits: Vec<f32> = (0..tokens * experts).map(|_| value(&mut random)).collect();
        let bias: Vec<f32> = (0..experts)
            .map(|_| if ties { 0.0 } else { random.value() * 0.1 })
            .collect();
        let n = tokens * active;
        let mut buffers = [
            words(&logits),
            words(&bias),
            poison(n),
            poison(n),
            poison(tokens * experts.div_ceil(32)),
            poison(n),
            poison(1),
        ];
        run(
            args(ROUTER, &[tokens, experts, active, 1], 1.0),
            &mut buffers,
        );
        let expected: Vec<(usize, f32)> = logits
            .chunks(experts)
            .flat_map(|l| route(&config, l, &bias))
            .collect();
        let chosen: Vec<u32> = expected.iter().map(|(e, _)| *e as u32).collect();
        assert_eq!(buffers[2], chosen, "{experts} experts");
        let weights: Vec<f32> = expected.iter().map(|(_, w)| *w).collect();
        close("router weights", &floats(&buffers[3]), &weights);
        let mut union = chosen;
        union.sort_unstable();
        union.dedup();
        assert_eq!(buffers[6], [union.len() as u32]);
        assert_eq!(buffers[5][..union.len()], union);
    }
}

/// Full and sliding ranges, with and without sinks, whole and split over parts.
pub(crate) fn attention_heads(run: Run) {
    let config = AttentionConfig {
        heads: 16,
        kv_heads: 1,
        qk_dim: 192,
        v_dim: 128,
        rope_dims: 64,
        rope_theta: 1e4,
        window: None,
        sinks: true,
        value_scale: 1.0,
    };
    let mut random = Random(15);
    let bf16_words = |count: usize, random: &mut Random| -> Vec<u16> {
        (0..count).map(|_| bf16::encode(random.value())).collect()
    };
    let positions = 300;
    let keys = bf16_words(positions * 192, &mut random);
    let values = bf16_words(positions * 128, &mut random);
    let q: Vec<f32> = (0..16 * 192).map(|_| random.value() * 0.3).collect();
    let sinks: Vec<f32> = (0..16).map(|_| random.value()).collect();
    let decoded = |v: &[u16]| -> Vec<f32> { v.iter().map(|&x| bf16::decode(x)).collect() };
    let (k, v) = (decoded(&keys), decoded(&values));
    for (first, end, parts, sink) in [
        (0, 1, 1, true),
        (0, 300, 1, false),
        (171, 300, 1, true),
        (0, 300, 4, true),
    ] {
        let pack = |v: &[u16]| -> Vec<u32> {
            v.chunks(2)
                .map(|p| u32::from(p[0]) | u32::from(p[1]) << 16)
                .collect()
        };
        let mut buffers = [
            words(&q),
            pack(&keys),
            pack(&values),
            words(&sinks),
            poison(16 * 128),
        ];
        let scale = 1.0 / 192f32.sqrt();
        run(
            args(
                ATTENTION,
                &[16, first, end, 192, 128, parts, usize::from(sink)],
                scale,
            ),
            &mut buffers,
        );
        let mut expected = vec![0.0; 16 * 128];
        let view = KeysValues {
            keys: &k,
            values: &v,
        };
        attention(
            &config,
            &q,
            view,
            first..end,
            sink.then_some(&sinks[..]),
            &mut expected,
        );
        close("attention", &floats(&buffers[4]), &expected);
    }
}

pub(crate) fn argmax_rows(run: Run) {
    let (rows, count) = (9, 1000);
    let mut random = Random(16);
    // Few distinct values, so that ties are common.
    let mut logits: Vec<f32> = (0..rows * count)
        .map(|_| (random.bits() % 50) as f32 - 25.0)
        .collect();
    logits[..count].fill(-0.0);
    logits[7] = 0.0;
    let mut buffers = [words(&logits), poison(rows)];
    run(args(ARGMAX, &[rows, count], 0.0), &mut buffers);
    let expected: Vec<u32> = logits
        .chunks(count)
        .map(|l| sample::first_largest(l).unwrap())
        .collect();
    assert_eq!(buffers[1], expected);
}

pub(crate) fn accepted_prefix(run: Run) {
    for (best, drafted) in [
        (vec![4, 5, 6, 7], vec![4, 5, 9, 7]),
        (vec![1; 7], vec![1; 7]),
        (vec![3], vec![2]),
    ] {
        let mut buffers = [best.clone(), drafted.clone(), poison(1)];
        run(args(ACCEPT, &[drafted.len()], 0.0), &mut buffers);
        assert_eq!(buffers[2], [accept::greedy(&best, &drafted) as u32]);
    }
}
