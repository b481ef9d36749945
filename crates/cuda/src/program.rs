//! A schedule made concrete for the resident kernel: one [`Instr`] an instruction, the places of all
//! weights and buffers, and what has to be put there.
//!
//! Two arenas, each one allocation: weights (pages and vectors, written once) and state (buffers,
//! counters, caches, zero at first). Built twice: with bases of nothing to learn sizes, then with real ones.
//! Refuses models whose shapes the kernel does not take. Invariant: places never overlap; pages
//! and buffers are aligned to 128 bytes. What the fields of an instruction mean is in `kernels/resident_*.cuh`.

mod build;
mod draft;
mod layers;

use model::Config;
use model::config::{AttentionConfig, FfnConfig};

use crate::CudaError;
use crate::images::Numbers;
use crate::layout::{BATON_WORDS, Instr, OPS, StepArgs, TOKENS};
use crate::schedule::{Pass, Schedule};
use crate::strips::{Format, Tiles};
use build::{Builder, Shared, check};
use draft::DraftShared;
pub(crate) use draft::of_eight_rows;
pub use draft::{DraftFormats, DraftWhat, context_rows, tap_columns, tap_stride};

/// A head's columns in the activations of the output projection are padded to a multiple of these.
pub const HEAD_COLUMNS: usize = 64;
/// What a model leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Positions of the caches.
    pub context: usize,
    /// How numbers are kept.
    pub numbers: Numbers,
}

impl Settings {
    /// Caches of so many positions, numbers as a rule.
    #[must_use]
    pub fn new(context: usize) -> Self {
        let numbers = Numbers::default();
        Self { context, numbers }
    }
}

/// Bytes of a tagged word.
pub const WORD_BYTES: usize = 16;

/// Weight formats of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerFormats {
    /// q, k and v.
    pub qkv: Format,
    /// Output projection.
    pub o: Format,
    /// Router; unused in a dense layer.
    pub router: Format,
    /// Gate and up.
    pub gate_up: Format,
    /// Down.
    pub down: Format,
}

/// Weight formats of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Formats {
    /// Layer by layer.
    pub layers: Vec<LayerFormats>,
    /// Embedding rows as BF16; otherwise f32.
    pub embed_bf16: bool,
    /// lm_head.
    pub lm_head: Format,
    /// Its drafter, if it has one.
    pub draft: Option<DraftFormats>,
}

impl Formats {
    /// The formats of the FP4 releases: FP8 attention and dense parts, MXFP4 experts, BF16 router,
    /// embedding and lm_head; `o` as asked (FP8, or BF16 as released).
    #[must_use]
    pub fn release(config: &Config, o: Format) -> Self {
        let layer = |l: &model::config::LayerConfig| {
            let unit = match l.ffn {
                FfnConfig::Dense { .. } => Format::Fp8,
                FfnConfig::Moe(_) => Format::Fp4,
            };
            LayerFormats {
                qkv: Format::Fp8,
                o,
                router: Format::Bf16,
                gate_up: unit,
                down: unit,
            }
        };
        Self {
            layers: config.layers.iter().map(layer).collect(),
            embed_bf16: true,
            lm_head: Format::Bf16,
            draft: None,
        }
    }

    /// The same with a drafter.
    #[must_use]
    pub fn with_draft(mut self, draft: Option<DraftFormats>) -> Self {
        self.draft = draft;
        self
    }
}

/// Which weights go to a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Fused q, k, v rows of this rank.
    Qkv,
    /// Output projection columns of this rank's heads.
    O,
    /// Router rows.
    Router,
    /// Gate and up rows of an expert, or of the dense unit 0.
    GateUp(usize),
    /// Down columns of an expert.
    Down(usize),
    /// Vocabulary rows of this rank.
    LmHead,
    /// Embedding rows, all of them.
    Embed,
    /// Norm before attention, `[hidden_padded]` f32.
    InputNorm,
    /// Norm before the feed-forward part.
    PostNorm,
    /// Norm before lm_head.
    FinalNorm,
    /// Correction bias `[experts]` f32.
    Bias,
    /// Sinks of this rank's heads, f32.
    Sinks,
    /// The drafter's.
    Draft(DraftWhat),
}

/// A place in the weight arena.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Byte offset.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
    /// What goes there.
    pub what: What,
    /// Layer, where there is one.
    pub layer: usize,
    /// Shape of pages; none for vectors and the table.
    pub tiles: Option<Tiles>,
}

/// Rope tables `[context, dims / 2, 2]` f32 at an offset of the state arena.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    /// Byte offset.
    pub offset: usize,
    /// Columns that turn.
    pub dims: usize,
    /// Base.
    pub theta: f32,
}

/// Device addresses of the two arenas.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bases {
    /// Weights.
    pub weights: u64,
    /// State.
    pub state: u64,
}

