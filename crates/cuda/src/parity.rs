//! Op by op: every instruction of a step on a machine against the replay's reference op, on the machine's own
//! operands, so that a difference is that instruction's alone.
//!
//! Runs the program again and again, one instruction further each time (`StepArgs::end`), reads the
//! named buffer that the last one wrote, dequantised, and gives it to the replay as operand of the next. A
//! machine is a GPU or the emulator. Refuses nothing; the caller holds differences against [`limit`].

use crate::CudaError;
use crate::images::Activations;
use crate::layout::{Instr, OPS, StepState, TOKENS};
use crate::program::{Formats, HEAD_COLUMNS, Program, WORD_BYTES, inner_part, part, qkv_rows};
use crate::replay::Replay;
use crate::schedule::{Buffer, Instruction, Op, Schedule};
use model::Config;
use model::config::FfnConfig;

/// Where a program runs. Offsets are in a rank's state arena.
pub trait Machine {
    /// The program of `rank`.
    fn program(&self, rank: usize) -> &Program;
    /// Address of the state arena of `rank`.
    fn base(&self, rank: usize) -> u64;
    /// Runs the first `instructions` of one step, as the first since the counters were zero.
    ///
    /// # Errors
    /// The machine's.
    fn run(&mut self, instructions: usize) -> Result<(), CudaError>;
    /// Copies out.
    ///
    /// # Errors
    /// The machine's.
    fn read(&mut self, rank: usize, offset: usize, out: &mut [u8]) -> Result<(), CudaError>;
    /// Copies in.
    ///
    /// # Errors
    /// The machine's.
    fn write(&mut self, rank: usize, offset: usize, bytes: &[u8]) -> Result<(), CudaError>;
}

/// What is compared: a model, where it runs and what it should give.
pub struct Case<'a> {
    /// The model.
    pub config: &'a Config,
    /// Its schedule; all ranks have the same instructions.
    pub schedule: &'a Schedule,
    /// Its formats.
    pub formats: &'a Formats,
    /// Keeps the caches over steps, from the machine's operands.
    pub replay: Replay<'a>,
}

/// One instruction's difference.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Index into the program.
    pub instruction: usize,
    /// Its name.
    pub op: &'static str,
    /// Layer, where there is one.
    pub layer: Option<usize>,
    /// Rank.
    pub rank: usize,
    /// Largest difference over the largest value.
    pub largest: f32,
    /// Norm of the difference over the norm of the values.
    pub l2: f32,
}

/// What [`Compared::largest`] and [`Compared::l2`] of an op may be, on the emulator and on a GPU: a buffer of bf16
/// values may have one on the other side of a rounding (2^-8).
#[must_use]
pub fn limit(op: &str) -> (f32, f32) {
    match op {
        "EMBED" | "CHOOSE" => (0.0, 0.0),
        "ALL_REDUCE" => (1e-6, 1e-6),
        "ATTENTION" | "GATE_UP" => (4e-3, 1e-3),
        // 7e-6 at K = 6144 (H200, 2026-11-21): the order of sums; an f32 router is kept to 2^-17.
        _ => (2e-5, 1e-5),
    }
}

impl Compared {
    /// Whether it is within [`limit`].
    #[must_use]
    pub fn holds(&self) -> bool {
        let (largest, l2) = limit(self.op);
        self.largest <= largest && self.l2 <= l2
    }
}

/// `(largest, l2)` of [`Compared`]; infinite when shapes differ or something is not a number.
fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> (f32, f32) {
    let same = |(a, b): (&Vec<f32>, &Vec<f32>)| a.len() == b.len();
    if found.len() != expected.len() || !found.iter().zip(expected).all(same) {
        return (f32::INFINITY, f32::INFINITY);
    }
    let (mut top, mut scale, mut squares, mut norm) = (0.0f64, 1e-30f64, 0.0f64, 1e-30f64);
    for (a, b) in found.iter().flatten().zip(expected.iter().flatten()) {
        let (d, b) = (f64::from(*a) - f64::from(*b), f64::from(*b));
        if d.is_nan() {
            return (f32::INFINITY, f32::INFINITY);
        }
        (top, scale) = (top.max(d.abs()), scale.max(b.abs()));
        (squares, norm) = (squares + d * d, norm + b * b);
    }
    ((top / scale) as f32, (squares / norm).sqrt() as f32)
}

