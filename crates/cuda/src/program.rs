//! A schedule made concrete for the resident kernel: one [`Instr`] an instruction, the places of all
//! weights and buffers, and what has to be put there.
//!
//! Two arenas, each one allocation: weights (pages and vectors, written once) and state (buffers,
//! counters, caches, zero at first). Built twice: with bases 0 to learn sizes, then with real bases.
//! Refuses models whose shapes the kernel does not take. Invariant: places never overlap; pages
//! and buffers are aligned to 128 bytes. What the fields of an instruction mean is in `kernels/resident_*.cuh`.

use model::Config;
use model::config::{AttentionConfig, FfnConfig};

use crate::CudaError;
use crate::layout::{
    ACTIVE_MAX, BLOCK_COLUMNS, EXPERTS_MAX, Instr, OPS, RESIDENT_HEADER_BYTES, RING_PAGE_BYTES,
    SLOTS_MAX, StepArgs, StepState, TOKENS,
};
use crate::schedule::{Op, SHARED_BYTES, Schedule};
use crate::strips::{Format, STRIP_ROWS, Tiles};

/// Bytes of a tagged word.
const WORD_BYTES: usize = 16;
/// Shared memory that attention needs where activations lie.
const ATTENTION_BYTES: usize = 28 << 10;
/// Ranks that the kernel knows.
const RANKS_MAX: usize = 8;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formats {
    /// Layer by layer.
    pub layers: Vec<LayerFormats>,
    /// Embedding rows as BF16; otherwise f32.
    pub embed_bf16: bool,
    /// lm_head.
    pub lm_head: Format,
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
        }
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

/// Offsets in the state arena that the host uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Places {
    /// `[instructions]` of [`Instr`].
    pub program: usize,
    /// `[instructions]` u32.
    pub counters: usize,
    /// One [`StepState`].
    pub state: usize,
    /// Words of sums over ranks.
    pub inbox: usize,
    /// Words of choices.
    pub choice: usize,
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
    /// Shared memory for activations.
    pub x_bytes: usize,
    /// Positions of the caches.
    pub context: usize,
    /// The schedule's rank and ranks.
    pub rank: usize,
    /// Ranks.
    pub ranks: usize,
    /// Words of an inbox from one rank and of one half.
    pub words: usize,
    /// Sums over ranks of a step, the choice included.
    pub sums: usize,
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

/// Tiles of `rows`: as high as they may be without giving one CTA more strips than necessary.
fn tiles_for(format: Format, rows: usize, columns: usize, ctas: usize) -> Tiles {
    let all = rows.div_ceil(STRIP_ROWS);
    let load = |strips: usize| all.div_ceil(strips).div_ceil(ctas) * strips;
    let fits = |strips: &usize| strips * format.strip_bytes() <= RING_PAGE_BYTES;
    let strips = (1..=4).filter(fits).min_by_key(|&s| (load(s), 4 - s));
    let strips = strips.unwrap_or(1);
    Tiles {
        format,
        tiles: all.div_ceil(strips),
        strips,
        blocks: columns.div_ceil(BLOCK_COLUMNS),
    }
}

fn page_blocks(tiles: &Tiles) -> usize {
    let most = RING_PAGE_BYTES / (tiles.strips * tiles.format.strip_bytes());
    most.clamp(1, tiles.blocks)
}

/// Addresses of the step's buffers.
#[derive(Clone, Copy, Default)]
struct Shared {
    h: u64,
    squares: u64,
    residual: u64,
    qkv: u64,
    heads: u64,
    inner: u64,
    router: u64,
    bests: u64,
    logits: u64,
}

struct Builder<'a> {
    config: &'a Config,
    schedule: &'a Schedule,
    formats: &'a Formats,
    bases: Bases,
    shared: Shared,
    out: Program,
    /// Index of the next sum over ranks.
    sum: usize,
    /// Tiles and parts of the router before the experts.
    routed: (usize, usize),
}

