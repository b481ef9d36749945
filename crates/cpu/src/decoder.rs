//! The CPU Decoder: sequences, their cache, and steps that draft, verify, accept and commit.
//!
//! Owns the batch of a step: the rows of all its sequences go through every weight together, in
//! groups of at most `ROWS_MAX` rows. Invariants: see `model::decoder`; a group's order changes no
//! result; every buffer is kept from step to step.

mod context;
mod step;
mod tap;

use std::ops::Range;

use model::config::Config;
use model::decoder::{
    DecodeError, Decoder, Fork, KvUsage, Limits, SequenceConfig, SequenceId, StepOutput, StepPlan,
    Tap, TokenId,
};
use model::draft::{Draft, DraftSource};
use model::heartbeat::Heartbeat;
use model::sampler::{Proposals, Sampler, SamplerScratch};
use model::weights::Weights;

use crate::attention::AttentionScratch;
use crate::draft::PackedDraft;
use crate::kv::{KvCache, KvSequence, LayerShape, PAGE};
use crate::network::{Batch, BatchRow, DamagedWeight, Network, Packer};
use crate::pool::{Pool, physical_cores};
use crate::scratch::{Scratch, Widths};
use context::DEFERRED_ROWS;
use step::{check_position, clip, gather};

/// Rows of one forward pass: beyond this the weights are read again.
const ROWS_MAX: usize = 256;
/// Rows of a prefill pass: enough that arithmetic, not memory, sets the time.
const PREFILL_ROWS: usize = 64;
/// Rows whose logits are kept at once when they are tapped.
const TAP_ROWS: usize = 16;

/// How to set up a decoder.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// Threads, the caller's included; `None` takes all physical cores.
    pub threads: Option<usize>,
    /// Sequences open at once.
    pub sequences: u32,
    /// Tokens that the paged cache holds, all sequences together; `None` is what `sequences` full
    /// contexts need, but at most half of the memory.
    pub kv_tokens: Option<usize>,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            threads: None,
            sequences: 64,
            kv_tokens: None,
        }
    }
}

struct Sequence {
    id: SequenceId,
    /// All but the last are in the cache.
    tokens: Vec<TokenId>,
    computed: usize,
    kv: KvSequence,
    sampler: Sampler,
    /// Taps of the last rows, which the drafter's context still lacks: `[rows, taps, hidden]`.
    pending: Vec<f32>,
}

/// A model on the CPU.
pub struct CpuDecoder {
    pool: Pool,
    network: Network,
    drafter: Option<PackedDraft>,
    /// Drafts in the drafter's place, and the widest step with them.
    source: Option<(Box<dyn DraftSource>, u32)>,
    cache: KvCache,
    sequences: Vec<Sequence>,
    next_id: u32,
    limits: Limits,
    scratch: Scratch,
    threads: Vec<std::sync::Mutex<AttentionScratch>>,
    work: Work,
}

/// Lists of a step, kept for their memory.
#[derive(Default)]
struct Work {
    rows: Vec<BatchRow>,
    /// The block of each row while drafting.
    blocks: Vec<Range<usize>>,
    /// Rows whose logits are wanted.
    wanted: Vec<u32>,
    /// Rows of the taps that stay.
    taken: Vec<u32>,
    /// Index in `CpuDecoder::sequences`, and width, of each sequence of the group.
    group: Vec<(usize, usize)>,
    drafts: Vec<TokenId>,
    proposals: Vec<Proposals>,
    sampler: SamplerScratch,
}