impl Bases {
    /// Of arenas that are not there, to learn sizes and shapes: only what a program has not got is at address 0.
    pub const NOWHERE: Self = Self {
        weights: 1 << 40,
        state: 1 << 41,
    };
}

/// Offsets in the state arena that the host uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Places {
    /// `[instructions]` of [`Instr`].
    pub program: usize,
    /// `[instructions]` u32.
    pub counters: usize,
    /// One `StepState`.
    pub state: usize,
    /// Words of sums over ranks.
    pub inbox: usize,
    /// Words of choices.
    pub choice: usize,
    /// Words of batons, [`BATON_WORDS`] of each CTA.
    pub batons: usize,
    /// Logits `[8, logit_rows]` f32 of this rank's vocabulary.
    pub logits: usize,
    /// Rows of `logits`, padding included.
    pub logit_rows: usize,
}

/// A program and its memory.
#[derive(Clone, Debug)]
pub struct Program {
    /// In order.
    pub instructions: Vec<Instr>,
    /// Everything in the weight arena.
    pub pieces: Vec<Piece>,
    /// Rope tables.
    pub turns: Vec<Turns>,
    /// Where the host finds things.
    pub places: Places,
    /// Bytes of the weight arena.
    pub weight_bytes: usize,
    /// Bytes of the state arena.
    pub state_bytes: usize,
    /// Bytes of keys and values.
    pub kv_bytes: usize,
    /// Bytes of the drafter's.
    pub draft_kv_bytes: usize,
    /// Shared memory for activations.
    pub x_bytes: usize,
    /// Positions of the caches.
    pub context: usize,
    /// How numbers are kept.
    pub numbers: Numbers,
    /// The schedule's rank and ranks.
    pub rank: usize,
    /// Ranks.
    pub ranks: usize,
    /// Words of an inbox from one rank and of one half.
    pub words: usize,
    /// Sums over ranks of a step, the choice included.
    pub sums: usize,
    /// CTAs of the schedule.
    pub ctas: usize,
    /// First instruction of the verify pass: 0 without a drafter.
    pub verify_begin: usize,
    /// Rows of the drafter's block: 0 without one.
    pub block: usize,
}

/// The part of rank `rank` of `0..size`.
#[must_use]
pub fn part(size: usize, rank: usize, ranks: usize) -> std::ops::Range<usize> {
    size * rank / ranks..size * (rank + 1) / ranks
}

/// Inner columns of a rank: from where packed columns count (a multiple of what stored scales span),
/// and where they end.
#[must_use]
pub fn inner_part(
    formats: &LayerFormats,
    inner: usize,
    rank: usize,
    ranks: usize,
) -> std::ops::Range<usize> {
    let of = part(inner, rank, ranks);
    let both = [formats.gate_up, formats.down];
    let span = match both {
        _ if both.contains(&Format::Fp8) => 128,
        _ if both.contains(&Format::Fp4) => 32,
        _ => 1,
    };
    of.start / span * span..of.end
}

/// First rows of keys and values among the packed rows of QKV, and all of them.
#[must_use]
pub fn qkv_rows(a: &AttentionConfig, ranks: usize) -> (usize, usize, usize) {
    let k = (a.heads / ranks * a.qk_dim).next_multiple_of(8);
    let v = k + (a.kv_heads / ranks * a.qk_dim).next_multiple_of(8);
    (k, v, v + a.kv_heads / ranks * a.v_dim)
}

fn wrong<T>(what: &'static str, expected: String, found: impl ToString) -> Result<T, CudaError> {
    let found = found.to_string();
    Err(CudaError::Shape {
        what,
        expected,
        found,
    })
}

impl Program {
    /// The program of `schedule` with those settings, and addresses from `bases`.
    ///
    /// # Errors
    /// When the kernel does not take the model's shapes.
    pub fn new(
        config: &Config,
        schedule: &Schedule,
        formats: &Formats,
        settings: Settings,
        bases: Bases,
    ) -> Result<Self, CudaError> {
        check(config, schedule, formats.draft.as_ref())?;
        let out = Self {
            instructions: Vec::new(),
            pieces: Vec::new(),
            turns: Vec::new(),
            places: Places::default(),
            weight_bytes: 0,
            state_bytes: 0,
            kv_bytes: 0,
            draft_kv_bytes: 0,
            x_bytes: 0,
            context: settings.context,
            numbers: settings.numbers,
            rank: schedule.shard.rank,
            ranks: schedule.shard.ranks,
            words: 0,
            sums: 0,
            ctas: schedule.shard.ctas,
            verify_begin: 0,
            block: formats
                .draft
                .as_ref()
                .map_or(0, |d| d.config.block_size as usize),
        };
        let mut b = Builder {
            config,
            schedule,
            formats,
            bases,
            shared: Shared::default(),
            out,
            sum: 0,
            inners: Vec::new(),
            routed: (0, 0),
            table: None,
            head: None,
            draft: DraftShared::default(),
        };
        b.buffers();
        let mut before = None;
        for i in &schedule.instructions {
            let from = b.out.instructions.len();
            match i.pass {
                Pass::Verify => b.instruction(i.op, i.layer.unwrap_or(0), before)?,
                Pass::Draft | Pass::Context => b.draft_instruction(i, before)?,
            }
            for made in &mut b.out.instructions[from..] {
                made.pass = i.pass as i32;
                if let (true, Some(draft)) = (made.pass > 0, &formats.draft) {
                    made.eps = draft.config.eps;
                }
            }
            before = Some(i.op);
        }
        b.out.sums = b.sum;
        Ok(b.out)
    }