/// Limits that the kernel's tables and shared memory have.
fn check(config: &Config, schedule: &Schedule) -> Result<(), CudaError> {
    if schedule.shard.ranks > RANKS_MAX {
        return wrong(
            "ranks",
            format!("at most {RANKS_MAX}"),
            schedule.shard.ranks,
        );
    }
    if !config.hidden.is_multiple_of(2) {
        return wrong("hidden size", "an even number".into(), config.hidden);
    }
    for layer in &config.layers {
        let a = &layer.attention;
        if a.qk_dim > 256 || a.v_dim > 256 {
            let found = format!("{} and {}", a.qk_dim, a.v_dim);
            return wrong("head widths", "at most 256".into(), found);
        }
        if let FfnConfig::Moe(moe) = &layer.ffn
            && (moe.active > ACTIVE_MAX
                || moe.active * TOKENS > SLOTS_MAX
                || moe.experts > EXPERTS_MAX)
        {
            let found = format!("{} of {}", moe.active, moe.experts);
            let expected = format!("at most {ACTIVE_MAX} of {EXPERTS_MAX}");
            return wrong("experts of a row", expected, found);
        }
    }
    Ok(())
}

impl Builder<'_> {
    fn hidden_padded(&self) -> usize {
        self.config.hidden.next_multiple_of(BLOCK_COLUMNS)
    }

    fn state(&mut self, bytes: usize) -> usize {
        let at = self.out.state_bytes;
        self.out.state_bytes += bytes.next_multiple_of(128);
        at
    }

    fn buffer(&mut self, bytes: usize) -> u64 {
        self.bases.state + self.state(bytes) as u64
    }

    fn piece(&mut self, what: What, layer: usize, bytes: usize, tiles: Option<Tiles>) -> u64 {
        let offset = self.out.weight_bytes;
        self.out.weight_bytes += bytes.next_multiple_of(16); // experts follow each other exactly
        self.out.pieces.push(Piece {
            offset,
            bytes,
            what,
            layer,
            tiles,
        });
        self.bases.weights + offset as u64
    }

    fn norm(&mut self, what: What, layer: usize) -> u64 {
        self.piece(what, layer, self.hidden_padded() * 4, None)
    }

    fn turns(&mut self, dims: usize, theta: f32) -> u64 {
        let same = |t: &&Turns| t.dims == dims && t.theta == theta;
        let found = self.out.turns.iter().find(same).map(|t| t.offset);
        let offset = found.unwrap_or_else(|| {
            let offset = self.state(self.out.context * dims * 4);
            let turns = Turns {
                offset,
                dims,
                theta,
            };
            self.out.turns.push(turns);
            offset
        });
        self.bases.state + offset as u64
    }

    /// An instruction with what all have.
    fn instr(&self, op: Op) -> Instr {
        let name = match op {
            Op::Embed => "EMBED",
            Op::Qkv => "QKV",
            Op::Attention => "ATTENTION",
            Op::OProj => "O_PROJ",
            Op::AllReduce => "ALL_REDUCE",
            Op::Router => "ROUTER",
            Op::GateUp => "GATE_UP",
            Op::Down => "DOWN",
            Op::LmHead => "LM_HEAD",
            Op::Argmax | Op::Choose => "CHOOSE",
        };
        Instr {
            op: OPS.iter().position(|o| *o == name).unwrap_or(0) as i32,
            wait: self.out.instructions.len() as i32 - 1,
            hidden: self.config.hidden as i32,
            hidden_padded: self.hidden_padded() as i32,
            eps: self.config.eps,
            parts: 1,
            strips: 1,
            page_blocks: 1,
            ..Instr::default()
        }
    }

    /// Pages for `experts` matrices of one shape, one after the other.
    fn pages(&mut self, i: &mut Instr, whats: &[What], layer: usize, tiles: Tiles) {
        self.out.weight_bytes = self.out.weight_bytes.next_multiple_of(128);
        for (n, &what) in whats.iter().enumerate() {
            let at = self.piece(what, layer, tiles.bytes(), Some(tiles));
            if n == 0 {
                i.pages = at;
            }
        }
        i.format = tiles.format.code();
        i.tiles = tiles.tiles as i32;
        i.strips = tiles.strips as i32;
        i.blocks = tiles.blocks as i32;
        i.page_blocks = page_blocks(&tiles) as i32;
    }

    /// Activations of `blocks` x 128 columns have to fit in shared memory.
    fn staged(&mut self, blocks: i32) -> Result<(), CudaError> {
        let needed = blocks as usize * BLOCK_COLUMNS * 17;
        self.out.x_bytes = self.out.x_bytes.max(needed);
        let limit = SHARED_BYTES - RESIDENT_HEADER_BYTES;
        if needed > limit {
            let most = limit / (BLOCK_COLUMNS * 17) * BLOCK_COLUMNS;
            let expected = format!("at most {most} (more ranks make it smaller)");
            return wrong(
                "columns of a product",
                expected,
                blocks as usize * BLOCK_COLUMNS,
            );
        }
        Ok(())
    }

    fn embed(&mut self) {
        let mut i = self.instr(Op::Embed);
        let bytes = if self.formats.embed_bf16 { 2 } else { 4 };
        let size = self.config.vocab_size * self.config.hidden * bytes;
        i.table = self.piece(What::Embed, 0, size, None);
        i.format = if self.formats.embed_bf16 {
            Format::Bf16.code()
        } else {
            Format::F32.code()
        };
        i.weight = self.norm(What::InputNorm, 0);
        self.residual(&mut i);
        self.out.instructions.push(i);
    }

    fn residual(&self, i: &mut Instr) {
        i.out = self.shared.h;
        i.squares = self.shared.squares;
        i.residual = self.shared.residual;
    }

    fn qkv(&mut self, l: usize) -> Result<(), CudaError> {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let (_, _, rows) = qkv_rows(a, shard.ranks);
        let format = self.formats.layers[l].qkv;
        let tiles = tiles_for(format, rows, self.config.hidden, shard.ctas);
        let mut i = self.instr(Op::Qkv);
        self.pages(&mut i, &[What::Qkv], l, tiles);
        i.stage = 1;
        self.staged(i.blocks)?;
        (i.x, i.squares, i.out) = (self.shared.h, self.shared.squares, self.shared.qkv);
        self.out.instructions.push(i);
        Ok(())
    }

    fn attention(&mut self, l: usize) {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let (heads, kv_heads) = (a.heads / shard.ranks, a.kv_heads / shard.ranks);
        let (k_first, v_first, rows) = qkv_rows(a, shard.ranks);
        let height = tiles_for(self.formats.layers[l].qkv, rows, 1, shard.ctas).strips * STRIP_ROWS;
        let mut i = self.instr(Op::Attention);
        (i.x, i.out) = (self.shared.qkv, self.shared.heads);
        i.keys = self.buffer(kv_heads * self.out.context * a.qk_dim * 2);
        i.values = self.buffer(kv_heads * self.out.context * a.v_dim * 2);
        self.out.kv_bytes += kv_heads * self.out.context * (a.qk_dim + a.v_dim) * 2;
        if a.sinks {
            i.sinks = self.piece(What::Sinks, l, heads * 4, None);
        }
        i.turns = self.turns(a.rope_dims, a.rope_theta);
        (i.heads, i.kv_heads) = (heads as i32, kv_heads as i32);
        (i.qk_dim, i.v_dim, i.rope_dims) = (a.qk_dim as i32, a.v_dim as i32, a.rope_dims as i32);
        i.window = a.window.map_or(-1, |w| w as i32);
        (i.k_first, i.v_first) = (k_first as i32, v_first as i32);
        i.qkv_rows = rows.next_multiple_of(height) as i32;
        let columns = heads * a.v_dim.next_multiple_of(32);
        i.columns_padded = columns.next_multiple_of(BLOCK_COLUMNS) as i32;
        i.scaling = 1.0 / (a.qk_dim as f32).sqrt();
        i.value_scale = a.value_scale;
        self.out.instructions.push(i);
    }

    fn o_proj(&mut self, l: usize) -> Result<(), CudaError> {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let columns = a.heads / shard.ranks * a.v_dim.next_multiple_of(32);
        let format = self.formats.layers[l].o;
        let tiles = tiles_for(format, self.config.hidden, columns, shard.ctas);
        let mut i = self.instr(Op::OProj);
        self.pages(&mut i, &[What::O], l, tiles);
        (i.x, i.stage) = (self.shared.heads, 1);
        self.staged(i.blocks)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    fn all_reduce(&mut self, weight: u64) {
        let mut i = self.instr(Op::AllReduce);
        self.residual(&mut i);
        i.weight = weight;
        i.index = self.sum as i32;
        i.wait = -1; // the words say themselves when they are there
        self.sum += 1;
        self.out.instructions.push(i);
    }

    fn router(&mut self, l: usize, experts: usize) -> Result<(), CudaError> {
        let format = self.formats.layers[l].router;
        let mut tiles = tiles_for(format, experts, self.config.hidden, usize::MAX);
        (tiles.strips, tiles.tiles) = (1, experts.div_ceil(STRIP_ROWS));
        let mut i = self.instr(Op::Router);
        self.pages(&mut i, &[What::Router], l, tiles);
        let pages = tiles.blocks.div_ceil(page_blocks(&tiles));
        i.parts = (self.schedule.shard.ctas / tiles.tiles).clamp(1, pages) as i32;
        (i.x, i.out, i.stage) = (self.shared.h, self.shared.router, 1);
        self.staged(i.blocks)?;
        self.routed = (tiles.tiles * STRIP_ROWS, i.parts as usize);
        self.out.instructions.push(i);
        Ok(())
    }

    fn gate_up(&mut self, l: usize) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let formats = self.formats.layers[l];
        let mut i = self.instr(Op::GateUp);
        let (inner, experts) = match &self.config.layers[l].ffn {
            FfnConfig::Dense { intermediate } => {
                i.stage = 1;
                (*intermediate, 1)
            }
            FfnConfig::Moe(moe) => {
                (i.experts, i.active) = (moe.experts as i32, moe.active as i32);
                i.normalise = i32::from(moe.norm_topk);
                i.scaling = moe.scaling;
                (moe.intermediate, moe.experts)
            }
        };
        let of = inner_part(&formats, inner, shard.rank, shard.ranks);
        let tiles = Tiles {
            format: formats.gate_up,
            tiles: of.len().div_ceil(32),
            strips: 4,
            blocks: self.config.hidden.div_ceil(BLOCK_COLUMNS),
        };
        if 4 * tiles.format.strip_bytes() > RING_PAGE_BYTES {
            return wrong("gate and up weights", "at most 2 bytes each".into(), "f32");
        }
        let whats: Vec<What> = (0..experts).map(What::GateUp).collect();
        self.pages(&mut i, &whats, l, tiles);
        if i.experts > 0 {
            i.bias = self.piece(What::Bias, l, experts * 4, None);
            i.logits = self.shared.router;
            (i.logit_rows, i.logit_parts) = (self.routed.0 as i32, self.routed.1 as i32);
        }
        self.staged(i.blocks)?;
        (i.x, i.squares, i.out) = (self.shared.h, self.shared.squares, self.shared.inner);
        inner_sizes(&mut i, of.len());
        self.out.instructions.push(i);
        Ok(())
    }

    fn down(&mut self, l: usize) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let formats = self.formats.layers[l];
        let mut i = self.instr(Op::Down);
        let (inner, experts) = match &self.config.layers[l].ffn {
            FfnConfig::Dense { intermediate } => (*intermediate, 1),
            FfnConfig::Moe(moe) => {
                (i.experts, i.active) = (moe.experts as i32, moe.active as i32);
                (moe.intermediate, moe.experts)
            }
        };
        let of = inner_part(&formats, inner, shard.rank, shard.ranks);
        let tiles = tiles_for(formats.down, self.config.hidden, of.len(), shard.ctas);
        let whats: Vec<What> = (0..experts).map(What::Down).collect();
        self.pages(&mut i, &whats, l, tiles);
        self.staged(i.blocks)?;
        i.x = self.shared.inner;
        inner_sizes(&mut i, of.len());
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    fn lm_head(&mut self) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let of = part(self.config.vocab_size, shard.rank, shard.ranks);
        let tiles = tiles_for(
            self.formats.lm_head,
            of.len(),
            self.config.hidden,
            shard.ctas,
        );
        let mut i = self.instr(Op::LmHead);
        self.pages(&mut i, &[What::LmHead], 0, tiles);
        (i.x, i.squares, i.stage) = (self.shared.h, self.shared.squares, 1);
        (i.out, i.bests) = (self.shared.logits, self.shared.bests);
        self.staged(i.blocks)?;
        (i.first_token, i.rows) = (of.start as i32, of.len() as i32);
        self.out.places.logit_rows = tiles.tiles * tiles.strips * STRIP_ROWS;
        self.out.instructions.push(i);
        Ok(())
    }

    fn choose(&mut self) {
        let mut i = self.instr(Op::Choose);
        i.bests = self.shared.bests;
        i.index = self.sum as i32;
        self.sum += 1;
        let last = self.out.instructions.len() as i32;
        self.out.instructions.push(i);
        // The first instruction waits for the choice of the step before.
        self.out.instructions[0].wait = last;
    }

    /// Norm weights that follow a sum over ranks: after o_proj the layer's second, after down the
    /// next layer's first or the last.
    fn next_norm(&mut self, l: usize, after_attention: bool) -> u64 {
        match after_attention {
            true => self.norm(What::PostNorm, l),
            false if l + 1 < self.config.layers.len() => self.norm(What::InputNorm, l + 1),
            false => self.norm(What::FinalNorm, 0),
        }
    }

    fn instruction(&mut self, op: Op, l: usize, before: Option<Op>) -> Result<(), CudaError> {
        match op {
            Op::Embed => self.embed(),
            Op::Qkv => self.qkv(l)?,
            Op::Attention => self.attention(l),
            Op::OProj => self.o_proj(l)?,
            Op::AllReduce => {
                let weight = self.next_norm(l, before == Some(Op::OProj));
                self.all_reduce(weight);
            }
            Op::Router => {
                let FfnConfig::Moe(moe) = &self.config.layers[l].ffn else {
                    return wrong("layer with a router", "experts".into(), "a dense unit");
                };
                self.router(l, moe.experts)?;
            }
            Op::GateUp => self.gate_up(l)?,
            Op::Down => self.down(l)?,
            Op::LmHead => self.lm_head()?,
            Op::Argmax => {} // part of lm_head's epilogue
            Op::Choose => self.choose(),
        }
        Ok(())
    }

    /// Buffers that all layers share, as large as the largest needs.
    fn buffers(&mut self) {
        let shard = self.schedule.shard;
        let hidden = self.hidden_padded();
        let (mut qkv, mut heads, mut pair, mut experts) = (0, 0, 0, 0);
        for (layer, formats) in self.config.layers.iter().zip(&self.formats.layers) {
            let a = &layer.attention;
            qkv = qkv.max(qkv_rows(a, shard.ranks).2 + 64);
            heads = heads.max(a.heads / shard.ranks * a.v_dim.next_multiple_of(32) + 128);
            let inner = match &layer.ffn {
                FfnConfig::Dense { intermediate } => *intermediate,
                FfnConfig::Moe(moe) => {
                    experts = experts.max(moe.experts.next_multiple_of(STRIP_ROWS));
                    moe.intermediate
                }
            };
            let of = inner_part(formats, inner, shard.rank, shard.ranks).len();
            pair = pair.max(pair_bytes(of));
        }
        let vocab = part(self.config.vocab_size, shard.rank, shard.ranks).len() + 64;
        self.shared = Shared {
            h: self.buffer(hidden * 17),
            squares: self.buffer(hidden / 32 * TOKENS * 4),
            residual: self.buffer(hidden * TOKENS * 4),
            qkv: self.buffer(qkv * TOKENS * 4),
            heads: self.buffer(heads * 17),
            inner: self.buffer(SLOTS_MAX * pair),
            router: self.buffer(shard.ctas * STRIP_ROWS * TOKENS * 4 + experts * TOKENS * 4),
            bests: self.buffer(shard.ctas * TOKENS * 8),
            logits: 0,
        };
        let logits = self.state(vocab * TOKENS * 4);
        self.shared.logits = self.bases.state + logits as u64;
        let words = TOKENS * hidden / 2;
        let count = self.schedule.instructions.len();
        self.out.words = words;
        self.out.places = Places {
            program: self.state(count * size_of::<Instr>()),
            counters: self.state(count * 4),
            state: self.state(size_of::<StepState>()),
            inbox: self.state(2 * shard.ranks * words * WORD_BYTES),
            choice: self.state(2 * shard.ranks * TOKENS * WORD_BYTES),
            logits,
            logit_rows: 0,
        };
    }
}

