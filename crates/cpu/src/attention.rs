//! Softmax attention of a few query rows and one key head over the cache: the definition of
//! `model::reference::attention`, chunk by chunk.
//!
//! ```text
//! for chunks of 256 absolute positions:
//!   s[g][i] = q[g] . k[i] / sqrt(qk_dim)      lanes are positions: K is stored transposed
//!   m = max, p = e^(s - m), o = sum p v       lanes are value columns
//!   merge (m, sum, o) into the running ones   in order of position
//! ```
//! Chunks and groups are aligned to absolute positions, so that a row's sums are the same in
//! whatever step it is computed. Query heads that share a key head, and consecutive rows of a
//! sequence, are done together, so that keys and values come from L1 for all but the first. The code
//! is plain Rust, compiled once for each instruction set.

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

/// Rows that are attended together: consecutive ones of a sequence read the same keys.
pub const BUNDLE: usize = 4;

/// One query row of a bundle, at one key head.
#[derive(Default)]
pub struct Row<'a> {
    /// `[heads, qk_dim]`: the query heads that share the key head, or some of them.
    pub q: &'a [f32],
    /// Positions that it sees; an empty row has none.
    pub visible: Range<usize>,
    /// `[heads, v_dim]`.
    pub out: &'a mut [f32],
}

impl Row<'_> {
    /// The part of a chunk that this row sees.
    #[inline(always)]
    fn part(&self, chunk: &Range<usize>) -> Range<usize> {
        self.visible.start.max(chunk.start)..self.visible.end.min(chunk.end)
    }
}

/// Groups of 16 that hold a range of positions.
#[inline(always)]
fn groups(range: &Range<usize>) -> Range<usize> {
    range.start / GROUP..range.end.div_ceil(GROUP)
}

/// Buffers of one thread.
#[derive(Default)]
pub struct AttentionScratch {
    /// `[rows, heads, CHUNK]`.
    scores: Vec<f32>,
    /// `[rows, heads]`: running largest score and sum.
    running: Vec<(f32, f32)>,
}

