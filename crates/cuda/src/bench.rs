//! Speed of a resident program: milliseconds of a step, bytes, distinct experts, where the time goes.
//!
//! Steps are chained on the device, [`CHAINED`] a launch, so that the host's part is shared by them.
//! Rows after the first are the drafter's, or, without one, the tokens chosen a step before (drafts
//! that mean nothing; named so in every report). Steps stay at one position: how many drafts are right
//! is for [`text`] to say. Invariant: counted bytes are weight pages that the kernel reads, no more.

use std::time::Instant;

use crate::CudaError;
use crate::layout::{Instr, OPS, PASSES, StepState, TOKENS};
use crate::resident::{Ranks, Resident, Walk};
use crate::timeline::{CYCLES_A_US, Timeline, svg};

/// Steps of a launch.
pub const CHAINED: u32 = 8;

/// One row count's result.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Rows of a step.
    pub rows: usize,
    /// Median milliseconds of a step.
    pub ms_median: f64,
    /// 99th percentile, of means over a launch.
    pub ms_p99: f64,
    /// Distinct experts of a routed layer, on average.
    pub experts: f64,
    /// Weight bytes of a step.
    pub bytes: f64,
    /// Where the time went, by op.
    pub phases: Vec<Phase>,
}

/// Microseconds of an average instruction of a kind.
#[derive(Clone, Debug, Default)]
pub struct Phase {
    /// Pass of the step.
    pub pass: &'static str,
    /// Op.
    pub op: &'static str,
    /// Instructions of a step.
    pub count: usize,
    /// From the end of the instruction before until its operands are there, average CTA.
    pub wait_us: f64,
    /// Its own work, average CTA.
    pub work_us: f64,
    /// Its own work, slowest CTA.
    pub longest_us: f64,
}

impl Measured {
    /// GB/s of weights.
    #[must_use]
    pub fn gb_per_s(&self) -> f64 {
        self.bytes / self.ms_median * 1e-6
    }
}

/// What routes and computes the experts: without attention, its projections and their sum over ranks
/// ([`Resident::keep`]).
#[must_use]
pub fn expert_stage(i: &Instr) -> bool {
    let op = OPS[i.op as usize];
    // The verify pass begins with an even sum, with a drafter too.
    let after_attention = op == "ALL_REDUCE" && i.index % 2 == 0;
    !["QKV", "ATTENTION", "O_PROJ"].contains(&op) && !after_attention
}

/// Steps of `rows` rows of all ranks at position `context`, at least `steps` of them after one launch to warm up.
///
/// # Errors
/// The driver's, and faults of the kernel.
pub fn decode(
    ranks: &mut Ranks,
    vocab_size: usize,
    context: usize,
    steps: u32,
    rows: usize,
) -> Result<Measured, CudaError> {
    let rows = rows.clamp(1, TOKENS);
    let mut state = StepState {
        rows: rows as i32,
        position: context as i32,
        chain: 1,
        block: ranks.first().program().block.max(rows) as i32,
        ..StepState::default()
    };
    for (row, token) in state.tokens.iter_mut().enumerate() {
        *token = ((row * 7919 + 31) % vocab_size) as i32;
    }
    for rank in ranks.each() {
        rank.set_state(&state)?;
    }
    ranks.run(CHAINED, false)?;
    let mut times = Vec::new();
    for _ in 0..steps.div_ceil(CHAINED) {
        let began = Instant::now();
        ranks.run(CHAINED, false)?;
        times.push(began.elapsed().as_secs_f64() * 1e3 / f64::from(CHAINED));
    }
    times.sort_by(f64::total_cmp);
    let resident = ranks.first();
    let end = resident.state()?;
    let experts = f64::from(end.distinct) / f64::from(end.routed.max(1));
    let (fixed, expert) = resident.program().step_bytes();
    let layers = resident.program().routed_layers() as f64;
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    ranks.run(1, true)?;
    Ok(Measured {
        rows,
        ms_median: at(0.5),
        ms_p99: at(0.99),
        experts,
        bytes: fixed as f64 + expert * experts * layers,
        phases: phases(ranks.first())?,
    })
}

