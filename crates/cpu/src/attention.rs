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

use crate::isa::per_isa;
use crate::kv::{GROUP, KvCache, KvSequence};

/// Positions of a chunk.
const CHUNK: usize = 256;
/// Query heads of a key head that are computed together.
const TOGETHER: usize = 4;

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

impl Head<'_> {
    /// Keys and values of 16 positions.
    ///
    /// # Safety
    /// As [`attention`].
    #[inline(always)]
    unsafe fn group(&self, group: usize) -> crate::kv::GroupView<'_> {
        // SAFETY: by contract.
        unsafe {
            self.cache
                .group(self.sequence, self.layer, self.kv_head, group * GROUP)
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub struct AttentionScratch {
    /// `[heads, CHUNK]`.
    scores: Vec<f32>,
    /// `[heads]`: running largest score and sum.
    running: Vec<(f32, f32)>,
}

per_isa! {
    /// Attends the query heads `q` `[heads, qk_dim]` over `visible`; `sinks`: `[heads]`; `out`:
    /// `[heads, v_dim]`.
    ///
    /// # Safety
    /// No thread writes the visible positions until the next barrier; `isa` is one that
    /// [`Isa::detect`](crate::isa::Isa::detect) allows here.
    pub fn attention(
        head: Head<'_>,
        q: &[f32],
        visible: Range<usize>,
        sinks: Option<&[f32]>,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) = attend
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
    let heads = q.len() / head.qk_dim;
    let mut first = 0;
    while first < heads {
        let count = (heads - first).min(TOGETHER);
        let q = &q[first * head.qk_dim..(first + count) * head.qk_dim];
        let scores = &mut scratch.scores[first * CHUNK..(first + count) * CHUNK];
        // SAFETY: by contract.
        unsafe {
            match count {
                1 => score_heads::<1>(head, q, &range, scores),
                2 => score_heads::<2>(head, q, &range, scores),
                3 => score_heads::<3>(head, q, &range, scores),
                _ => score_heads::<TOGETHER>(head, q, &range, scores),
            }
        }
        first += count;
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
    let mut first = 0;
    while first < heads {
        let count = (heads - first).min(TOGETHER);
        let scores = &scratch.scores[first * CHUNK..(first + count) * CHUNK];
        let out = &mut out[first * head.v_dim..(first + count) * head.v_dim];
        // SAFETY: by contract.
        unsafe {
            match count {
                1 => add_values::<1>(head, groups.clone(), scores, out),
                2 => add_values::<2>(head, groups.clone(), scores, out),
                3 => add_values::<3>(head, groups.clone(), scores, out),
                _ => add_values::<TOGETHER>(head, groups.clone(), scores, out),
            }
        }
        first += count;
    }
}

/// Scores of `H` heads over `range`; `q`: `[H, qk_dim]`; `scores`: `[H, CHUNK]`, from the group of the
/// first position on. Two groups of positions at a time: one sum alone would wait for itself.
///
/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn score_heads<const H: usize>(
    head: Head<'_>,
    q: &[f32],
    range: &Range<usize>,
    scores: &mut [f32],
) {
    let scale = 1.0 / (head.qk_dim as f32).sqrt();
    let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * head.qk_dim..(h + 1) * head.qk_dim]);
    let groups = range.start / GROUP..range.end.div_ceil(GROUP);
    let mut group = groups.start;
    while group < groups.end {
        let pair = [group, (group + 1).min(groups.end - 1)];
        // SAFETY: by contract.
        let keys = pair.map(|group| unsafe { head.group(group).keys });
        let sums = dots(&q, keys);
        for (group, sums) in pair.into_iter().zip(sums) {
            for (h, sums) in sums.iter().enumerate() {
                let out = &mut scores[h * CHUNK + (group - groups.start) * GROUP..][..GROUP];
                for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                    let seen = range.contains(&(group * GROUP + i));
                    *out = if seen { sum * scale } else { f32::NEG_INFINITY };
                }
            }
        }
        group += 2;
    }
}

/// Products of `H` queries `[qk_dim]` with two groups of 16 keys `[qk_dim, 16]`.
#[inline(always)]
fn dots<const H: usize>(q: &[&[f32]; H], keys: [&[f32]; 2]) -> [[[f32; GROUP]; H]; 2] {
    let mut acc = [[[0.0f32; GROUP]; H]; 2];
    let columns = keys[0].as_chunks::<GROUP>().0;
    let others = keys[1].as_chunks::<GROUP>().0;
    for (d, (a, b)) in columns.iter().zip(others).enumerate() {
        for h in 0..H {
            let x = q[h][d];
            for lane in 0..GROUP {
                acc[0][h][lane] = a[lane].mul_add(x, acc[0][h][lane]);
                acc[1][h][lane] = b[lane].mul_add(x, acc[1][h][lane]);
            }
        }
    }
    acc
}

/// `out += sum of weight * value` over `groups`, for `H` heads. `weights`: `[H, CHUNK]`; `out`:
/// `[H, v_dim]`.
///
/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn add_values<const H: usize>(
    head: Head<'_>,
    groups: Range<usize>,
    weights: &[f32],
    out: &mut [f32],
) {
    for (g, group) in groups.enumerate() {
        // SAFETY: by contract.
        let values = unsafe { head.group(group).values };
        let weights: [&[f32; GROUP]; H] = std::array::from_fn(|h| {
            weights[h * CHUNK + g * GROUP..][..GROUP]
                .try_into()
                .expect("sixteen")
        });
        accumulate(weights, values, head.v_dim, out);
    }
}

/// Adds 16 positions. `values`: `[16, v_dim]`; `out`: `[H, v_dim]`.
#[inline(always)]
fn accumulate<const H: usize>(
    weights: [&[f32; GROUP]; H],
    values: &[f32],
    v_dim: usize,
    out: &mut [f32],
) {
    let whole = v_dim / GROUP * GROUP;
    for c in (0..whole).step_by(GROUP) {
        let mut acc = [[0.0f32; GROUP]; H];
        for h in 0..H {
            acc[h].copy_from_slice(&out[h * v_dim + c..][..GROUP]);
        }
        for i in 0..GROUP {
            let row: &[f32; GROUP] = values[i * v_dim + c..][..GROUP]
                .try_into()
                .expect("sixteen");
            for h in 0..H {
                for lane in 0..GROUP {
                    acc[h][lane] = row[lane].mul_add(weights[h][i], acc[h][lane]);
                }
            }
        }
        for h in 0..H {
            out[h * v_dim + c..][..GROUP].copy_from_slice(&acc[h]);
        }
    }
    for c in whole..v_dim {
        for h in 0..H {
            for i in 0..GROUP {
                let x = &mut out[h * v_dim + c];
                *x = values[i * v_dim + c].mul_add(weights[h][i], *x);
            }
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
