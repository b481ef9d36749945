//! Softmax attention of one query row and one key head over the cache: the definition of
//! `model::reference::attention`, chunk by chunk.
//!
//! ```text
//! for chunks of 256 absolute positions:
//!   s[g][i] = q[g] . k[i] / sqrt(qk_dim)      lanes are positions: K is stored transposed
//!   m = max, p = e^(s - m), o = sum p v       lanes are value columns
//!   merge (m, sum, o) into the running ones   in order of position
//! ```
//! Chunks and groups are aligned to absolute positions, so that a row's sums are the same in
//! whatever step it is computed. Query heads that share a key head are done together. The code is
//! plain Rust, compiled once for each instruction set.

use std::ops::Range;

use model::reference::sample::exp;

use crate::kv::{GROUP, KvCache, KvSequence};
use crate::linear::Isa;

/// Positions of a chunk.
const CHUNK: usize = 256;

/// One key head of one layer of one sequence.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// The cache.
    pub cache: &'a KvCache,
    /// The sequence.
    pub sequence: &'a KvSequence,
    /// Index among the cache's layers.
    pub layer: usize,
    /// Key and value head.
    pub kv_head: usize,
    /// Columns of a query.
    pub qk_dim: usize,
    /// Columns of a value.
    pub v_dim: usize,
}

/// Buffers of one thread.
#[derive(Default)]
pub struct AttentionScratch {
    /// `[heads, CHUNK]`.
    scores: Vec<f32>,
    /// `[heads, v_dim]`.
    chunk: Vec<f32>,
    /// `[heads]`: running largest score and sum.
    running: Vec<(f32, f32)>,
}

/// Attends the query heads `q` `[heads, qk_dim]` over `visible`; `sinks`: `[heads]`; `out`:
/// `[heads, v_dim]`.
///
/// # Safety
/// No thread writes the visible positions until the next barrier.
pub unsafe fn attention(
    isa: Isa,
    head: Head<'_>,
    q: &[f32],
    visible: Range<usize>,
    sinks: Option<&[f32]>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: `Isa::detect` found the features; the rest by contract.
        Isa::Avx512 | Isa::Amx => return unsafe { avx512(head, q, visible, sinks, scratch, out) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { avx2(head, q, visible, sinks, scratch, out) },
        Isa::Portable => {}
    }
    let _ = isa;
    // SAFETY: by contract.
    unsafe { attend(head, q, visible, sinks, scratch, out) }
}

/// # Safety
/// As [`attention`]; the processor has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn avx512(
    head: Head<'_>,
    q: &[f32],
    visible: Range<usize>,
    sinks: Option<&[f32]>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    // SAFETY: by contract.
    unsafe { attend(head, q, visible, sinks, scratch, out) }
}

/// # Safety
/// As [`attention`]; the processor has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(
    head: Head<'_>,
    q: &[f32],
    visible: Range<usize>,
    sinks: Option<&[f32]>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    // SAFETY: by contract.
    unsafe { attend(head, q, visible, sinks, scratch, out) }
}

/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn attend(
    head: Head<'_>,
    q: &[f32],
    visible: Range<usize>,
    sinks: Option<&[f32]>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let heads = q.len() / head.qk_dim;
    scratch.scores.resize(heads * CHUNK, 0.0);
    scratch.chunk.resize(heads * head.v_dim, 0.0);
    scratch.running.clear();
    scratch.running.extend((0..heads).map(|h| match sinks {
        Some(sinks) => (sinks[h], 1.0),
        None => (f32::NEG_INFINITY, 0.0),
    }));
    out.fill(0.0);
    let mut start = visible.start;
    while start < visible.end {
        let end = ((start / CHUNK + 1) * CHUNK).min(visible.end);
        // SAFETY: by contract.
        unsafe { attend_chunk(head, q, start..end, scratch, out) };
        start = end;
    }
    for (out, (_, sum)) in out.chunks_exact_mut(head.v_dim).zip(&scratch.running) {
        for x in out {
            *x /= sum;
        }
    }
}

