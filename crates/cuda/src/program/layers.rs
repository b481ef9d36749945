//! One instruction of the resident kernel for each op of the schedule: sizes, places and what it
//! waits for. Invariant: activations of a product fit in shared memory.

use model::config::FfnConfig;

use super::build::{Builder, cached_row, page_blocks, split, tile_positions, tiles_for};
use super::{HEAD_COLUMNS, What, inner_part, part, qkv_rows, wrong};
use crate::CudaError;
use crate::layout::{BLOCK_COLUMNS, Instr, PAGE_BYTES, TOKENS};
use crate::schedule::Op;
use crate::strips::{Format, STRIP_ROWS, Tiles};

impl Builder<'_> {
    pub(super) fn embed(&mut self) {
        let mut i = self.instr(Op::Embed);
        self.table(&mut i);
        i.weight = self.norm(What::InputNorm, 0);
        self.residual(&mut i);
        self.out.instructions.push(i);
    }

    /// Embedding rows, placed by the first who asks.
    pub(super) fn table(&mut self, i: &mut Instr) {
        let bytes = if self.formats.embed_bf16 { 2 } else { 4 };
        let size = self.config.vocab_size * self.config.hidden * bytes;
        let at = self.table;
        i.table = at.unwrap_or_else(|| self.piece(What::Embed, 0, size, None));
        self.table = Some(i.table);
        i.format = match self.formats.embed_bf16 {
            true => Format::Bf16.code(),
            false => Format::F32.code(),
        };
    }

    /// What the sum just made gives to the drafter.
    pub(super) fn tap_last(&mut self, l: usize) {
        if let Some(mut i) = self.out.instructions.pop() {
            self.tap(&mut i, l);
            self.out.instructions.push(i);
        }
    }

    pub(super) fn residual(&self, i: &mut Instr) {
        i.out = self.shared.h;
        i.squares = self.shared.squares;
        i.residual = self.shared.residual;
    }

    pub(super) fn qkv(&mut self, l: usize) -> Result<(), CudaError> {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let (_, _, rows) = qkv_rows(a, shard.ranks);
        let format = self.formats.layers[l].qkv;
        let tiles = self.tiles(format, rows, self.config.hidden);
        let mut i = self.instr(Op::Qkv);
        self.pages(&mut i, &[What::Qkv], l, tiles);
        i.stage = 1;
        self.staged(&mut i, TOKENS)?;
        (i.x, i.squares, i.out) = (self.shared.h, self.shared.squares, self.shared.qkv);
        self.out.instructions.push(i);
        Ok(())
    }

    pub(super) fn attention(&mut self, l: usize) {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let (heads, kv_heads) = (a.heads / shard.ranks, a.kv_heads / shard.ranks);
        let kv = self.out.numbers.kv;
        let (k_first, v_first, rows) = qkv_rows(a, shard.ranks);
        let height = self.tiles(self.formats.layers[l].qkv, rows, 1).strips * STRIP_ROWS;
        let mut i = self.instr(Op::Attention);
        (i.x, i.out) = (self.shared.qkv, self.shared.heads);
        let (key, value) = cached_row(a, kv);
        let positions = kv_heads * self.out.context;
        i.keys = self.buffer(positions * key);
        i.values = self.buffer(positions * value);
        self.out.kv_bytes += positions * (key + value);
        (i.key_stride, i.value_stride) = (key as i32, value as i32);
        if a.sinks {
            i.sinks = self.piece(What::Sinks, l, heads * 4, None);
        }
        i.turns = self.turns(a.rope_dims, a.rope_theta);
        (i.heads, i.kv_heads) = (heads as i32, kv_heads as i32);
        (i.qk_dim, i.v_dim, i.rope_dims) = (a.qk_dim as i32, a.v_dim as i32, a.rope_dims as i32);
        i.window = a.window.map_or(-1, |w| w as i32);
        (i.k_first, i.v_first) = (k_first as i32, v_first as i32);
        i.qkv_rows = rows.next_multiple_of(height) as i32;
        let columns = heads * a.v_dim.next_multiple_of(HEAD_COLUMNS);
        i.columns_padded = columns.next_multiple_of(BLOCK_COLUMNS) as i32;
        i.scaling = 1.0 / (a.qk_dim as f32).sqrt();
        i.value_scale = a.value_scale;
        i.parts = split(a, shard, kv).parts as i32;
        i.rows = tile_positions(kv) as i32;
        (i.residual, i.bests) = (self.shared.parts, self.shared.part_counters);
        self.out.instructions.push(i);
    }

    pub(super) fn o_proj(&mut self, l: usize) -> Result<(), CudaError> {
        let a = &self.config.layers[l].attention;
        let shard = self.schedule.shard;
        let columns = a.heads / shard.ranks * a.v_dim.next_multiple_of(HEAD_COLUMNS);
        let format = self.formats.layers[l].o;
        let tiles = self.tiles(format, self.config.hidden, columns);
        let mut i = self.instr(Op::OProj);
        self.pages(&mut i, &[What::O], l, tiles);
        (i.x, i.stage) = (self.shared.heads, 1);
        self.staged(&mut i, TOKENS)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    pub(super) fn all_reduce(&mut self, weight: u64) {
        let mut i = self.instr(Op::AllReduce);
        self.residual(&mut i);
        i.weight = weight;
        i.index = self.sum as i32;
        i.wait = -1; // the words say themselves when they are there
        self.sum += 1;
        self.out.instructions.push(i);
    }

    pub(super) fn router(&mut self, l: usize, experts: usize) -> Result<(), CudaError> {
        let format = self.formats.layers[l].router;
        let mut tiles = tiles_for(format, experts, self.config.hidden, usize::MAX);
        (tiles.strips, tiles.tiles) = (1, experts.div_ceil(STRIP_ROWS));
        let mut i = self.instr(Op::Router);
        self.pages(&mut i, &[What::Router], l, tiles);
        let pages = tiles.blocks.div_ceil(page_blocks(&tiles));
        i.parts = (self.schedule.shard.ctas / tiles.tiles).clamp(1, pages) as i32;
        (i.x, i.out, i.stage) = (self.shared.h, self.shared.router, 1);
        self.staged(&mut i, TOKENS)?;
        self.routed = (tiles.tiles * STRIP_ROWS, i.parts as usize);
        self.out.instructions.push(i);
        Ok(())
    }

    /// Tiles of 32 inner columns: gate and up rows in four strips.
    pub(super) fn gate_up_tiles(&self, format: Format, inner: usize) -> Result<Tiles, CudaError> {
        if 4 * format.strip_bytes() > PAGE_BYTES {
            return wrong("gate and up weights", "at most 2 bytes each".into(), "f32");
        }
        Ok(Tiles {
            format,
            tiles: inner.div_ceil(32),
            strips: 4,
            blocks: self.config.hidden.div_ceil(BLOCK_COLUMNS),
        })
    }

    pub(super) fn gate_up(&mut self, l: usize) -> Result<(), CudaError> {
        let (shard, formats) = (self.schedule.shard, self.formats.layers[l]);
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
        let tiles = self.gate_up_tiles(formats.gate_up, of.len())?;
        let whats: Vec<What> = (0..experts).map(What::GateUp).collect();
        self.pages(&mut i, &whats, l, tiles);
        if i.experts > 0 {
            i.bias = self.piece(What::Bias, l, experts * 4, None);
            i.logits = self.shared.router;
            (i.logit_rows, i.logit_parts) = (self.routed.0 as i32, self.routed.1 as i32);
        }
        self.staged(&mut i, TOKENS)?;
        (i.x, i.squares) = (self.shared.h, self.shared.squares);
        i.out = self.inner(&mut i, of.len());
        self.out.instructions.push(i);
        Ok(())
    }

    pub(super) fn down(&mut self, l: usize) -> Result<(), CudaError> {
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
        let tiles = self.tiles(formats.down, self.config.hidden, of.len());
        let whats: Vec<What> = (0..experts).map(What::Down).collect();
        self.pages(&mut i, &whats, l, tiles);
        i.stage = 1;
        i.x = self.inner(&mut i, of.len());
        let columns = i.pair_columns as usize;
        self.staged(&mut i, columns)?;
        i.index = self.sum as i32;
        self.out.instructions.push(i);
        Ok(())
    }

    pub(super) fn lm_head(&mut self) -> Result<(), CudaError> {
        let shard = self.schedule.shard;
        let of = part(self.config.vocab_size, shard.rank, shard.ranks);
        let tiles = self.tiles(self.formats.lm_head, of.len(), self.config.hidden);
        let mut i = self.instr(Op::LmHead);
        match self.head {
            Some(at) => self.shape(&mut i, at, tiles),
            None => self.pages(&mut i, &[What::LmHead], 0, tiles),
        }
        self.head = Some(i.pages);
        (i.x, i.squares, i.stage) = (self.shared.h, self.shared.squares, 1);
        (i.out, i.bests) = (self.shared.logits, self.shared.bests);
        self.staged(&mut i, TOKENS)?;
        (i.first_token, i.rows) = (of.start as i32, of.len() as i32);
        self.out.places.logit_rows = tiles.tiles * tiles.strips * STRIP_ROWS;
        self.out.instructions.push(i);
        Ok(())
    }

    pub(super) fn choose(&mut self) {
        let mut i = self.instr(Op::Choose);
        i.bests = self.shared.bests;
        i.index = self.sum as i32;
        self.sum += 1;
        self.out.instructions.push(i);
    }
}