/// A step of `tokens` at `position`, instruction by instruction.
///
/// # Errors
/// The machine's.
pub fn step(
    case: &mut Case<'_>,
    machine: &mut dyn Machine,
    tokens: &[u32],
    position: usize,
) -> Result<Vec<Compared>, CudaError> {
    let mut out = Vec::new();
    let mut at = 0;
    let schedule = case.schedule;
    for (n, i) in schedule.instructions.iter().enumerate() {
        case.replay.instruction(n, tokens, position);
        if i.op == Op::Argmax {
            continue; // the epilogue of lm_head
        }
        at += 1;
        begin(machine, schedule.shard.ranks, tokens, position)?;
        machine.run(at)?;
        for rank in 0..schedule.shard.ranks {
            let mut reader = Reader {
                case,
                machine,
                rank,
                rows: tokens.len(),
            };
            let (buffer, found) = reader.output(i, at - 1)?;
            let (largest, l2) = difference(&found, case.replay.buffer(rank, buffer));
            let op = OPS[machine.program(rank).instructions[at - 1].op as usize];
            out.push(Compared {
                instruction: at - 1,
                op,
                layer: i.layer,
                rank,
                largest,
                l2,
            });
            case.replay.put(rank, buffer, found);
        }
    }
    Ok(out)
}

/// Zero counters and words, and the step's tokens.
fn begin(
    machine: &mut dyn Machine,
    ranks: usize,
    tokens: &[u32],
    position: usize,
) -> Result<(), CudaError> {
    for rank in 0..ranks {
        let program = machine.program(rank);
        let (places, count) = (program.places, program.instructions.len());
        let inbox = 2 * ranks * program.words * WORD_BYTES;
        let batons = program.baton_bytes();
        machine.write(rank, places.counters, &vec![0; count * 4])?;
        machine.write(rank, places.inbox, &vec![0; inbox])?;
        machine.write(rank, places.batons, &vec![0; batons])?;
        machine.write(
            rank,
            places.choice,
            &vec![0; 2 * ranks * TOKENS * WORD_BYTES],
        )?;
        // Rows, position, chain, accepted, tokens: the first fields of StepState.
        let mut words = vec![tokens.len() as u32, position as u32, 0, 0];
        words.extend(tokens);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        machine.write(rank, places.state, &bytes)?;
    }
    Ok(())
}

/// Reads what an instruction of a rank wrote, as the replay's buffers have it.
struct Reader<'a, 'b> {
    case: &'a Case<'b>,
    machine: &'a mut dyn Machine,
    rank: usize,
    rows: usize,
}

/// Activations in f16 `[k / 32][columns][32]`, or two `[k / 32][2][columns][32]`, then factors f32: `[k / 32][columns]`, of Inner
/// `[k / 64][columns][2]`.
struct Split {
    wide: bool,
    bytes: Vec<u8>,
    padded: usize,
    columns: usize,
    inner: bool,
}

impl Split {
    fn value(&self, column: usize, k: usize) -> f32 {
        self.value_over(column, k, 1.0)
    }

    /// A value whose factor, a power of two, has been multiplied by `weight`, up to the last bits of the reference's: what is
    /// left of them would take values off the ties of e4m3 that they lie on.
    fn value_over(&self, column: usize, k: usize, weight: f32) -> f32 {
        let place = k % 16 / 4 * 8 + k % 32 / 16 * 4 + k % 4; // `x_place` of kernels/strips.cuh
        let term = |n: usize| {
            let terms = if self.wide { 2 } else { 1 };
            let at = ((k / 32 * terms + n) * self.columns + column) * 64 + place * 2;
            let code = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]);
            half::f16::from_bits(code).to_f32()
        };
        let value = term(0) + if self.wide { term(1) } else { 0.0 };
        let factor = match self.inner {
            true => (k / 64 * self.columns + column) * 2 + k % 64 / 32,
            false => k / 32 * self.columns + column,
        };
        let factors = self.bytes.len() - self.padded / 32 * self.columns * 4;
        let from = factors + factor * 4;
        let factor = [0, 1, 2, 3].map(|i| self.bytes[from + i]);
        let power = (f32::from_le_bytes(factor) / weight).log2().round().exp2();
        power * value
    }
}