fn phases(resident: &mut Resident) -> Result<Vec<Phase>, CudaError> {
    let stamps = resident.stamps()?;
    let instructions = &resident.program().instructions;
    let (count, ctas) = (instructions.len(), resident.ctas());
    let of = |at: usize| Phase {
        pass: PASSES[at / OPS.len()],
        op: OPS[at % OPS.len()],
        ..Phase::default()
    };
    let mut out: Vec<Phase> = (0..PASSES.len() * OPS.len()).map(of).collect();
    for (n, i) in instructions.iter().enumerate() {
        let us = |cta: usize, from: usize, to: usize| {
            let at = (cta * count + n) * 3;
            (stamps[at + to] - stamps[at + from]) as f64 / CYCLES_A_US
        };
        let all = |from, to| (0..ctas).map(move |cta| us(cta, from, to));
        let phase = &mut out[i.pass as usize * OPS.len() + i.op as usize];
        phase.count += 1;
        phase.wait_us += all(0, 1).sum::<f64>() / ctas as f64;
        phase.work_us += all(1, 2).sum::<f64>() / ctas as f64;
        phase.longest_us += all(1, 2).fold(0.0, f64::max);
    }
    for phase in &mut out {
        let count = phase.count.max(1) as f64;
        phase.wait_us /= count;
        phase.work_us /= count;
        phase.longest_us /= count;
    }
    Ok(out.into_iter().filter(|phase| phase.count > 0).collect())
}

/// The middle layer of the verify pass of the last step that kept its times, over the multiprocessors, as SVG; `of`: what the title
/// says of the weights.
///
/// # Errors
/// The driver's.
pub fn picture(resident: &mut Resident, of: &str) -> Result<String, CudaError> {
    let stamps = resident.stamps()?;
    let instructions = &resident.program().instructions;
    let verify = PASSES.iter().position(|p| *p == "VERIFY").unwrap_or(0);
    let begins = |n: &usize| {
        let i = &instructions[*n];
        i.pass as usize == verify && ["QKV", "LM_HEAD"].contains(&OPS[i.op as usize])
    };
    // Where layers begin, and where the last one ends.
    let begins: Vec<usize> = (0..instructions.len()).filter(begins).collect();
    let layer = begins.len().saturating_sub(1) / 2;
    let range = match begins[..] {
        [] => 0..instructions.len(),
        _ => begins[layer]..begins.get(layer + 1).copied().unwrap_or(instructions.len()),
    };
    let timeline = Timeline {
        stamps: &stamps,
        instructions,
        ctas: resident.ctas(),
    };
    Ok(svg(&timeline.bars(range), &format!("layer {layer}, {of}")))
}

/// A text made in one launch, after a prompt of arbitrary tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Text {
    /// Rows of a step.
    pub rows: usize,
    /// Tokens.
    pub tokens: u32,
    /// Steps that they took.
    pub steps: u32,
    /// Seconds from the launch to the last token.
    pub seconds: f64,
}

impl Text {
    /// Tokens a second.
    #[must_use]
    pub fn tokens_per_s(&self) -> f64 {
        f64::from(self.tokens) / self.seconds
    }

    /// Mean acceptance length, the bonus token included.
    #[must_use]
    pub fn tokens_per_step(&self) -> f64 {
        f64::from(self.tokens) / f64::from(self.steps.max(1))
    }
}

/// `count` tokens after `context` arbitrary ones, greedily, in steps of `rows` rows whose drafts are the drafter's;
/// `simulate` takes so many of them as right (synthetic; reports say so).
///
/// # Errors
/// The driver's, and faults of the kernel.
pub fn text(
    resident: &mut Resident,
    vocab_size: usize,
    context: usize,
    count: usize,
    rows: usize,
    simulate: Option<u32>,
) -> Result<Text, CudaError> {
    let token = |at: usize| ((at * 7919 + 31) % vocab_size) as i32;
    for first in (0..context).step_by(TOKENS) {
        let rows = TOKENS.min(context - first);
        resident.set_state(&StepState {
            rows: rows as i32,
            position: first as i32,
            tokens: std::array::from_fn(|r| token(first + r)),
            ..StepState::default()
        })?;
        resident.walk(Walk::Verify, 1, false)?;
    }
    let block = resident.program().block;
    let rows = if block == 0 { 1 } else { rows.clamp(1, block) };
    let mut state = StepState {
        rows: rows as i32,
        width: rows as i32,
        block: block as i32,
        block_max: block as i32,
        position: context as i32,
        chain: 2,
        limit: resident.program().context as i32,
        left: count as i32,
        simulate: simulate.map_or(0, |n| n as i32 + 1),
        ..StepState::default()
    };
    state.tokens[0] = token(context);
    let walk = if rows > 1 { Walk::Whole } else { Walk::Verify };
    let (mut tokens, began) = (0, Instant::now());
    let end = resident.generate(&state, walk, count as u32, |_| {
        tokens += 1;
        true
    })?;
    Ok(Text {
        rows,
        tokens,
        steps: end.steps as u32,
        seconds: began.elapsed().as_secs_f64(),
    })
}
