//! A decode step as data: the order in which every role of every CTA walks, what each instruction
//! reads and writes, and the bytes it streams.
//!
//! Built for one rank of a tensor-parallel group from the model's exact shapes. Ranks differ in which
//! heads, expert rows and vocabulary they hold, never in order. A buffer is written in epochs; an
//! instruction names the epoch it reads, which on the device is the tag of the words it waits for.
//! `check.rs` proves a schedule before launch; `replay.rs` runs it with reference ops.
//! Refuses ranks that do not divide key/value heads, inner widths and vocabulary.
//! With a drafter a step is three passes: draft (`schedule/draft.rs`), verify, context.

mod draft;

use model::Config;
use model::config::{AttentionConfig, FfnConfig};
use model::draft::DraftConfig;

use crate::CudaError;
use crate::layout::{BLOCK_COLUMNS, PAGE_BYTES, RESIDENT_HEADER_BYTES, RING_STAGES, TOKENS};
use crate::strips::{Format, STRIP_ROWS};

/// Which part of a model this GPU holds, and how its CTAs are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This GPU.
    pub rank: usize,
    /// GPUs that share every layer.
    pub ranks: usize,
    /// CTAs of the resident grid.
    pub ctas: usize,
}

/// A buffer of the step. Values are f32, `[rows, width]`, unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Buffer {
    /// Residual stream, whole on every rank.
    X,
    /// This rank's q heads, then k, then v, not rotated.
    Qkv,
    /// This rank's attention output heads.
    Heads,
    /// This rank's part of a sum over ranks, hidden wide.
    Partial,
    /// Router logits, the same on every rank.
    RouterLogits,
    /// This rank's inner columns: `[rows, experts or 1, inner / ranks]`.
    Inner,
    /// This rank's slice of the vocabulary.
    Logits,
    /// One `(value, token)` a row and rank.
    Best,
    /// One token a row: u32; a row's place says what may be committed.
    Tokens,
    /// The residual after the drafter's n-th tap layer, `[rows, hidden]`.
    Tap(usize),
    /// The drafter's context rows before `hidden_norm`, `[rows, hidden]`.
    Context,
    /// Keys and values of all draft layers for the context rows, not rotated.
    ContextKv,
    /// The drafter's caches, over steps.
    DraftCache,
}

/// What an instruction computes. Definitions: `model::reference`, by the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Embedding rows of the step's tokens.
    Embed,
    /// Input norm, fused QKV.
    Qkv,
    /// Value scale, rope, KV append, attention.
    Attention,
    /// Output projection of this rank's heads.
    OProj,
    /// Sum of `Partial` over ranks, added to the residual.
    AllReduce,
    /// Post norm, router logits.
    Router,
    /// Post norm, gate and up of the chosen experts (or of the one dense unit), SwiGLU.
    GateUp,
    /// Down projection, weighted over experts in ascending order.
    Down,
    /// Final norm, this rank's rows of lm_head.
    LmHead,
    /// First largest logit of this rank.
    Argmax,
    /// First largest over ranks; in the verify pass the accept rule too.
    Choose,
    /// Embedding of the anchor and of the drafter's masks.
    DraftEmbed,
    /// Head norms, rope, value scale, attention over context and block.
    DraftAttention,
    /// The drafts: first largest over ranks of the rows after the anchor.
    DraftChoose,
    /// The drafter's `fc` over this rank's columns of the taps.
    Fuse,
    /// Sum of `Partial` over ranks.
    Context,
    /// `hidden_norm`, keys and values of every draft layer.
    ContextKv,
    /// Head norm, rope, value scale, into the drafter's caches: committed rows only.
    Append,
}

/// Which part of a step an instruction belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The target over anchor and drafts.
    Verify,
    /// The drafter over its block.
    Draft,
    /// The drafter's context of committed rows.
    Context,
}

impl Op {
    /// Whether its reads wait for every CTA. The norms do (sums of squares of the whole row), as do
    /// the choice of experts and of a token; the others take only the rows or heads of their own part.
    #[must_use]
    pub fn gathers(self) -> bool {
        matches!(
            self,
            Self::Qkv
                | Self::Router
                | Self::GateUp
                | Self::LmHead
                | Self::Choose
                | Self::Embed
                | Self::DraftChoose
                | Self::Fuse
                | Self::ContextKv
                | Self::Append
        )
    }
}

/// A buffer at an epoch, counted from 1.
pub type Version = (Buffer, u32);