per_isa! {
    /// Attends the rows of a bundle; `sinks`: `[heads]`.
    ///
    /// # Safety
    /// No thread writes the visible positions until the next barrier; `isa` is one that
    /// [`Isa::detect`](crate::isa::Isa::detect) allows here.
    pub fn attention(
        head: Head<'_>,
        rows: &mut [Row<'_>],
        sinks: Option<&[f32]>,
        scratch: &mut AttentionScratch,
    ) = attend
}

/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn attend(
    head: Head<'_>,
    rows: &mut [Row<'_>],
    sinks: Option<&[f32]>,
    scratch: &mut AttentionScratch,
) {
    let heads = rows.first().map_or(0, |row| row.q.len() / head.qk_dim);
    scratch.scores.resize(rows.len() * heads * CHUNK, 0.0);
    scratch.running.clear();
    scratch
        .running
        .extend((0..rows.len() * heads).map(|i| match sinks {
            Some(sinks) => (sinks[i % heads], 1.0),
            None => (f32::NEG_INFINITY, 0.0),
        }));
    rows.iter_mut().for_each(|row| row.out.fill(0.0));
    let seen = rows.iter().map(|row| row.visible.clone());
    let (first, last) = seen.fold((usize::MAX, 0), |(first, last), row| {
        (first.min(row.start), last.max(row.end))
    });
    let mut start = first;
    while start < last {
        let end = ((start / CHUNK + 1) * CHUNK).min(last);
        // SAFETY: by contract.
        unsafe { attend_chunk(head, rows, start..end, heads, scratch) };
        start = end;
    }
    for (r, row) in rows.iter_mut().enumerate() {
        let running = &scratch.running[r * heads..];
        for (out, (_, sum)) in row.out.chunks_exact_mut(head.v_dim).zip(running) {
            out.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// # Safety
/// As [`attention`].
#[inline(always)]
unsafe fn attend_chunk(
    head: Head<'_>,
    rows: &mut [Row<'_>],
    chunk: Range<usize>,
    heads: usize,
    scratch: &mut AttentionScratch,
) {
    let origin = chunk.start / CHUNK * CHUNK;
    let all = groups(&chunk);
    let mut group = all.start;
    while group < all.end {
        // Two groups at a time: one sum alone would wait for itself.
        let pair = [group, (group + 1).min(all.end - 1)];
        // SAFETY: by contract.
        let keys = pair.map(|group| unsafe { head.group(group).keys });
        for ahead in (group + 2..group + 4).filter(|ahead| *ahead < all.end) {
            // SAFETY: by contract.
            unsafe { prefetch(head.group(ahead).keys) };
        }
        for group in pair {
            // SAFETY: by contract.
            unsafe { prefetch(head.group(group).values) };
        }
        for (row, scores) in rows
            .iter()
            .zip(scratch.scores.chunks_exact_mut(heads * CHUNK))
        {
            let part = row.part(&chunk);
            if pair.iter().any(|group| groups(&part).contains(group)) {
                score_row(head.qk_dim, row.q, keys, pair, &part, origin, scores);
            }
        }
        group += 2;
    }
    for (r, row) in rows.iter_mut().enumerate() {
        let part = groups(&row.part(&chunk));
        if !part.is_empty() {
            let scores = &mut scratch.scores[r * heads * CHUNK..(r + 1) * heads * CHUNK];
            let running = &mut scratch.running[r * heads..(r + 1) * heads];
            let used = part.start * GROUP - origin..part.end * GROUP - origin;
            merge(scores, used, running, head.v_dim, row.out);
        }
    }
    for group in all {
        // SAFETY: by contract.
        let values = unsafe { head.group(group).values };
        for (row, scores) in rows
            .iter_mut()
            .zip(scratch.scores.chunks_exact(heads * CHUNK))
        {
            if groups(&row.part(&chunk)).contains(&group) {
                add_values(
                    &scores[group * GROUP - origin..],
                    values,
                    head.v_dim,
                    row.out,
                );
            }
        }
    }
}

/// Asks for memory that will be read soon: the cache is rarely in L2 when weights stream past it.
#[inline(always)]
fn prefetch(floats: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in floats.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = floats;
}

/// Scores of one row's heads at two groups of positions; `scores`: `[heads, CHUNK]` from position
/// `origin` on.
#[inline(always)]
fn score_row(
    qk_dim: usize,
    q: &[f32],
    keys: [&[f32]; 2],
    pair: [usize; 2],
    part: &Range<usize>,
    origin: usize,
    scores: &mut [f32],
) {
    let together = q.chunks(TOGETHER * qk_dim);
    for (q, scores) in together.zip(scores.chunks_mut(TOGETHER * CHUNK)) {
        match q.len() / qk_dim {
            1 => score_heads::<1>(qk_dim, q, keys, pair, part, origin, scores),
            2 => score_heads::<2>(qk_dim, q, keys, pair, part, origin, scores),
            3 => score_heads::<3>(qk_dim, q, keys, pair, part, origin, scores),
            _ => score_heads::<TOGETHER>(qk_dim, q, keys, pair, part, origin, scores),
        }
    }
}

#[inline(always)]
fn score_heads<const H: usize>(
    qk_dim: usize,
    q: &[f32],
    keys: [&[f32]; 2],
    pair: [usize; 2],
    part: &Range<usize>,
    origin: usize,
    scores: &mut [f32],
) {
    let scale = 1.0 / (qk_dim as f32).sqrt();
    let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * qk_dim..(h + 1) * qk_dim]);
    let sums = dots(&q, keys);
    for (group, sums) in pair.into_iter().zip(sums) {
        for (h, sums) in sums.iter().enumerate() {
            let out = &mut scores[h * CHUNK + group * GROUP - origin..][..GROUP];
            for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                let seen = part.contains(&(group * GROUP + i));
                *out = if seen { sum * scale } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Turns the scores `used` of each head into weights and brings the running sums to their largest.
#[inline(always)]
fn merge(
    scores: &mut [f32],
    used: Range<usize>,
    running: &mut [(f32, f32)],
    v_dim: usize,
    out: &mut [f32],
) {
    let heads = scores.chunks_exact_mut(CHUNK).zip(running);
    for ((scores, (largest, sum)), out) in heads.zip(out.chunks_exact_mut(v_dim)) {
        let scores = &mut scores[used.clone()];
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

/// Adds 16 positions to every head. `weights`: `[heads, CHUNK]` from the first of them on;
/// `values`: `[16, v_dim]`; `out`: `[heads, v_dim]`.
#[inline(always)]
fn add_values(weights: &[f32], values: &[f32], v_dim: usize, out: &mut [f32]) {
    let together = out.chunks_mut(TOGETHER * v_dim);
    for (out, weights) in together.zip(weights.chunks(TOGETHER * CHUNK)) {
        match out.len() / v_dim {
            1 => accumulate::<1>(weights, values, v_dim, out),
            2 => accumulate::<2>(weights, values, v_dim, out),
            3 => accumulate::<3>(weights, values, v_dim, out),
            _ => accumulate::<TOGETHER>(weights, values, v_dim, out),
        }
    }
}

#[inline(always)]
fn accumulate<const H: usize>(weights: &[f32], values: &[f32], v_dim: usize, out: &mut [f32]) {
    let weights: [&[f32; GROUP]; H] =
        std::array::from_fn(|h| weights[h * CHUNK..][..GROUP].try_into().expect("sixteen"));
    let whole = v_dim / GROUP * GROUP;
    for c in (0..whole).step_by(GROUP) {
        let mut acc = [[0.0f32; GROUP]; H];
        for h in 0..H {
            acc[h].copy_from_slice(&out[h * v_dim + c..][..GROUP]);
        }
        for i in 0..GROUP {
            let row: &[f32; GROUP] = values[i * v_dim + c..i * v_dim + c + GROUP]
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
    for (c, h) in (whole..v_dim).flat_map(|c| (0..H).map(move |h| (c, h))) {
        let x = &mut out[h * v_dim + c];
        *x = (0..GROUP).fold(*x, |x, i| values[i * v_dim + c].mul_add(weights[h][i], x));
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
