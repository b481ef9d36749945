//! Instructions and places of the drafter: its block, and the context that it keeps.
//!
//! Owns the order of packed rows and columns that only the drafter has. A rank holds whole heads and
//! a range of blocks of 128 columns of the taps, side by side in one buffer. Refuses blocks of more
//! rows than a step has, and keys and values of different formats (one product makes them all).

use model::config::AttentionConfig;
use model::draft::{DraftConfig, DraftWindow};

use super::build::{Builder, TILE_POSITIONS, cached_row, split};
use super::{HEAD_COLUMNS, LayerFormats, What, part, qkv_rows, wrong};
use crate::CudaError;
use crate::images::Kv;
use crate::layout::{BLOCK_COLUMNS, Instr, TOKENS};
use crate::schedule::{Instruction, Op};
use crate::strips::{Format, STRIP_ROWS, Tiles};

/// Formats and shape of a drafter.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftFormats {
    /// Its shape; at most 8 rows a block.
    pub config: DraftConfig,
    /// Of `fc`.
    pub fc: Format,
    /// Layer by layer; `router` is unused.
    pub layers: Vec<LayerFormats>,
    /// Whether rows after the anchor have an embedding of their own.
    pub mask_embedding: bool,
}

/// A drafter whose block of more than 8 rows is used as one of 8.
pub(crate) fn of_eight_rows(config: &DraftConfig) -> DraftConfig {
    DraftConfig {
        block_size: config.block_size.min(TOKENS as u32),
        ..config.clone()
    }
}

impl DraftFormats {
    /// All matrices in `format`, a mask embedding as MiMo's releases have it.
    #[must_use]
    pub fn uniform(config: &DraftConfig, format: Format) -> Self {
        let layer = LayerFormats {
            qkv: format,
            o: format,
            router: format,
            gate_up: format,
            down: format,
        };
        Self {
            config: of_eight_rows(config),
            fc: format,
            layers: vec![layer; config.layers.len()],
            mask_embedding: true,
        }
    }
}

/// Which weights of the drafter go to a place; the piece has the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftWhat {
    /// Fused q, k, v rows of this rank.
    Qkv,
    /// Their biases, f32.
    QkvBias,
    /// Output projection columns of this rank's heads.
    O,
    /// Its bias `[hidden_padded]` f32; zeros but on rank 0, because ranks are summed.
    OBias,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
    /// Norms `[hidden_padded]` f32.
    InputNorm,
    /// See `InputNorm`.
    PostNorm,
    /// See `InputNorm`.
    FinalNorm,
    /// See `InputNorm`.
    HiddenNorm,
    /// `[qk_dim]` f32.
    QNorm,
    /// `[layers, qk_dim]` f32.
    KNorms,
    /// Sinks of this rank's heads, f32.
    Sinks,
    /// This rank's columns of `fc`.
    Fc,
    /// Keys, then values, of every layer for the context.
    ContextKv,
    /// Their biases.
    ContextBias,
    /// `[hidden_padded]` f32.
    Mask,
}

/// First value row of a layer among the context's rows, and all its rows.
#[must_use]
pub fn context_rows(a: &AttentionConfig, ranks: usize) -> (usize, usize) {
    let k = (a.kv_heads / ranks * a.qk_dim).next_multiple_of(8);
    let v = (a.kv_heads / ranks * a.v_dim).next_multiple_of(8);
    (k, k + v)
}

/// Columns from one tap to the next: 64 columns share a factor, so a tap begins at a multiple of 64.
#[must_use]
pub fn tap_stride(hidden: usize) -> usize {
    hidden.next_multiple_of(HEAD_COLUMNS)
}

/// This rank's columns of the taps, in blocks of 128; may be none of a small model.
#[must_use]
pub fn tap_columns(draft: &DraftConfig, rank: usize, ranks: usize) -> std::ops::Range<usize> {
    let blocks = (draft.taps.len() * tap_stride(draft.hidden)).div_ceil(BLOCK_COLUMNS);
    let of = part(blocks, rank, ranks);
    of.start * BLOCK_COLUMNS..of.end * BLOCK_COLUMNS
}