    /// Leaves instructions out, for measurements of the rest: who waited for one of them waits for the
    /// one before. What the others compute is no longer the model.
    pub fn keep(&mut self, keep: impl Fn(&Instr) -> bool) {
        let mut kept_before = Vec::new();
        let mut kept = -1;
        for i in &self.instructions {
            kept += i32::from(keep(i));
            kept_before.push(kept);
        }
        if let Some(last) = self.verify_begin.checked_sub(1) {
            self.verify_begin = (kept_before[last] + 1) as usize;
        }
        self.instructions.retain(&keep);
        for i in &mut self.instructions {
            if i.wait >= 0 {
                i.wait = kept_before[i.wait as usize];
            }
        }
    }

    /// The layer of its pass that an instruction is part of; none for the embedding and what follows the layers.
    #[must_use]
    pub fn layer_of(&self, instruction: usize) -> Option<usize> {
        let is = |i: &Instr, op: &str| OPS[i.op as usize] == op;
        let until = self.instructions.get(..=instruction)?;
        let last_pass = until.last()?.pass;
        let until = || until.iter().filter(move |i| i.pass == last_pass);
        let last = until().any(|i| is(i, "LM_HEAD"));
        let begun = until().filter(|i| is(i, "QKV")).count();
        begun.checked_sub(1).filter(|_| !last)
    }

    /// Layers with routed experts.
    #[must_use]
    pub fn routed_layers(&self) -> usize {
        self.instructions.iter().filter(|i| i.active > 0).count() / 2
    }

    /// Weight bytes of a step: what does not depend on the routing, and those of one expert in all
    /// layers together divided by the routed layers.
    #[must_use]
    pub fn step_bytes(&self) -> (u64, f64) {
        let bytes = |i: &Instr| {
            let format = [Format::Fp4, Format::Fp8, Format::Bf16, Format::F32];
            let strip = format[i.format as usize].strip_bytes() as u64;
            i.tiles as u64 * i.strips as u64 * i.blocks as u64 * strip
        };
        let sum = |routed: bool| -> u64 {
            let of = |i: &&Instr| (i.experts > 0) == routed && i.tiles > 0;
            self.instructions.iter().filter(of).map(bytes).sum()
        };
        let layers = self.routed_layers();
        (sum(false), sum(true) as f64 / layers.max(1) as f64)
    }

    /// Bytes of the batons.
    #[must_use]
    pub fn baton_bytes(&self) -> usize {
        self.ctas * BATON_WORDS * WORD_BYTES
    }

    /// Arguments for `steps` steps after `first_step`. `states`: the state arena of every rank; those
    /// of other ranks equal to this one's are looped back.
    #[must_use]
    pub fn args(&self, states: &[u64], first_step: u32, steps: u32) -> StepArgs {
        let own = states[self.rank];
        let mut args = StepArgs {
            program: own + self.places.program as u64,
            counters: own + self.places.counters as u64,
            state: own + self.places.state as u64,
            batons: own + self.places.batons as u64,
            instructions: self.instructions.len() as i32,
            ranks: self.ranks as i32,
            rank: self.rank as i32,
            words: self.words as i32,
            first_step: first_step as i32,
            steps: steps as i32,
            sums: self.sums as i32,
            x_bytes: self.x_bytes as i32,
            context: self.context as i32,
            end: self.instructions.len() as i32,
            ..StepArgs::default()
        };
        for (to, &state) in states.iter().enumerate() {
            // Looped back, what goes to rank `to` lands where `to` would have written it.
            let shift =
                i64::from(state == own) * (to as i64 - self.rank as i64) * WORD_BYTES as i64;
            let at = |place: usize, words: usize| {
                (state + place as u64).wrapping_add_signed(shift * words as i64)
            };
            args.inbox[to] = at(self.places.inbox, self.words);
            args.choice[to] = at(self.places.choice, TOKENS);
        }
        args
    }
}
