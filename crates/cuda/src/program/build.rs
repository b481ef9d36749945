//! Places for weights and buffers, and the walk over the schedule. Owns the order of places; the
//! instructions themselves are made in `layers.rs`. Refuses models past the kernel's tables.

use model::Config;
use model::config::{AttentionConfig, FfnConfig};

use super::draft::{DraftFormats, DraftShared};
use super::{
    Bases, Formats, HEAD_COLUMNS, Piece, Places, Program, Turns, WORD_BYTES, What, part, qkv_rows,
    wrong,
};
use crate::CudaError;
use crate::images::{Activations, Kv};
use crate::layout::{
    ACTIVE_MAX, BLOCK_COLUMNS, EXPERTS_MAX, HEADS, Instr, OPS, PAGE_BYTES, RANKS_MAX,
    RESIDENT_HEADER_BYTES, SLOTS_MAX, StepState, TOKENS, VALUE_COLUMNS, WARP_POSITIONS,
};
use crate::schedule::{Op, SHARED_BYTES, Schedule, Shard};
use crate::strips::{Format, STRIP_ROWS, Tiles};

/// Tiles of `rows`: as high as they may be without giving one CTA more strips than necessary.
pub(super) fn tiles_for(format: Format, rows: usize, columns: usize, ctas: usize) -> Tiles {
    let all = rows.div_ceil(STRIP_ROWS);
    let load = |strips: usize| all.div_ceil(strips).div_ceil(ctas) * strips;
    let fits = |strips: &usize| strips * format.strip_bytes() <= PAGE_BYTES;
    let strips = (1..=4).filter(fits).min_by_key(|&s| (load(s), 4 - s));
    let strips = strips.unwrap_or(1);
    Tiles {
        format,
        tiles: all.div_ceil(strips),
        strips,
        blocks: columns.div_ceil(BLOCK_COLUMNS),
    }
}

pub(super) fn page_blocks(tiles: &Tiles) -> usize {
    let most = PAGE_BYTES / (tiles.strips * tiles.format.strip_bytes());
    most.clamp(1, tiles.blocks)
}

/// Addresses of the step's buffers.
#[derive(Clone, Copy, Default)]
pub(super) struct Shared {
    pub(super) h: u64,
    pub(super) squares: u64,
    pub(super) residual: u64,
    pub(super) qkv: u64,
    pub(super) heads: u64,
    pub(super) router: u64,
    pub(super) bests: u64,
    pub(super) logits: u64,
    /// Parts of full attention, then counters of those that are there.
    pub(super) parts: u64,
    pub(super) part_counters: u64,
}

/// Positions of a tile of attention, where shared memory allows it: a window and what surrounds it.
pub(super) const TILE_POSITIONS: usize = 144;
/// The same of e4m3, whose rows are half as long: as many as twelve warps have.
const TILE_POSITIONS_FP8: usize = 192;
/// CTAs at most that share the positions of a row and group.
const PARTS_MAX: usize = 16;

/// How attention of a layer is dealt to CTAs.
pub(super) struct Split {
    /// Rows, groups and heads of a group: units of a step of 8 rows, splits aside.
    units: usize,
    /// CTAs that share the positions of a unit.
    pub(super) parts: usize,
    /// Values of a part: `m`, `l`, sums.
    values: usize,
    /// Shared memory that it wants.
    shared_bytes: usize,
}

/// Positions of a tile of the target's attention.
pub(super) fn tile_positions(kv: Kv) -> usize {
    match kv {
        Kv::Bf16 | Kv::Wide => TILE_POSITIONS,
        Kv::Fp8 => TILE_POSITIONS_FP8,
    }
}

/// Bytes of a key and of a value in the caches and in a tile: columns up to a multiple of 16, and an odd number of 16 bytes, which keeps
/// eight rows on different banks of shared memory.
pub(super) fn cached_row(a: &AttentionConfig, kv: Kv) -> (usize, usize) {
    let of = |columns: usize| ((columns.next_multiple_of(16) * kv.bytes() / 16) | 1) * 16;
    (of(a.qk_dim), of(a.v_dim))
}

pub(super) fn split(a: &AttentionConfig, shard: Shard, kv: Kv) -> Split {
    let groups = a.kv_heads / shard.ranks;
    let columns = a.v_dim.div_ceil(VALUE_COLUMNS);
    let units = TOKENS * groups * (a.heads / a.kv_heads).div_ceil(HEADS) * columns;
    let parts = match a.window {
        Some(_) => 1,
        None => (shard.ctas / units).clamp(1, PARTS_MAX),
    };
    let width = a.v_dim.min(VALUE_COLUMNS).next_multiple_of(16);
    let part = 2 * HEADS + HEADS * (width + 4);
    // More positions of e4m3 fit in as much memory.
    let (key, value) = cached_row(a, if kv == Kv::Fp8 { Kv::Bf16 } else { kv });
    let position = (key + value).max((part * 4).div_ceil(WARP_POSITIONS));
    let key_columns = a.qk_dim.next_multiple_of(16);
    let heads = if parts > 1 { HEADS } else { 8 };
    Split {
        units,
        parts,
        values: 2 * HEADS + HEADS * (VALUE_COLUMNS + 4),
        shared_bytes: 256 + 4 * heads * (key_columns + 8) + TILE_POSITIONS * position,
    }
}