/// One instruction; every CTA of every rank walks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What.
    pub op: Op,
    /// Part of the step.
    pub pass: Pass,
    /// Layer, where there is one: the drafter's in its pass.
    pub layer: Option<usize>,
    /// What it waits for.
    pub reads: Vec<Version>,
    /// What it makes.
    pub writes: Vec<Version>,
    /// Weight pages of this rank: their bytes, all CTAs together; experts count once each.
    pub page_bytes: usize,
    /// Its page addresses are known only after this version (the router's choice).
    pub pages_after: Option<Version>,
}

/// A step of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// For which part.
    pub shard: Shard,
    /// In program order.
    pub instructions: Vec<Instruction>,
    /// Slots of every buffer: epoch `e` lies in slot `e % slots`.
    pub slots: u32,
    /// Shared memory of a CTA.
    pub shared: SharedPlan,
}

/// Shared memory of a CTA, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPlan {
    /// One ring stage.
    pub stage: usize,
    /// Ring stages.
    pub stages: usize,
    /// What else the kernel keeps there, with the activations of a product over the hidden size.
    pub activations: usize,
    /// What the device allows.
    pub limit: usize,
}

/// Dynamic shared memory of a CTA on sm_90, bytes.
pub const SHARED_BYTES: usize = 232_448;

/// Bytes of strips for `rows` x `columns`.
fn strip_bytes(format: Format, rows: usize, columns: usize) -> usize {
    rows.div_ceil(STRIP_ROWS) * columns.div_ceil(BLOCK_COLUMNS) * format.strip_bytes()
}

fn divides(what: &'static str, size: usize, ranks: usize) -> Result<(), CudaError> {
    if ranks == 0 || !size.is_multiple_of(ranks) {
        return Err(CudaError::Shape {
            what,
            expected: format!("a multiple of {ranks} ranks"),
            found: size.to_string(),
        });
    }
    Ok(())
}

fn check_shard(config: &Config, shard: Shard) -> Result<(), CudaError> {
    if shard.rank >= shard.ranks {
        return Err(CudaError::Shape {
            what: "rank",
            expected: format!("below {}", shard.ranks),
            found: shard.rank.to_string(),
        });
    }
    divides("vocabulary", config.vocab_size, shard.ranks)?;
    for layer in &config.layers {
        divides("key/value heads", layer.attention.kv_heads, shard.ranks)?;
        let inner = match &layer.ffn {
            FfnConfig::Dense { intermediate } => *intermediate,
            FfnConfig::Moe(moe) => moe.intermediate,
        };
        divides("inner width", inner, shard.ranks)?;
    }
    Ok(())
}

/// Appends instructions and counts the epochs of buffers.
struct Builder<'a> {
    config: &'a Config,
    draft: Option<&'a DraftConfig>,
    pass: Pass,
    ranks: usize,
    epochs: Vec<(Buffer, u32)>,
    out: Vec<Instruction>,
}