/// Addresses that only the drafter's instructions use.
#[derive(Clone, Copy, Default)]
pub(super) struct DraftShared {
    taps: u64,
    context_kv: u64,
    keys: u64,
    values: u64,
    k_norms: u64,
}

/// The drafter's attention as the target's are described.
fn attention_of(draft: &DraftConfig, window: DraftWindow) -> AttentionConfig {
    let window = match window {
        DraftWindow::Full => None,
        DraftWindow::Causal(w) | DraftWindow::Symmetric(w) => Some(w.saturating_sub(1)),
    };
    AttentionConfig {
        window,
        ..draft.attention.clone()
    }
}

/// Keys after its own that a row sees; -1: all of the block.
fn ahead(window: DraftWindow) -> i32 {
    match window {
        DraftWindow::Full => -1,
        DraftWindow::Causal(_) => 0,
        DraftWindow::Symmetric(w) => w.saturating_sub(1).min(TOKENS) as i32,
    }
}

/// Limits that the drafter has to keep.
pub(super) fn check(draft: &DraftFormats) -> Result<(), CudaError> {
    let (config, a) = (&draft.config, &draft.config.attention);
    if config.block_size as usize > TOKENS {
        let expected = format!("at most {TOKENS} rows");
        return wrong("the drafter's block", expected, config.block_size);
    }
    if a.qk_dim > 256 || a.v_dim > 256 {
        let found = format!("{} and {}", a.qk_dim, a.v_dim);
        return wrong("the drafter's head widths", "at most 256".into(), found);
    }
    let first = draft.layers.first().map(|l| l.qkv);
    if draft.layers.iter().any(|l| Some(l.qkv) != first) {
        let found = "several".to_owned();
        return wrong("formats of the drafter's k and v", "one".into(), found);
    }
    Ok(())
}