pub(super) struct Builder<'a> {
    pub(super) config: &'a Config,
    pub(super) schedule: &'a Schedule,
    pub(super) formats: &'a Formats,
    pub(super) bases: Bases,
    pub(super) shared: Shared,
    pub(super) out: Program,
    /// Index of the next sum over ranks.
    pub(super) sum: usize,
    /// Inner by its columns of `down` and of a step: layers of one shape share it.
    pub(super) inners: Vec<(usize, usize, u64)>,
    /// Tiles and parts of the router before the experts.
    pub(super) routed: (usize, usize),
    /// Embedding rows, once placed: drafter and target share them.
    pub(super) table: Option<u64>,
    /// Pages of lm_head, the same.
    pub(super) head: Option<u64>,
    /// The drafter's.
    pub(super) draft: DraftShared,
}

/// Limits that the kernel's tables and shared memory have.
pub(super) fn check(
    config: &Config,
    schedule: &Schedule,
    draft: Option<&DraftFormats>,
) -> Result<(), CudaError> {
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
    if let Some(draft) = draft {
        super::draft::check(draft)?;
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
    /// [`tiles_for`] this grid and ring.
    pub(super) fn tiles(&self, format: Format, rows: usize, columns: usize) -> Tiles {
        tiles_for(format, rows, columns, self.schedule.shard.ctas)
    }

    pub(super) fn hidden_padded(&self) -> usize {
        self.config.hidden.next_multiple_of(BLOCK_COLUMNS)
    }

    pub(super) fn state(&mut self, bytes: usize) -> usize {
        let at = self.out.state_bytes;
        self.out.state_bytes += bytes.next_multiple_of(128);
        at
    }

    pub(super) fn buffer(&mut self, bytes: usize) -> u64 {
        self.bases.state + self.state(bytes) as u64
    }

    /// A buffer of activations.
    pub(super) fn activations(&mut self, columns: usize, rows: usize) -> u64 {
        let bytes = self.out.numbers.activations.bytes(columns, rows);
        self.buffer(bytes)
    }

    pub(super) fn piece(
        &mut self,
        what: What,
        layer: usize,
        bytes: usize,
        tiles: Option<Tiles>,
    ) -> u64 {
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

    pub(super) fn norm(&mut self, what: What, layer: usize) -> u64 {
        self.piece(what, layer, self.hidden_padded() * 4, None)
    }

    pub(super) fn turns(&mut self, dims: usize, theta: f32) -> u64 {
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
    pub(super) fn instr(&self, op: Op) -> Instr {
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
            Op::DraftEmbed => "DRAFT_EMBED",
            Op::DraftAttention => "DRAFT_ATTENTION",
            Op::DraftChoose => "DRAFT_CHOOSE",
            Op::Fuse => "FUSE",
            Op::Context => "CONTEXT",
            Op::ContextKv => "CONTEXT_KV",
            Op::Append => "APPEND",
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
    pub(super) fn pages(&mut self, i: &mut Instr, whats: &[What], layer: usize, tiles: Tiles) {
        self.out.weight_bytes = self.out.weight_bytes.next_multiple_of(128);
        for (n, &what) in whats.iter().enumerate() {
            let at = self.piece(what, layer, tiles.bytes(), Some(tiles));
            if n == 0 {
                self.shape(i, at, tiles);
            }
        }
    }

    /// Pages that are at `at` already.
    pub(super) fn shape(&self, i: &mut Instr, at: u64, tiles: Tiles) {
        i.pages = at;
        i.format = tiles.format.code();
        i.tiles = tiles.tiles as i32;
        i.strips = tiles.strips as i32;
        i.blocks = tiles.blocks as i32;
        i.page_blocks = page_blocks(&tiles) as i32;
    }

    /// Activations of `blocks` x 128 columns have to fit in shared memory.
    pub(super) fn staged(&mut self, i: &mut Instr, columns: usize) -> Result<(), CudaError> {
        let blocks = i.blocks as usize;
        let bytes = |wide| {
            self.out
                .numbers
                .activations
                .bytes(wide * BLOCK_COLUMNS, columns)
        };
        let needed = bytes(blocks);
        i.stage_bytes = needed as i32;
        self.out.x_bytes = self.out.x_bytes.max(needed);
        let limit = SHARED_BYTES - RESIDENT_HEADER_BYTES;
        if needed > limit {
            let most = limit / bytes(1) * BLOCK_COLUMNS;
            let way = match self.out.numbers.activations {
                Activations::Wide => "activations of one term take half as much",
                _ => "more ranks make it smaller",
            };
            let expected = format!("at most {most} ({way})");
            return wrong("columns of a product", expected, blocks * BLOCK_COLUMNS);
        }
        Ok(())
    }

    /// Inner of `inner` columns for products of `active` experts a row (0: a dense unit).
    pub(super) fn inner(&mut self, i: &mut Instr, inner: usize) -> u64 {
        let padded = inner.next_multiple_of(BLOCK_COLUMNS);
        let columns = match i.active {
            0 => TOKENS,
            active => active as usize * TOKENS + 1, // and one of zeros
        };
        (i.inner_padded, i.pair_columns) = (padded as i32, columns as i32);
        let same = |b: &&(usize, usize, u64)| (b.0, b.1) == (padded, columns);
        if let Some(found) = self.inners.iter().find(same) {
            return found.2;
        }
        let at = self.activations(padded, columns);
        self.inners.push((padded, columns, at));
        at
    }

    /// Norm weights that follow a sum over ranks: after o_proj the layer's second, after down the
    /// next layer's first or the last.
    pub(super) fn next_norm(&mut self, l: usize, after_attention: bool) -> u64 {
        match after_attention {
            true => self.norm(What::PostNorm, l),
            false if l + 1 < self.config.layers.len() => self.norm(What::InputNorm, l + 1),
            false => self.norm(What::FinalNorm, 0),
        }
    }

    pub(super) fn instruction(
        &mut self,
        op: Op,
        l: usize,
        before: Option<Op>,
    ) -> Result<(), CudaError> {
        match op {
            Op::Embed => self.embed(),
            Op::Qkv => self.qkv(l)?,
            Op::Attention => self.attention(l),
            Op::OProj => self.o_proj(l)?,
            Op::AllReduce => {
                let weight = self.next_norm(l, before == Some(Op::OProj));
                self.all_reduce(weight);
                if before == Some(Op::Down) {
                    self.tap_last(l);
                }
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
            Op::Choose => self.choose(),
            _ => {} // Argmax is part of lm_head's epilogue; the rest is the drafter's
        }
        Ok(())
    }

    /// Memory in which full attention meets, and shared memory for its tiles.
    fn attention_parts(&mut self) {
        let limit = SHARED_BYTES - RESIDENT_HEADER_BYTES;
        let (mut values, mut counters) = (0, 0);
        let draft = self.draft_attentions();
        let target = self.config.layers.iter().map(|l| &l.attention);
        for a in target.chain(&draft) {
            let split = split(a, self.schedule.shard, self.out.numbers.kv);
            values = values.max(split.units * PARTS_MAX * split.values);
            counters = counters.max(split.units);
            let shared = split.shared_bytes.min(limit);
            self.out.x_bytes = self.out.x_bytes.max(shared);
        }
        self.shared.parts = self.buffer(values * 4);
        self.shared.part_counters = self.buffer(counters * 4);
    }

    /// Buffers that all layers share, as large as the largest needs.
    pub(super) fn buffers(&mut self) {
        let shard = self.schedule.shard;
        let hidden = self.hidden_padded();
        let (mut qkv, mut heads, mut experts) = (0, 0, 0);
        let draft = self.draft_attentions();
        for a in self
            .config
            .layers
            .iter()
            .map(|l| &l.attention)
            .chain(&draft)
        {
            qkv = qkv.max(qkv_rows(a, shard.ranks).2 + 64);
            heads = heads.max(a.heads / shard.ranks * a.v_dim.next_multiple_of(HEAD_COLUMNS) + 128);
        }
        for layer in &self.config.layers {
            if let FfnConfig::Moe(moe) = &layer.ffn {
                experts = experts.max(moe.experts.next_multiple_of(STRIP_ROWS));
            }
        }
        let vocab = part(self.config.vocab_size, shard.rank, shard.ranks).len() + 64;
        self.shared = Shared {
            h: self.activations(hidden, TOKENS),
            squares: self.buffer(hidden / 32 * TOKENS * 4),
            residual: self.buffer(hidden * TOKENS * 4),
            qkv: self.buffer(qkv * TOKENS * 4),
            heads: self.activations(heads, TOKENS),
            router: self.buffer(shard.ctas * STRIP_ROWS * TOKENS * 4 + experts * TOKENS * 4),
            bests: self.buffer(shard.ctas * TOKENS * 8),
            logits: 0,
            parts: 0,
            part_counters: 0,
        };
        self.attention_parts();
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
            batons: self.state(self.out.baton_bytes()),
            logits,
            logit_rows: 0,
        };
        // After what peers write to, whose places are the same on every rank: ranks have columns of taps of their own number.
        self.draft_buffers();
    }
}