impl Builder<'_> {
    fn epoch(&mut self, buffer: Buffer) -> &mut u32 {
        let at = self.epochs.iter().position(|(b, _)| *b == buffer);
        let at = at.unwrap_or_else(|| {
            self.epochs.push((buffer, 0));
            self.epochs.len() - 1
        });
        &mut self.epochs[at].1
    }

    fn push(
        &mut self,
        op: Op,
        layer: Option<usize>,
        reads: &[Buffer],
        writes: Buffer,
        page_bytes: usize,
    ) -> &mut Instruction {
        let reads = reads.iter().map(|&b| (b, *self.epoch(b))).collect();
        let epoch = self.epoch(writes);
        *epoch += 1;
        let writes = vec![(writes, *epoch)];
        let at = self.out.len();
        self.out.push(Instruction {
            op,
            pass: self.pass,
            layer,
            reads,
            writes,
            page_bytes,
            pages_after: None,
        });
        &mut self.out[at]
    }

    /// The sum after a layer's second half, and what the drafter keeps of it.
    fn layer_end(&mut self, l: usize) {
        let reads = [Buffer::Partial, Buffer::X];
        let tap = self.draft.and_then(|d| d.taps.iter().position(|&t| t == l));
        let tap = tap.map(|tap| {
            *self.epoch(Buffer::Tap(tap)) += 1;
            (Buffer::Tap(tap), 1)
        });
        let sum = self.push(Op::AllReduce, Some(l), &reads, Buffer::X, 0);
        sum.writes.extend(tap);
    }

    fn attention(&mut self, l: usize, a: &AttentionConfig) {
        let hidden = self.config.hidden;
        let rows = (a.heads * a.qk_dim + a.kv_heads * (a.qk_dim + a.v_dim)) / self.ranks;
        let layer = Some(l);
        self.push(
            Op::Qkv,
            layer,
            &[Buffer::X],
            Buffer::Qkv,
            strip_bytes(Format::Fp8, rows, hidden),
        );
        self.push(Op::Attention, layer, &[Buffer::Qkv], Buffer::Heads, 0);
        let columns = a.heads * a.v_dim / self.ranks;
        let bytes = strip_bytes(Format::Fp8, hidden, columns);
        self.push(Op::OProj, layer, &[Buffer::Heads], Buffer::Partial, bytes);
        self.push(
            Op::AllReduce,
            layer,
            &[Buffer::Partial, Buffer::X],
            Buffer::X,
            0,
        );
    }

    fn feed_forward(&mut self, l: usize, ffn: &FfnConfig) {
        let (hidden, layer) = (self.config.hidden, Some(l));
        match ffn {
            FfnConfig::Dense { intermediate } => {
                let inner = intermediate / self.ranks;
                let bytes = strip_bytes(Format::Fp8, 2 * inner, hidden);
                self.push(Op::GateUp, layer, &[Buffer::X], Buffer::Inner, bytes);
                let bytes = strip_bytes(Format::Fp8, hidden, inner);
                self.push(Op::Down, layer, &[Buffer::Inner], Buffer::Partial, bytes);
            }
            FfnConfig::Moe(moe) => {
                let inner = moe.intermediate / self.ranks;
                let (logits, x) = (Buffer::RouterLogits, Buffer::X);
                // BF16 rows; every rank computes all of them, so that no rank waits for another's.
                self.push(Op::Router, layer, &[x], logits, moe.experts * hidden * 2);
                let routed = Some((logits, *self.epoch(logits)));
                let bytes = strip_bytes(Format::Fp4, 2 * inner, hidden);
                let gate_up = self.push(Op::GateUp, layer, &[x, logits], Buffer::Inner, bytes);
                gate_up.pages_after = routed;
                let bytes = strip_bytes(Format::Fp4, hidden, inner);
                let reads = [Buffer::Inner, logits];
                let down = self.push(Op::Down, layer, &reads, Buffer::Partial, bytes);
                down.pages_after = routed;
            }
        }
        self.layer_end(l);
    }

    fn head(&mut self, choose: Op) {
        let bytes = self.config.vocab_size / self.ranks * self.config.hidden * 2;
        self.push(Op::LmHead, None, &[Buffer::X], Buffer::Logits, bytes);
        self.push(Op::Argmax, None, &[Buffer::Logits], Buffer::Best, 0);
        self.push(choose, None, &[Buffer::Best], Buffer::Tokens, 0);
    }
}

impl Schedule {
    /// The verify pass of one step: a step without a drafter.
    ///
    /// # Errors
    /// When the model does not divide into the ranks.
    pub fn new(config: &Config, shard: Shard) -> Result<Self, CudaError> {
        Self::with_draft(config, None, shard)
    }

    /// One step: the drafter's block, the target over it, the drafter's context.
    ///
    /// # Errors
    /// When model or drafter do not divide into the ranks.
    pub fn with_draft(
        config: &Config,
        draft: Option<&DraftConfig>,
        shard: Shard,
    ) -> Result<Self, CudaError> {
        check_shard(config, shard)?;
        let mut b = Builder {
            config,
            draft,
            pass: Pass::Verify,
            ranks: shard.ranks,
            epochs: Vec::new(),
            out: Vec::new(),
        };
        if let Some(draft) = draft {
            draft::check_shard(draft, shard)?;
            b.draft_pass(draft);
        }
        b.pass = Pass::Verify;
        let tokens: &[Buffer] = if draft.is_some() {
            &[Buffer::Tokens]
        } else {
            &[]
        };
        b.push(Op::Embed, None, tokens, Buffer::X, 0);
        for (l, layer) in config.layers.iter().enumerate() {
            b.attention(l, &layer.attention);
            b.feed_forward(l, &layer.ffn);
        }
        b.head(Op::Choose);
        if let Some(draft) = draft {
            b.context_pass(draft);
        }
        Ok(Self {
            shard,
            instructions: b.out,
            slots: 2,
            shared: SharedPlan {
                stage: PAGE_BYTES,
                stages: RING_STAGES,
                // What is before them in shared memory, and 8 rows in f16 with a factor for 32 columns.
                activations: RESIDENT_HEADER_BYTES - RING_STAGES * PAGE_BYTES
                    + config.hidden.next_multiple_of(BLOCK_COLUMNS) * TOKENS * 17 / 8,
                limit: SHARED_BYTES,
            },
        })
    }
}
