//! The phases of a forward pass that target and drafter share: projections, attention, experts and
//! sums, each thread on its own part.

use model::config::AttentionConfig;

use super::{Batch, PackedSwiglu};
use crate::attention::{AttentionScratch, BUNDLE, Head, Row, attention};
use crate::isa::Isa;
use crate::linear::linear;
use crate::panels::{PANEL, Panels};
use crate::pool::Team;
use crate::scratch::{Routing, Scratch};
use crate::swiglu::swiglu;

/// Positions of attention that take long enough for a sign of life each time.
const LONG_POSITIONS: usize = 2048;
/// Rows that make one expert take long enough.
const LONG_ROWS: usize = 16;

/// `scratch.x[row] += matrix * input[row]` for this thread's panels.
pub(crate) fn add_product(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    matrix: &Panels,
    bias: Option<&[f32]>,
    rows: &[u32],
) {
    let hidden = matrix.rows();
    // SAFETY: the input is complete since the last barrier; each thread has its own columns of `x`.
    unsafe {
        let panels = team.share(matrix.panels());
        linear(
            isa,
            matrix,
            panels,
            &scratch.heads,
            rows,
            |i, panel, values| {
                let columns = PANEL.min(hidden - panel * PANEL);
                let at = rows[i] as usize * hidden + panel * PANEL;
                let x = scratch.x.write(at..at + columns);
                for (lane, x) in x.iter_mut().enumerate() {
                    let bias = bias.map_or(0.0, |bias| bias[panel * PANEL + lane]);
                    *x += values[lane] + bias;
                }
            },
        );
    }
}

/// This thread's part of several matrices that are worked on as one list of panels.
pub(crate) fn shares<'m>(
    team: Team<'_>,
    matrices: impl Iterator<Item = &'m Panels> + Clone,
) -> impl Iterator<Item = (usize, &'m Panels, std::ops::Range<usize>)> {
    let total = matrices.clone().map(Panels::panels).sum();
    let mine = team.share(total);
    let mut start = 0;
    matrices.enumerate().map(move |(i, matrix)| {
        let (from, to) = (start, start + matrix.panels());
        start = to;
        let first = mine.start.clamp(from, to) - from;
        let last = mine.end.clamp(from, to) - from;
        (i, matrix, first..last)
    })
}

/// Q, K and V, or whatever goes into `scratch.projected` side by side.
pub(crate) fn project<'m>(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    matrices: impl Iterator<Item = (&'m Panels, Option<&'m [f32]>)> + Clone,
    rows: &[u32],
) {
    let width: usize = matrices.clone().map(|(m, _)| m.rows()).sum();
    let starts = matrices.clone().scan(0, |start, (m, bias)| {
        *start += m.rows();
        Some((*start - m.rows(), bias))
    });
    for ((_, matrix, panels), (start, bias)) in
        shares(team, matrices.clone().map(|(m, _)| m)).zip(starts)
    {
        // SAFETY: `h` is complete since the last barrier; each thread has its own panels.
        unsafe {
            linear(isa, matrix, panels, &scratch.h, rows, |i, panel, values| {
                let columns = PANEL.min(matrix.rows() - panel * PANEL);
                let at = rows[i] as usize * width + start + panel * PANEL;
                let out = scratch.projected.write(at..at + columns);
                out.copy_from_slice(&values[..columns]);
                let bias = bias.iter().flat_map(|bias| &bias[panel * PANEL..]);
                for (out, bias) in out.iter_mut().zip(bias) {
                    *out += bias;
                }
            });
        }
    }
}