impl CpuDecoder {
    /// Packs the weights; the checkpoint may be closed afterwards.
    ///
    /// # Errors
    /// [`DamagedWeight`].
    pub fn new(
        config: &Config,
        weights: &Weights<'_>,
        draft: Option<(&Draft, &model::draft::DraftWeights<'_>)>,
        options: CpuOptions,
    ) -> Result<Self, DamagedWeight> {
        let threads = options.threads.unwrap_or_else(physical_cores).max(1);
        let pool = Pool::new(threads);
        let took = |bytes| weights.took(bytes);
        let packer = Packer::new(&pool, &took);
        let mut network = Network::new(config, weights, &packer)?;
        let mut widths = Widths::of(config);
        let layers = cache_layers(config, draft.map(|(draft, _)| draft));
        let drafter = match draft {
            Some((draft, weights)) => {
                PackedDraft::widen(&draft.config, &mut widths);
                Some(PackedDraft::new(draft, weights, &mut network, &packer)?)
            }
            None => None,
        };
        let pages = pages(config, &layers, &options);
        let mut scratch = Scratch::new(widths, DEFERRED_ROWS);
        scratch.reach_taps(DEFERRED_ROWS * drafter.as_ref().map_or(0, |d| d.config.taps.len()));
        Ok(Self {
            limits: Limits {
                vocab_size: config.vocab_size as u32,
                context_tokens: config.context_tokens as u32,
                sequences_max: options.sequences,
                width_max: drafter.as_ref().map_or(1, |d| d.config.block_size),
                page_tokens: PAGE as u32,
                pages: pages as u32,
            },
            cache: KvCache::new(&layers, pages),
            scratch,
            threads: (0..threads).map(|_| Default::default()).collect(),
            sequences: Vec::new(),
            next_id: 0,
            source: None,
            work: Work::default(),
            pool,
            network,
            drafter,
        })
    }

    /// Takes drafts from `source`, in steps of up to `width_max` rows, instead of from a drafter.
    #[must_use]
    pub fn with_drafts(mut self, source: Box<dyn DraftSource>, width_max: u32) -> Self {
        self.source = Some((source, width_max));
        self.limits.width_max = width_max;
        self
    }

    fn find(&self, id: SequenceId) -> Result<usize, DecodeError> {
        self.sequences
            .iter()
            .position(|s| s.id == id)
            .ok_or(DecodeError::UnknownSequence(id))
    }

    fn add(&mut self, tokens: Vec<TokenId>, computed: usize, kv: KvSequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.sequences.push(Sequence {
            id,
            tokens,
            computed,
            kv,
            sampler: Sampler::greedy(self.limits.vocab_size),
            // As the tokens: no allocation in a step, memory when touched.
            pending: Vec::with_capacity(DEFERRED_ROWS * self.tap_columns()),
        });
        id
    }

    fn check_free(&self) -> Result<(), DecodeError> {
        let (open, max) = (self.sequences.len() as u32, self.limits.sequences_max);
        match open < max {
            true => Ok(()),
            false => Err(DecodeError::NoFreeSequence { open, max }),
        }
    }

    /// Appends `tokens` after checking that they fit, and makes room in the cache for all of them.
    fn append(&mut self, index: usize, tokens: &[TokenId]) -> Result<(), DecodeError> {
        let (limits, sequence) = (self.limits, &mut self.sequences[index]);
        let wanted = sequence.tokens.len() as u64 + tokens.len() as u64;
        if wanted > u64::from(limits.context_tokens) {
            return Err(DecodeError::ContextFull {
                wanted,
                limit: limits.context_tokens,
            });
        }
        if let Some(i) = tokens.iter().position(|&t| t >= limits.vocab_size) {
            return Err(DecodeError::TokenRange {
                token: tokens[i],
                index: i,
                vocab_size: limits.vocab_size,
            });
        }
        let end = wanted as usize;
        self.cache
            .reserve(&mut sequence.kv, sequence.computed, end)?;
        let start = sequence.tokens.len() as u32;
        sequence.sampler.append(start, tokens);
        sequence.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Computes rows of one sequence up to `end`, `chunk` at a time; `after` sees each chunk's
    /// scratch with the position of its first row.
    fn compute(
        &mut self,
        index: usize,
        end: usize,
        chunk: usize,
        taps: Option<&[usize]>,
        mut after: impl FnMut(&mut Self, usize, usize) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        while self.sequences[index].computed < end {
            let sequence = &self.sequences[index];
            let first = sequence.computed;
            let rows = (end - first).min(chunk);
            self.work.rows.clear();
            self.work.group.clear();
            self.work.group.push((index, rows));
            let tokens = &sequence.tokens[first..first + rows];
            self.work
                .rows
                .extend(tokens.iter().enumerate().map(|(i, &token)| BatchRow {
                    sequence: 0,
                    position: first + i,
                    token,
                }));
            self.forward(taps, false);
            // Before the drafter's context, whose computation takes the scratch.
            after(self, first, rows)?;
            if taps.is_none() {
                self.work.taken.clear();
                self.work.taken.extend(0..rows as u32);
                self.append_context();
            }
            let sequence = &mut self.sequences[index];
            sequence.computed = first + rows;
            self.cache.advance(&mut sequence.kv, first + rows, true);
        }
        Ok(())
    }

    /// Runs the target over `work.rows`; with `logits`, for all of them. Returns the weight bytes.
    fn forward(&mut self, taps: Option<&[usize]>, logits: bool) -> u64 {
        let rows = self.work.rows.len();
        let vocab = self.network.config.vocab_size;
        self.scratch
            .reach(rows, if logits { rows * vocab } else { 0 });
        let last = self.work.rows.iter().map(|row| row.position + 1).max();
        for table in &mut self.network.ropes {
            table.reach(last.unwrap_or(0));
        }
        let draft_taps = self.drafter.as_ref().map_or(&[][..], |d| &d.config.taps);
        let taps = taps.unwrap_or(draft_taps);
        self.scratch.reach_taps(rows * taps.len());
        let sequences = gather(&self.sequences, &self.work.group);
        let batch = Batch {
            rows: &self.work.rows,
            sequences: &sequences,
            cache: &self.cache,
            scratch: &self.scratch,
            taps,
        };
        let bytes = std::sync::atomic::AtomicU64::new(0);
        self.pool.run(&|team| {
            let mut attention = self.threads[team.thread].lock().expect("its own");
            let read = self.network.forward(team, &batch, &mut attention);
            if logits {
                self.network
                    .logits(team, &self.scratch, self.scratch.row_list(rows));
            }
            if team.thread == 0 {
                let head = if logits {
                    self.network.head().bytes() as u64
                } else {
                    0
                };
                bytes.store(read + head, std::sync::atomic::Ordering::Relaxed);
            }
        });
        bytes.into_inner()
    }

    /// Logits of rows of the last forward pass, into the scratch.
    fn logits(&mut self, rows: &[u32]) {
        let vocab = self.network.config.vocab_size;
        self.scratch.reach(0, rows.len() * vocab);
        self.pool
            .run(&|team| self.network.logits(team, &self.scratch, rows));
    }
}

/// Bytes of the cache with all its pages and a ring for every sequence, before anything is loaded.
#[must_use]
pub fn cache_bytes(config: &Config, draft: Option<&Draft>, options: CpuOptions) -> u64 {
    let layers = cache_layers(config, draft);
    let (page, ring) = KvCache::new(&layers, 0).bytes();
    let pages = pages(config, &layers, &options) as u64;
    pages * page as u64 + u64::from(options.sequences) * ring as u64
}

fn cache_layers(config: &Config, draft: Option<&Draft>) -> Vec<LayerShape> {
    let own = config.layers.iter().map(shape);
    let drafter = draft.map(|draft| PackedDraft::cache_layers(&draft.config));
    own.chain(drafter.into_iter().flatten()).collect()
}

fn shape(layer: &model::config::LayerConfig) -> LayerShape {
    LayerShape {
        kv_heads: layer.attention.kv_heads,
        qk_dim: layer.attention.qk_dim,
        v_dim: layer.attention.v_dim,
        window: layer.attention.window,
    }
}

/// Pages of the cache.
fn pages(config: &Config, layers: &[LayerShape], options: &CpuOptions) -> usize {
    let full = layers.iter().filter(|layer| layer.window.is_none());
    let token_bytes: usize = full
        .map(|layer| layer.kv_heads * (layer.qk_dim + layer.v_dim) * 4)
        .sum();
    // Each sequence may hold a copy of a shared page besides its own.
    let per_sequence = config.context_tokens.div_ceil(PAGE) + 1;
    let wanted = match options.kv_tokens {
        Some(tokens) => tokens.div_ceil(PAGE).max(1),
        None => per_sequence.saturating_mul(options.sequences as usize),
    };
    let fits = (memory_bytes() / 2) / (token_bytes * PAGE).max(1) as u64;
    match options.kv_tokens {
        Some(_) => wanted,
        None => wanted.min(fits as usize).max(1),
    }
}

/// Physical memory.
fn memory_bytes() -> u64 {
    // SAFETY: sysconf reads no memory of ours.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    (pages.max(0) as u64).saturating_mul(size.max(0) as u64)
}

impl Decoder for CpuDecoder {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn watch(&mut self, heartbeat: &std::sync::Arc<Heartbeat>) {
        self.pool.watch(heartbeat);
    }

    fn kv_usage(&self) -> KvUsage {
        let (page, ring) = self.cache.bytes();
        let pages = self.cache.pages_used();
        KvUsage {
            pages_used: pages as u32,
            kv_bytes: (pages * page + self.sequences.len() * ring) as u64,
        }
    }

    fn open(&mut self) -> Result<SequenceId, DecodeError> {
        self.check_free()?;
        let kv = self.cache.open();
        // Room for all tokens, so that a step does not allocate; memory is taken when touched.
        let tokens = Vec::with_capacity(self.limits.context_tokens as usize);
        Ok(self.add(tokens, 0, kv))
    }

    fn configure(
        &mut self,
        sequence: SequenceId,
        config: SequenceConfig,
    ) -> Result<(), DecodeError> {
        let index = self.find(sequence)?;
        let sequence = &mut self.sequences[index];
        sequence.sampler = Sampler::new(config, self.limits.vocab_size, &sequence.tokens);
        Ok(())
    }

    fn fork(&mut self, of: SequenceId, position: u32) -> Result<Fork, DecodeError> {
        self.check_free()?;
        let index = self.find(of)?;
        self.catch_up_one(index);
        let parent = &mut self.sequences[index];
        check_position(position, parent.tokens.len())?;
        let rows = (position as usize).saturating_sub(1);
        let computed = self.cache.restorable(&parent.kv, rows);
        let kv = self.cache.fork(&mut parent.kv, computed);
        let mut tokens = Vec::with_capacity(self.limits.context_tokens as usize);
        tokens.extend_from_slice(&parent.tokens[..(computed + 1).min(position as usize)]);
        let position = tokens.len() as u32;
        let sequence = self.add(tokens, computed, kv);
        Ok(Fork { sequence, position })
    }

    fn prefill(&mut self, sequence: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        let index = self.find(sequence)?;
        self.catch_up_one(index);
        self.append(index, tokens)?;
        let end = self.sequences[index].tokens.len().saturating_sub(1);
        self.compute(index, end, PREFILL_ROWS, None, |_, _, _| Ok(()))
    }

    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError> {
        out.reset(plan.sequences.len());
        self.check_plan(plan)?;
        let mut first = 0;
        while first < plan.sequences.len() {
            self.work.group.clear();
            let (mut last, mut rows) = (first, 0);
            while let Some(step) = plan.sequences.get(last) {
                let index = self.find(step.sequence)?;
                let width = clip(step.width, self.limits, self.sequences[index].tokens.len());
                if rows + width > ROWS_MAX && last > first {
                    break;
                }
                self.work.group.push((index, width));
                rows += width;
                last += 1;
            }
            let outputs = &mut out.sequences[first..last];
            let bytes = self.step_group(&plan.sequences[first..last], outputs, &mut out.timing)?;
            out.weight_bytes += bytes;
            first = last;
        }
        Ok(())
    }

    fn rewind(&mut self, sequence: SequenceId, position: u32) -> Result<(), DecodeError> {
        let index = self.find(sequence)?;
        self.catch_up_one(index);
        let held = &mut self.sequences[index];
        check_position(position, held.tokens.len())?;
        let computed = held.computed.min((position as usize).saturating_sub(1));
        if computed > 0 && !self.cache.in_ring(&held.kv, computed) {
            return Err(DecodeError::Position {
                position,
                tokens: held.tokens.len() as u32,
                why: "a sliding layer has let its window go; fork instead",
            });
        }
        held.tokens.truncate(position as usize);
        held.computed = computed;
        self.cache.truncate(&mut held.kv, computed);
        held.sampler.rewind(&held.tokens);
        Ok(())
    }

    fn close(&mut self, sequence: SequenceId) {
        if let Ok(index) = self.find(sequence) {
            let mut held = self.sequences.swap_remove(index);
            self.cache.truncate(&mut held.kv, 0);
        }
    }

    fn tap(
        &mut self,
        sequence: SequenceId,
        tokens: &[TokenId],
        tap: Tap<'_>,
    ) -> Result<(), DecodeError> {
        let index = self.find(sequence)?;
        self.catch_up_one(index);
        match tap {
            Tap::Logits(sink) => self.tap_logits(index, tokens, sink)?,
            Tap::Hidden { layers, sink } => {
                let layers: Vec<usize> = layers.iter().map(|&l| l as usize).collect();
                self.tap_hidden(index, tokens, &layers, sink)?;
            }
            Tap::Draft { width, sink } => return self.tap_draft(index, tokens, width, sink),
        }
        let held = &mut self.sequences[index];
        held.computed = held.tokens.len().saturating_sub(1);
        Ok(())
    }
}