impl Reader<'_, '_> {
    fn floats(&mut self, offset: usize, count: usize) -> Result<Vec<f32>, CudaError> {
        let mut bytes = vec![0; count * 4];
        self.machine.read(self.rank, offset, &mut bytes)?;
        let float = |b: &[u8; 4]| f32::from_le_bytes(*b);
        Ok(bytes.as_chunks::<4>().0.iter().map(float).collect())
    }

    /// Rows of f32, `stride` apart, `width` of each.
    fn rows_at(
        &mut self,
        offset: usize,
        stride: usize,
        width: usize,
    ) -> Result<Vec<Vec<f32>>, CudaError> {
        let rows = 0..self.rows;
        let row = |row: usize| self.floats(offset + row * stride * 4, width);
        rows.map(row).collect()
    }

    fn split(&mut self, offset: usize, padded: usize, columns: usize) -> Result<Split, CudaError> {
        let activations = self.machine.program(self.rank).numbers.activations;
        let mut bytes = vec![0; activations.bytes(padded, columns)];
        self.machine.read(self.rank, offset, &mut bytes)?;
        Ok(Split {
            wide: activations == Activations::Wide,
            bytes,
            padded,
            columns,
            inner: false,
        })
    }

    fn output(&mut self, i: &Instruction, at: usize) -> Result<(Buffer, Vec<Vec<f32>>), CudaError> {
        let instr = self.machine.program(self.rank).instructions[at];
        let base = self.machine.base(self.rank);
        let offset = |address: u64| (address - base) as usize;
        let layer = i.layer.unwrap_or(0);
        let buffer = i.writes.first().map_or(Buffer::X, |w| w.0);
        let hidden = self.case.config.hidden;
        let rows = match buffer {
            Buffer::X => {
                let padded = instr.hidden_padded as usize;
                self.rows_at(offset(instr.residual), padded, hidden)?
            }
            Buffer::Qkv => self.qkv(&instr, layer, offset(instr.out))?,
            Buffer::Heads => self.heads(&instr, offset(instr.out))?,
            Buffer::Partial => self.partial(&instr)?,
            Buffer::RouterLogits => self.router(&instr, layer, at, base)?,
            Buffer::Inner => self.inner(&instr, layer, offset(instr.out))?,
            Buffer::Logits => {
                let stride = self.machine.program(self.rank).places.logit_rows;
                self.rows_at(offset(instr.out), stride, instr.rows as usize)?
            }
            _ => self.choice()?,
        };
        Ok((buffer, rows))
    }

    /// Packed rows without the padding between q, k and v.
    fn qkv(&mut self, i: &Instr, layer: usize, at: usize) -> Result<Vec<Vec<f32>>, CudaError> {
        let a = &self.case.config.layers[layer].attention;
        let ranks = self.case.schedule.shard.ranks;
        let (k, v, end) = qkv_rows(a, ranks);
        let stride = (i.tiles * i.strips * 16) as usize;
        let (q, keys) = (a.heads / ranks * a.qk_dim, a.kv_heads / ranks * a.qk_dim);
        let all = self.rows_at(at, stride, end)?;
        let row = |r: Vec<f32>| [&r[..q], &r[k..k + keys], &r[v..end]].concat();
        Ok(all.into_iter().map(row).collect())
    }

    fn heads(&mut self, i: &Instr, at: usize) -> Result<Vec<Vec<f32>>, CudaError> {
        let split = self.split(at, i.columns_padded as usize, TOKENS)?;
        let (heads, width) = (i.heads as usize, i.v_dim as usize);
        let padded = width.next_multiple_of(HEAD_COLUMNS);
        let row = |row: usize| {
            let head = |h: usize| (0..width).map(move |d| h * padded + d);
            let columns = (0..heads).flat_map(head);
            columns.map(|k| split.value(row, k)).collect()
        };
        Ok((0..self.rows).map(row).collect())
    }