/// Attention of every row and head; results end in `scratch.attended`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attend_rows(
    team: Team<'_>,
    isa: Isa,
    a: &AttentionConfig,
    sinks: Option<&[f32]>,
    batch: &Batch<'_>,
    layer: usize,
    visible: impl Fn(usize) -> std::ops::Range<usize>,
    thread_scratch: &mut AttentionScratch,
) {
    let count = batch.rows.len();
    // Query heads that share a key head and rows of a sequence read keys once together, unless there
    // are too few of them to go round.
    let (heads, bundle) = match count * a.kv_heads {
        items if items < 4 * team.threads => (1, 1),
        items if items < 2 * BUNDLE * team.threads => (a.heads / a.kv_heads, BUNDLE.min(2)),
        _ => (a.heads / a.kv_heads, BUNDLE),
    };
    let parts = a.heads / heads;
    for item in team.share(count.div_ceil(bundle) * parts) {
        let first = item % parts * heads;
        let mut start = item / parts * bundle;
        let end = (start + bundle).min(count);
        while start < end {
            let sequence = batch.rows[start].sequence;
            let same = batch.rows[start..end].iter();
            let stop = start + same.take_while(|row| row.sequence == sequence).count();
            let head = Head {
                cache: batch.cache,
                sequence: batch.sequences[sequence],
                layer,
                kv_head: first / (a.heads / a.kv_heads),
                qk_dim: a.qk_dim,
                v_dim: a.v_dim,
            };
            let mut rows: [Row<'_>; BUNDLE] = Default::default();
            for (row, r) in rows.iter_mut().zip(start..stop) {
                // SAFETY: projections are complete since the last barrier; each item has its own
                // heads of the output.
                unsafe {
                    let [q, _, _] = batch.scratch.projections_read(r, a);
                    row.q = &q[first * a.qk_dim..(first + heads) * a.qk_dim];
                    let at = (r * a.heads + first) * a.v_dim;
                    row.out = batch.scratch.attended.write(at..at + heads * a.v_dim);
                }
                row.visible = visible(r);
            }
            if rows[0].visible.len() >= LONG_POSITIONS {
                team.alive();
            }
            let sinks = sinks.map(|sinks| &sinks[first..first + heads]);
            // SAFETY: the cache is complete since the last barrier.
            unsafe { attention(isa, head, &mut rows[..stop - start], sinks, thread_scratch) };
            start = stop;
        }
    }
}

/// Turns attended rows into the activations of o_proj.
pub(crate) fn pack_heads(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    rows: &[u32],
    columns: usize,
) {
    for &row in &rows[team.share(rows.len())] {
        let row = row as usize;
        // SAFETY: complete since the last barrier; each thread has its own rows.
        unsafe {
            let heads = scratch.attended.read(row * columns..(row + 1) * columns);
            scratch.heads.set(isa, row, heads);
        }
    }
}

/// The experts of `routing` on rows of `scratch.h`; the weighted sum ends in `scratch.ffn`, ready for
/// the thread that wrote it. Returns the weight bytes read.
pub(crate) fn run_experts(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    experts: &[PackedSwiglu],
    routing: &Routing,
) -> u64 {
    let inner = experts[0].gate.rows();
    let lists = || routing.experts().map(|(e, _)| &experts[e]);
    let both = lists().flat_map(|expert| [&expert.gate, &expert.up]);
    for (i, matrix, panels) in shares(team, both) {
        if routing.rows() >= LONG_ROWS {
            team.alive();
        }
        let list = routing.list(i / 2);
        let target = if i % 2 == 0 {
            &scratch.gate
        } else {
            &scratch.up
        };
        // SAFETY: `h` is complete since the last barrier; each thread has its own panels.
        unsafe {
            linear(
                isa,
                matrix,
                panels,
                &scratch.h,
                list.rows,
                |j, panel, values| {
                    let columns = PANEL.min(inner - panel * PANEL);
                    let at = (list.first + j) * inner + panel * PANEL;
                    let out = target.write(at..at + columns);
                    out.copy_from_slice(&values[..columns]);
                },
            );
        }
    }
    team.barrier();
    for pair in team.share(routing.pairs()) {
        let range = pair * inner..(pair + 1) * inner;
        // SAFETY: complete since the last barrier; each thread has its own pairs.
        unsafe {
            let gate = scratch.gate.read(range.clone());
            let out = scratch.inner_plain.write(range.clone());
            swiglu(isa, gate, scratch.up.read(range), out);
            scratch.inner.set(isa, pair, out);
        }
    }
    team.barrier();
    sum_down(team, isa, scratch, experts, routing);
    let bytes = |expert: &PackedSwiglu| {
        (expert.gate.bytes() + expert.up.bytes() + expert.down.bytes()) as u64
    };
    lists().map(bytes).sum()
}

/// Down projections, experts in ascending order, so that a row's sum has one order.
fn sum_down(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    experts: &[PackedSwiglu],
    routing: &Routing,
) {
    let hidden = experts[0].down.rows();
    let panels = team.share(experts[0].down.panels());
    for row in 0..routing.rows() {
        let columns = (panels.start * PANEL).min(hidden)..(panels.end * PANEL).min(hidden);
        let range = row * hidden + columns.start..row * hidden + columns.end;
        // SAFETY: each thread has its own columns.
        unsafe { scratch.ffn.write(range).fill(0.0) };
    }
    for (i, (e, _)) in routing.experts().enumerate() {
        if routing.rows() >= LONG_ROWS {
            team.alive();
        }
        let list = routing.list(i);
        // SAFETY: `inner` is complete since the last barrier; each thread has its own columns.
        unsafe {
            let panels = panels.clone();
            let down = &experts[e].down;
            linear(
                isa,
                down,
                panels,
                &scratch.inner,
                list.pairs,
                |j, panel, values| {
                    let columns = PANEL.min(hidden - panel * PANEL);
                    let at = list.rows[j] as usize * hidden + panel * PANEL;
                    let out = scratch.ffn.write(at..at + columns);
                    for (out, value) in out.iter_mut().zip(values) {
                        *out += list.weights[j] * value;
                    }
                },
            );
        }
    }
}

/// `x += ffn` for the columns this thread summed.
pub(crate) fn add_ffn(team: Team<'_>, scratch: &Scratch, rows: &[u32], hidden: usize) {
    let panels = team.share(hidden.div_ceil(PANEL));
    let columns = (panels.start * PANEL).min(hidden)..(panels.end * PANEL).min(hidden);
    for &row in rows {
        let at = row as usize * hidden;
        let range = at + columns.start..at + columns.end;
        // SAFETY: each thread has its own columns, of `ffn` those that it wrote itself.
        unsafe {
            let part = scratch.ffn.read(range.clone());
            for (x, part) in scratch.x.write(range).iter_mut().zip(part) {
                *x += part;
            }
        }
    }
}