fn pair_bytes(inner: usize) -> usize {
    let padded = inner.next_multiple_of(BLOCK_COLUMNS);
    padded * 2 + padded / 8
}

fn inner_sizes(i: &mut Instr, inner: usize) {
    i.inner_padded = inner.next_multiple_of(BLOCK_COLUMNS) as i32;
    i.pair_bytes = pair_bytes(inner) as i32;
}

impl Program {
    /// The program of `schedule` for `context` positions, with addresses from `bases`.
    ///
    /// # Errors
    /// When the kernel does not take the model's shapes.
    pub fn new(
        config: &Config,
        schedule: &Schedule,
        formats: &Formats,
        context: usize,
        bases: Bases,
    ) -> Result<Self, CudaError> {
        check(config, schedule)?;
        let out = Self {
            instructions: Vec::new(),
            pieces: Vec::new(),
            turns: Vec::new(),
            places: Places::default(),
            weight_bytes: 0,
            state_bytes: 0,
            kv_bytes: 0,
            x_bytes: ATTENTION_BYTES,
            context,
            rank: schedule.shard.rank,
            ranks: schedule.shard.ranks,
            words: 0,
            sums: 0,
        };
        let mut b = Builder {
            config,
            schedule,
            formats,
            bases,
            shared: Shared::default(),
            out,
            sum: 0,
            routed: (0, 0),
        };
        b.buffers();
        let mut before = None;
        for i in &schedule.instructions {
            b.instruction(i.op, i.layer.unwrap_or(0), before)?;
            before = Some(i.op);
        }
        b.out.sums = b.sum;
        Ok(b.out)
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

    /// Arguments for `steps` steps after `first_step`. `states`: the state arena of every rank; those
    /// of other ranks equal to this one's are looped back.
    #[must_use]
    pub fn args(&self, states: &[u64], first_step: u32, steps: u32) -> StepArgs {
        let own = states[self.rank];
        let mut args = StepArgs {
            program: own + self.places.program as u64,
            counters: own + self.places.counters as u64,
            state: own + self.places.state as u64,
            instructions: self.instructions.len() as i32,
            ranks: self.ranks as i32,
            rank: self.rank as i32,
            words: self.words as i32,
            first_step: first_step as i32,
            steps: steps as i32,
            sums: self.sums as i32,
            x_bytes: self.x_bytes as i32,
            context: self.context as i32,
            ..StepArgs::default()
        };
        for (to, &state) in states.iter().enumerate() {
            // Looped back, what goes to rank `to` lands where `to` would have written it.
            let shift = match state == own {
                true => (to as i64 - self.rank as i64) * WORD_BYTES as i64,
                false => 0,
            };
            let at = |place: usize, words: usize| {
                (state + place as u64).wrapping_add_signed(shift * words as i64)
            };
            args.inbox[to] = at(self.places.inbox, self.words);
            args.choice[to] = at(self.places.choice, TOKENS);
        }
        args
    }
}