    /// What this rank pushed to itself: words `[half][from][row][hidden / 2]` of two values.
    fn partial(&mut self, i: &Instr) -> Result<Vec<Vec<f32>>, CudaError> {
        let program = self.machine.program(self.rank);
        let (words, ranks) = (program.words, program.ranks);
        let half = (i.index as usize + 1) & 1;
        let first = program.places.inbox + (half * ranks + self.rank) * words * WORD_BYTES;
        let each = i.hidden_padded as usize / 2;
        let all = self.floats(first, TOKENS * each * 4)?;
        let value = |row: usize, k: usize| all[(row * each + k / 2) * 4 + k % 2];
        let row = |row| (0..i.hidden as usize).map(|k| value(row, k)).collect();
        Ok((0..self.rows).map(row).collect())
    }

    /// Parts added up, times 1 / rms, which the device applies where it reads them.
    fn router(
        &mut self,
        i: &Instr,
        layer: usize,
        at: usize,
        base: u64,
    ) -> Result<Vec<Vec<f32>>, CudaError> {
        let FfnConfig::Moe(moe) = &self.case.config.layers[layer].ffn else {
            return Ok(Vec::new());
        };
        // The sum over ranks before it left the squares.
        let squares = self.machine.program(self.rank).instructions[at - 1].squares;
        let (stride, experts, eps) = (i.tiles as usize * 16, moe.experts, i.eps);
        let hidden = i.hidden as usize;
        let squares = self.floats((squares - base) as usize, hidden.div_ceil(32) * TOKENS)?;
        let all = self.floats((i.out - base) as usize, i.parts as usize * TOKENS * stride)?;
        let row = |row: usize| {
            let sum: f32 = squares.iter().skip(row).step_by(TOKENS).sum();
            let rms = (sum / hidden as f32 + eps).sqrt();
            let part = |p: usize, e: usize| all[(p * TOKENS + row) * stride + e];
            let logit = |e| (0..i.parts as usize).map(|p| part(p, e)).sum::<f32>() / rms;
            (0..experts).map(logit).collect()
        };
        Ok((0..self.rows).map(row).collect())
    }

    /// A column of Inner for each row and expert: distinct experts ascending, rows of each
    /// ascending. Their factors have the row's weight of the expert.
    fn inner(&mut self, i: &Instr, layer: usize, at: usize) -> Result<Vec<Vec<f32>>, CudaError> {
        let mut split = self.split(at, i.inner_padded as usize, i.pair_columns as usize)?;
        split.inner = true;
        let shard = self.case.schedule.shard;
        let (inner, dense) = match &self.case.config.layers[layer].ffn {
            FfnConfig::Dense { intermediate } => (*intermediate, true),
            FfnConfig::Moe(moe) => (moe.intermediate, false),
        };
        // Packed columns end where this rank's do; before them may be others' of the same stored scale.
        let of = part(inner, self.rank, shard.ranks);
        let formats = &self.case.formats.layers[layer];
        let first = of.start - inner_part(formats, inner, self.rank, shard.ranks).start;
        let columns = |column: usize, weight: f32| -> Vec<f32> {
            (0..of.len())
                .map(|k| split.value_over(column, first + k, weight))
                .collect()
        };
        if dense {
            return Ok((0..self.rows).map(|row| columns(row, 1.0)).collect());
        }
        let chosen: Vec<Vec<(usize, f32)>> = (0..self.rows)
            .map(|row| self.case.replay.experts(layer, self.rank, row))
            .collect();
        let mut pairs: Vec<(usize, usize)> = Vec::new();
        for (row, experts) in chosen.iter().enumerate() {
            pairs.extend(experts.iter().map(|&(e, _)| (e, row)));
        }
        pairs.sort_unstable();
        let column = |e, row| pairs.binary_search(&(e, row)).unwrap_or(0);
        let row = |(row, experts): (usize, &Vec<(usize, f32)>)| {
            let of_expert = |&(e, weight): &(usize, f32)| columns(column(e, row), weight);
            experts.iter().flat_map(of_expert).collect()
        };
        Ok(chosen.iter().enumerate().map(row).collect())
    }

    fn choice(&mut self) -> Result<Vec<Vec<f32>>, CudaError> {
        let at =
            self.machine.program(self.rank).places.state + std::mem::offset_of!(StepState, best);
        let mut bytes = vec![0; self.rows * 4];
        self.machine.read(self.rank, at, &mut bytes)?;
        let token = |b: &[u8; 4]| vec![i32::from_le_bytes(*b) as f32];
        Ok(bytes.as_chunks::<4>().0.iter().map(token).collect())
    }
}