impl Builder<'_> {
    fn drafter(&self) -> Result<&DraftFormats, CudaError> {
        match &self.formats.draft {
            Some(draft) => Ok(draft),
            None => wrong("a schedule with a drafter", "its formats".into(), "none"),
        }
    }

    /// Its full layers and its windows, as `split` wants them: a window of many tiles is shared by CTAs too.
    pub(super) fn draft_attentions(&self) -> Vec<AttentionConfig> {
        let Some(draft) = &self.formats.draft else {
            return Vec::new();
        };
        let of = |w: &DraftWindow| {
            let mut a = attention_of(&draft.config, *w);
            a.window = a.window.filter(|w| *w <= TILE_POSITIONS);
            a
        };
        draft.config.layers.iter().map(of).collect()
    }

    /// Buffers of its own.
    pub(super) fn draft_buffers(&mut self) {
        let Some(draft) = &self.formats.draft else {
            return;
        };
        let shard = self.schedule.shard;
        let (config, a, layers) = (&draft.config, &draft.config.attention, draft.layers.len());
        let columns = tap_columns(config, shard.rank, shard.ranks).len();
        let rows = layers * context_rows(a, shard.ranks).1 + 64;
        let positions = layers * a.kv_heads / shard.ranks * self.out.context;
        let (key, value) = cached_row(a, Kv::Bf16);
        let caches = [positions * key, positions * value];
        self.draft.taps = self.activations(columns.max(BLOCK_COLUMNS), TOKENS);
        self.draft.context_kv = self.buffer(rows * TOKENS * 4);
        self.draft.keys = self.buffer(caches[0]);
        self.draft.values = self.buffer(caches[1]);
        self.out.draft_kv_bytes = caches[0] + caches[1];
        self.draft.k_norms = self.draft_vector(DraftWhat::KNorms, 0, layers * a.qk_dim);
    }

    fn draft_vector(&mut self, what: DraftWhat, layer: usize, values: usize) -> u64 {
        self.piece(What::Draft(what), layer, values * 4, None)
    }

    /// One instruction of the draft or context pass.
    pub(super) fn draft_instruction(
        &mut self,
        i: &Instruction,
        before: Option<Op>,
    ) -> Result<(), CudaError> {
        let l = i.layer.unwrap_or(0);
        match i.op {
            Op::DraftEmbed => self.draft_embed()?,
            Op::Qkv => self.draft_qkv(l)?,
            Op::DraftAttention => self.draft_attention(l)?,
            Op::OProj => self.draft_o_proj(l)?,
            Op::AllReduce => {
                let layers = self.drafter()?.layers.len();
                let (what, l) = match before {
                    Some(Op::OProj) => (DraftWhat::PostNorm, l),
                    _ if l + 1 < layers => (DraftWhat::InputNorm, l + 1),
                    _ => (DraftWhat::FinalNorm, 0),
                };
                let weight = self.draft_vector(what, l, self.hidden_padded());
                self.all_reduce(weight);
            }
            Op::GateUp => self.draft_gate_up(l)?,
            Op::Down => self.draft_down(l)?,
            Op::LmHead => self.lm_head()?,
            Op::DraftChoose => self.draft_choose(),
            Op::Fuse => self.fuse()?,
            Op::Context => self.context_sum(),
            Op::ContextKv => self.context_kv()?,
            Op::Append => self.append()?,
            _ => {} // Argmax is part of lm_head's epilogue
        }
        Ok(())
    }

    fn draft_embed(&mut self) -> Result<(), CudaError> {
        let (mask, own) = {
            let draft = self.drafter()?;
            (draft.config.mask_token, draft.mask_embedding)
        };
        let mut i = self.instr(Op::DraftEmbed);
        self.table(&mut i);
        i.first_token = mask as i32;
        if own {
            i.mask = self.draft_vector(DraftWhat::Mask, 0, self.hidden_padded());
        }
        i.weight = self.draft_vector(DraftWhat::InputNorm, 0, self.hidden_padded());
        self.residual(&mut i);
        self.out.instructions.push(i);
        Ok(())
    }

    fn draft_qkv(&mut self, l: usize) -> Result<(), CudaError> {
        let (format, rows, biases) = {
            let draft = self.drafter()?;
            let (_, _, rows) = qkv_rows(&draft.config.attention, self.schedule.shard.ranks);
            (draft.layers[l].qkv, rows, draft.config.biases)
        };
        let tiles = self.tiles(format, rows, self.config.hidden);
        let mut i = self.instr(Op::Qkv);
        self.pages(&mut i, &[What::Draft(DraftWhat::Qkv)], l, tiles);
        if biases {
            i.bias = self.draft_vector(DraftWhat::QkvBias, l, packed_rows(&tiles));
        }
        i.stage = 1;
        self.staged(&mut i, TOKENS)?;
        (i.x, i.squares, i.out) = (self.shared.h, self.shared.squares, self.shared.qkv);
        self.out.instructions.push(i);
        Ok(())
    }

    fn draft_attention(&mut self, l: usize) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let (a, format, window) = {
            let draft = self.drafter()?;
            let window = draft.config.layers[l];
            (
                attention_of(&draft.config, window),
                draft.layers[l].qkv,
                window,
            )
        };
        let (heads, kv_heads) = (a.heads / shard.ranks, a.kv_heads / shard.ranks);
        let (k_first, v_first, rows) = qkv_rows(&a, shard.ranks);
        let mut i = self.instr(Op::DraftAttention);
        (i.x, i.out) = (self.shared.qkv, self.shared.heads);
        heads_of(&mut i, &a, shard.ranks);
        let before = (l * kv_heads * self.out.context) as u64;
        i.keys = self.draft.keys + before * i.key_stride as u64;
        i.values = self.draft.values + before * i.value_stride as u64;
        i.q_norm = self.draft_vector(DraftWhat::QNorm, l, a.qk_dim);
        i.k_norm = self.draft.k_norms + (l * a.qk_dim * 4) as u64;
        if a.sinks {
            i.sinks = self.draft_vector(DraftWhat::Sinks, l, heads);
        }
        i.turns = self.turns(a.rope_dims, a.rope_theta);
        i.window = a.window.map_or(-1, |w| w as i32);
        i.ahead = ahead(window);
        (i.k_first, i.v_first) = (k_first as i32, v_first as i32);
        i.qkv_rows = packed_rows(&self.tiles(format, rows, self.config.hidden)) as i32;
        let columns = heads * a.v_dim.next_multiple_of(HEAD_COLUMNS);
        i.columns_padded = columns.next_multiple_of(BLOCK_COLUMNS) as i32;
        i.scaling = 1.0 / (a.qk_dim as f32).sqrt();
        i.parts = split(&self.draft_attentions()[l], shard, Kv::Bf16).parts as i32;
        i.rows = TILE_POSITIONS as i32;
        (i.residual, i.bests) = (self.shared.parts, self.shared.part_counters);
        self.out.instructions.push(i);
        Ok(())
    }

    fn draft_o_proj(&mut self, l: usize) -> Result<(), CudaError> {
        let (columns, format, biases) = {
            let draft = self.drafter()?;
            let a = &draft.config.attention;
            let heads = a.heads / self.schedule.shard.ranks;
            let columns = heads * a.v_dim.next_multiple_of(HEAD_COLUMNS);
            (columns, draft.layers[l].o, draft.config.biases)
        };
        let tiles = self.tiles(format, self.config.hidden, columns);
        let mut i = self.instr(Op::OProj);
        self.pages(&mut i, &[What::Draft(DraftWhat::O)], l, tiles);
        if biases {
            i.bias = self.draft_vector(DraftWhat::OBias, l, self.hidden_padded());
        }
        (i.x, i.stage) = (self.shared.heads, 1);
        self.staged(&mut i, TOKENS)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    fn draft_gate_up(&mut self, l: usize) -> Result<(), CudaError> {
        let (formats, inner) = self.draft_inner(l)?;
        let mut i = self.instr(Op::GateUp);
        let tiles = self.gate_up_tiles(formats.gate_up, inner)?;
        self.pages(&mut i, &[What::Draft(DraftWhat::GateUp)], l, tiles);
        i.stage = 1;
        self.staged(&mut i, TOKENS)?;
        (i.x, i.squares) = (self.shared.h, self.shared.squares);
        i.out = self.inner(&mut i, inner);
        self.out.instructions.push(i);
        Ok(())
    }

    fn draft_down(&mut self, l: usize) -> Result<(), CudaError> {
        let (formats, inner) = self.draft_inner(l)?;
        let tiles = self.tiles(formats.down, self.config.hidden, inner);
        let mut i = self.instr(Op::Down);
        self.pages(&mut i, &[What::Draft(DraftWhat::Down)], l, tiles);
        i.stage = 1;
        i.x = self.inner(&mut i, inner);
        let columns = i.pair_columns as usize;
        self.staged(&mut i, columns)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    /// Formats of a draft layer and its inner columns on this rank.
    fn draft_inner(&self, l: usize) -> Result<(LayerFormats, usize), CudaError> {
        let (draft, shard) = (self.drafter()?, self.schedule.shard);
        let formats = draft.layers[l];
        let inner = draft.config.intermediate;
        let of = super::inner_part(&formats, inner, shard.rank, shard.ranks);
        Ok((formats, of.len()))
    }

    fn draft_choose(&mut self) {
        let mut i = self.instr(Op::DraftChoose);
        i.bests = self.shared.bests;
        i.index = self.sum as i32;
        // Even, so that halves of the inbox alternate also where the draft pass is left out.
        self.sum = (self.sum + 1).next_multiple_of(2);
        self.out.instructions.push(i);
        self.out.verify_begin = self.out.instructions.len();
    }

    fn fuse(&mut self) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let (format, columns) = {
            let draft = self.drafter()?;
            (
                draft.fc,
                tap_columns(&draft.config, shard.rank, shard.ranks).len(),
            )
        };
        let columns = columns.max(BLOCK_COLUMNS);
        let tiles = self.tiles(format, self.config.hidden, columns);
        let mut i = self.instr(Op::Fuse);
        self.pages(&mut i, &[What::Draft(DraftWhat::Fc)], 0, tiles);
        (i.x, i.stage) = (self.draft.taps, 1);
        self.staged(&mut i, TOKENS)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    fn context_sum(&mut self) {
        let mut i = self.instr(Op::Context);
        (i.out, i.squares) = (self.shared.h, self.shared.squares);
        i.weight = self.draft_vector(DraftWhat::HiddenNorm, 0, self.hidden_padded());
        i.index = self.sum as i32;
        i.wait = -1; // the words say themselves when they are there
        self.sum += 1;
        self.out.instructions.push(i);
    }

    fn context_tiles(&self) -> Result<Tiles, CudaError> {
        let draft = self.drafter()?;
        let a = &draft.config.attention;
        let rows = draft.layers.len() * context_rows(a, self.schedule.shard.ranks).1;
        let format = draft.layers.first().map_or(Format::Bf16, |l| l.qkv);
        Ok(self.tiles(format, rows, self.config.hidden))
    }

    fn context_kv(&mut self) -> Result<(), CudaError> {
        let biases = self.drafter()?.config.biases;
        let tiles = self.context_tiles()?;
        let mut i = self.instr(Op::ContextKv);
        self.pages(&mut i, &[What::Draft(DraftWhat::ContextKv)], 0, tiles);
        if biases {
            i.bias = self.draft_vector(DraftWhat::ContextBias, 0, packed_rows(&tiles));
        }
        i.stage = 1;
        self.staged(&mut i, TOKENS)?;
        (i.x, i.squares, i.out) = (self.shared.h, self.shared.squares, self.draft.context_kv);
        self.out.instructions.push(i);
        Ok(())
    }

    fn append(&mut self) -> Result<(), CudaError> {
        let tiles = self.context_tiles()?;
        let (a, theta, layers) = {
            let draft = self.drafter()?;
            let theta = draft.config.context_rope_theta;
            (draft.config.attention.clone(), theta, draft.layers.len())
        };
        let (v_first, rows) = context_rows(&a, self.schedule.shard.ranks);
        let mut i = self.instr(Op::Append);
        i.x = self.draft.context_kv;
        (i.keys, i.values, i.k_norm) = (self.draft.keys, self.draft.values, self.draft.k_norms);
        i.turns = self.turns(a.rope_dims, theta);
        heads_of(&mut i, &a, self.schedule.shard.ranks);
        (i.v_first, i.rows, i.layers) = (v_first as i32, rows as i32, layers as i32);
        i.qkv_rows = packed_rows(&tiles) as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    /// Where the sum after layer `l` of the target puts what the drafter sees.
    pub(super) fn tap(&self, i: &mut Instr, l: usize) {
        let Some(draft) = &self.formats.draft else {
            return;
        };
        let Some(n) = draft.config.taps.iter().position(|&tap| tap == l) else {
            return;
        };
        let shard = self.schedule.shard;
        let own = tap_columns(&draft.config, shard.rank, shard.ranks);
        i.taps = self.draft.taps;
        i.tap_columns = own.len() as i32;
        i.tap_column = (n * tap_stride(self.config.hidden)) as i32 - own.start as i32;
    }
}

/// Rows of packed pages, padding included.
fn packed_rows(tiles: &Tiles) -> usize {
    tiles.tiles * tiles.strips * STRIP_ROWS
}

fn heads_of(i: &mut Instr, a: &AttentionConfig, ranks: usize) {
    (i.heads, i.kv_heads) = ((a.heads / ranks) as i32, (a.kv_heads / ranks) as i32);
    (i.qk_dim, i.v_dim) = (a.qk_dim as i32, a.v_dim as i32);
    let (key, value) = cached_row(a, Kv::Bf16);
    (i.key_stride, i.value_stride) = (key as i32, value as i32);
    i.rope_dims = a.rope_dims as i32;
    i.value_scale = a.value_scale;
}