/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn attend_chunk(
    head: Head<'_>,
    q: &[f32],
    range: Range<usize>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let groups = range.start / GROUP..range.end.div_ceil(GROUP);
    let used = groups.len() * GROUP;
    let scale = 1.0 / (head.qk_dim as f32).sqrt();
    for (g, group) in groups.clone().enumerate() {
        // SAFETY: by contract.
        let view = unsafe {
            head.cache
                .group(head.sequence, head.layer, head.kv_head, group * GROUP)
        };
        for (h, q) in q.chunks_exact(head.qk_dim).enumerate() {
            let mut scores = dot(q, view.keys);
            for (i, score) in scores.iter_mut().enumerate() {
                let seen = range.contains(&(group * GROUP + i));
                *score = if seen {
                    *score * scale
                } else {
                    f32::NEG_INFINITY
                };
            }
            scratch.scores[h * CHUNK + g * GROUP..][..GROUP].copy_from_slice(&scores);
        }
    }
    for (h, out) in out.chunks_exact_mut(head.v_dim).enumerate() {
        let scores = &mut scratch.scores[h * CHUNK..h * CHUNK + used];
        let (largest, sum) = &mut scratch.running[h];
        let before = *largest;
        *largest = largest_of(scores).max(before);
        if largest.is_infinite() && *largest < 0.0 {
            *largest = 0.0; // nothing but minus infinity: a broken row; NaN shows in the logits
        }
        let shrink = exp(before - *largest);
        *sum = *sum * shrink + softmax_part(scores, *largest);
        for x in out {
            *x *= shrink;
        }
    }
    for (g, group) in groups.enumerate() {
        // SAFETY: by contract.
        let view = unsafe {
            head.cache
                .group(head.sequence, head.layer, head.kv_head, group * GROUP)
        };
        for (h, out) in out.chunks_exact_mut(head.v_dim).enumerate() {
            let weights: &[f32; GROUP] = scratch.scores[h * CHUNK + g * GROUP..][..GROUP]
                .try_into()
                .expect("sixteen");
            accumulate(weights, view.values, out);
        }
    }
}

/// Scores of 16 positions. `q`: `[qk_dim]`; `keys`: `[qk_dim, 16]`.
#[inline(always)]
fn dot(q: &[f32], keys: &[f32]) -> [f32; GROUP] {
    let mut acc = [0.0f32; GROUP];
    for (x, column) in q.iter().zip(keys.as_chunks::<GROUP>().0) {
        for lane in 0..GROUP {
            acc[lane] = column[lane].mul_add(*x, acc[lane]);
        }
    }
    acc
}

/// `out += sum over 16 positions of weight * value`. `values`: `[16, v_dim]`.
#[inline(always)]
fn accumulate(weights: &[f32; GROUP], values: &[f32], out: &mut [f32]) {
    let v_dim = out.len();
    let (whole, rest) = out.as_chunks_mut::<16>();
    let tail = whole.len() * 16;
    for (c, out) in whole.iter_mut().enumerate() {
        let mut acc = *out;
        for (i, weight) in weights.iter().enumerate() {
            let row: &[f32; 16] = values[i * v_dim + c * 16..][..16]
                .try_into()
                .expect("sixteen");
            for lane in 0..16 {
                acc[lane] = row[lane].mul_add(*weight, acc[lane]);
            }
        }
        *out = acc;
    }
    for (c, out) in rest.iter_mut().enumerate() {
        for (i, weight) in weights.iter().enumerate() {
            *out = values[i * v_dim + tail + c].mul_add(*weight, *out);
        }
    }
}

#[inline(always)]
fn largest_of(scores: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; GROUP];
    for chunk in scores.as_chunks::<GROUP>().0 {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(*score);
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x))
}

/// Replaces scores by `e^(score - largest)` and returns their sum, 16 lanes added pairwise.
#[inline(always)]
fn softmax_part(scores: &mut [f32], largest: f32) -> f32 {
    let mut lanes = [0.0f32; GROUP];
    for chunk in scores.as_chunks_mut::<GROUP>().0 {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *score = exp(*score - largest);
            *lane += *score;
        }
    }
    crate::rms_norm::sum(lanes)
}
