//! The reference Decoder: simple and obviously right. Every row is computed alone, all positions of
//! every sequence are kept, there are no pages and no limits but memory.

use std::collections::BTreeMap;

use super::draft_network::DraftNetwork;
use super::network::{Cache, Network};
use super::sample::confidence;
use crate::config::Config;
use crate::decoder::{
    DecodeError, Decoder, Fork, KvUsage, Limits, SequenceConfig, SequenceId, SequenceOutput,
    SequenceStep, StepOutput, StepPlan, Tap, TokenId,
};
use crate::draft::DraftSource;
use crate::sampler::{Block, Chance, Proposals, Sampler, SamplerScratch};
use crate::weights::Weights;

/// Sequences that may be open at once.
const SEQUENCES_MAX: usize = 1024;

/// The definition of a decoder.
pub struct ReferenceDecoder {
    network: Network,
    drafter: Option<DraftNetwork>,
    /// Drafts in the drafter's place, and the widest step with them.
    source: Option<(Box<dyn DraftSource>, u32)>,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u32,
    scratch: SamplerScratch,
}

struct Sequence {
    /// All but the last are in the caches.
    tokens: Vec<TokenId>,
    computed: usize,
    cache: Cache,
    draft_cache: Cache,
    sampler: Sampler,
}

impl ReferenceDecoder {
    /// Decodes the weights to f32. A drafter has been checked against the target when it was loaded.
    #[must_use]
    pub fn new(config: &Config, weights: &Weights<'_>, drafter: Option<DraftNetwork>) -> Self {
        Self {
            network: Network::new(config, weights),
            drafter,
            source: None,
            sequences: BTreeMap::new(),
            next_id: 0,
            scratch: SamplerScratch::default(),
        }
    }

    /// Takes drafts from `source`, in steps of up to `width_max` rows, instead of from a drafter.
    #[must_use]
    pub fn with_drafts(mut self, source: Box<dyn DraftSource>, width_max: u32) -> Self {
        self.source = Some((source, width_max));
        self
    }

    fn sequence(&mut self, id: SequenceId) -> Result<&mut Sequence, DecodeError> {
        self.sequences
            .get_mut(&id)
            .ok_or(DecodeError::UnknownSequence(id))
    }

    fn add(&mut self, sequence: Sequence) -> Result<SequenceId, DecodeError> {
        if self.sequences.len() >= SEQUENCES_MAX {
            return Err(DecodeError::NoFreeSequence {
                open: self.sequences.len() as u32,
                max: SEQUENCES_MAX as u32,
            });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Checks that `tokens` can follow, before anything changes.
    fn check(&mut self, id: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        let limits = self.limits();
        let wanted = self.sequence(id)?.tokens.len() as u64 + tokens.len() as u64;
        if wanted > u64::from(limits.context_tokens) {
            return Err(DecodeError::ContextFull {
                wanted,
                limit: limits.context_tokens,
            });
        }
        match tokens.iter().position(|&t| t >= limits.vocab_size) {
            Some(index) => Err(DecodeError::TokenRange {
                token: tokens[index],
                index,
                vocab_size: limits.vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// Appends tokens and computes the rows up to `tokens.len() - behind`, handing each residual
    /// row and its tap rows to `see(position, layer or none, row)`.
    fn append(
        &mut self,
        id: SequenceId,
        tokens: &[TokenId],
        behind: usize,
        mut see: impl FnMut(&Network, u32, Option<usize>, &[f32]) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        self.check(id, tokens)?;
        let sequence = self.sequences.get_mut(&id).expect("checked above");
        sequence
            .sampler
            .append(sequence.tokens.len() as u32, tokens);
        sequence.tokens.extend_from_slice(tokens);
        while sequence.computed + behind < sequence.tokens.len() {
            let position = sequence.computed as u32;
            let mut seen = Ok(());
            let row = sequence.compute(&self.network, self.drafter.as_ref(), |layer, row| {
                if seen.is_ok() {
                    seen = see(&self.network, position, Some(layer), row);
                }
            });
            seen?;
            see(&self.network, position, None, &row)?;
        }
        Ok(())
    }

    fn step_sequence(
        &mut self,
        step: &SequenceStep,
        out: &mut SequenceOutput,
    ) -> Result<(), DecodeError> {
        let limits = self.limits();
        let unknown = DecodeError::UnknownSequence(step.sequence);
        let sequence = self.sequences.get_mut(&step.sequence).ok_or(unknown)?;
        let anchor = sequence.computed;
        let room = limits.context_tokens as usize - sequence.tokens.len();
        let width = (step.width.clamp(1, limits.width_max) as usize).min(room.max(1));
        let mut proposals = Proposals::default();
        if let Some((source, _)) = self.source.as_mut().filter(|_| width > 1) {
            let mut drafts = Vec::new();
            source.propose(&sequence.tokens, width - 1, &mut drafts);
            drafts.into_iter().for_each(|draft| proposals.push(draft));
        } else if let Some(drafter) = self.drafter.as_ref().filter(|_| width > 1) {
            let block = drafter.block_size().min(room as u32).max(width as u32);
            let logits = sequence.draft(&self.network, drafter, block);
            let mut chance = Chance::default();
            for (slot, logits) in (1..width as u32).zip(&logits) {
                let largest = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
                if chance.next(confidence(logits, largest)) < step.chance_min {
                    break;
                }
                let index = anchor as u32 + slot;
                sequence.sampler.propose(index, logits, &mut proposals)?;
            }
        }
        let drafted = proposals.tokens().to_vec();
        sequence.tokens.extend_from_slice(&drafted);
        let mut logits = Vec::new();
        while sequence.computed < sequence.tokens.len() {
            let row = sequence.compute(&self.network, self.drafter.as_ref(), |_, _| ());
            logits.extend(self.network.logits(&row));
        }
        sequence.tokens.truncate(anchor + 1);
        let block = Block {
            position: anchor as u32,
            logits: &mut logits,
            proposals: &proposals,
            simulate_accepted: step.simulate_accepted,
        };
        out.sequence = Some(step.sequence);
        sequence.sampler.accept(block, &mut self.scratch, out)?;
        sequence.tokens.extend_from_slice(&out.tokens);
        sequence.cut(
            &self.network,
            self.drafter.as_ref(),
            anchor + out.tokens.len(),
        );
        Ok(())
    }
}

impl Sequence {
    /// Computes the next row: target, and the drafter's context when there is one.
    fn compute(
        &mut self,
        network: &Network,
        drafter: Option<&DraftNetwork>,
        mut after: impl FnMut(usize, &[f32]),
    ) -> Vec<f32> {
        let position = self.computed as u32;
        let token = self.tokens[self.computed];
        let mut features = Vec::new();
        let row = network.forward(token, position, &mut self.cache, |layer, row| {
            if drafter.is_some_and(|d| d.taps().contains(&layer)) {
                features.extend_from_slice(row);
            }
            after(layer, row);
        });
        if let Some(drafter) = drafter {
            drafter.append_context(&features, position, &mut self.draft_cache);
        }
        self.computed += 1;
        row
    }

    /// Drafter logits of slots `1..width`, from the last token as anchor.
    fn draft(&self, network: &Network, drafter: &DraftNetwork, width: u32) -> Vec<Vec<f32>> {
        let anchor = *self.tokens.last().expect("a stepped sequence has tokens");
        drafter.block(
            network,
            anchor,
            self.computed as u32,
            width,
            &self.draft_cache,
        )
    }

    /// Forgets the rows from `computed` on.
    fn cut(&mut self, network: &Network, drafter: Option<&DraftNetwork>, computed: usize) {
        self.computed = self.computed.min(computed);
        network.truncate(&mut self.cache, self.computed);
        if let Some(drafter) = drafter {
            drafter.truncate(&mut self.draft_cache, self.computed);
        }
    }
}

impl Decoder for ReferenceDecoder {
    fn limits(&self) -> Limits {
        let config = self.network.config();
        Limits {
            vocab_size: config.vocab_size as u32,
            context_tokens: config.context_tokens as u32,
            sequences_max: SEQUENCES_MAX as u32,
            width_max: match &self.source {
                Some((_, width_max)) => *width_max,
                None => self.drafter.as_ref().map_or(1, DraftNetwork::block_size),
            },
            page_tokens: 1,
            pages: u32::MAX,
        }
    }

    fn kv_usage(&self) -> KvUsage {
        let rows = self.sequences.values().map(|s| s.computed as u32).sum();
        let floats: usize = self
            .sequences
            .values()
            .flat_map(|s| s.cache.layers.iter().chain(&s.draft_cache.layers))
            .map(|layer| layer.keys.len() + layer.values.len())
            .sum();
        KvUsage {
            pages_used: rows,
            kv_bytes: floats as u64 * 4,
        }
    }

    fn open(&mut self) -> Result<SequenceId, DecodeError> {
        let sequence = Sequence {
            tokens: Vec::new(),
            computed: 0,
            cache: self.network.empty_cache(),
            draft_cache: self
                .drafter
                .as_ref()
                .map_or_else(Cache::default, DraftNetwork::empty_cache),
            sampler: Sampler::greedy(self.limits().vocab_size),
        };
        self.add(sequence)
    }

    fn configure(
        &mut self,
        sequence: SequenceId,
        config: SequenceConfig,
    ) -> Result<(), DecodeError> {
        let vocab_size = self.limits().vocab_size;
        let sequence = self.sequence(sequence)?;
        sequence.sampler = Sampler::new(config, vocab_size, &sequence.tokens);
        Ok(())
    }

    fn fork(&mut self, of: SequenceId, position: u32) -> Result<Fork, DecodeError> {
        let vocab_size = self.limits().vocab_size;
        let parent = self.sequence(of)?;
        check_position(position, parent.tokens.len())?;
        let child = Sequence {
            tokens: parent.tokens[..position as usize].to_vec(),
            computed: parent.computed,
            cache: parent.cache.clone(),
            draft_cache: parent.draft_cache.clone(),
            sampler: Sampler::greedy(vocab_size),
        };
        let sequence = self.add(child)?;
        self.rewind(sequence, position)?;
        Ok(Fork { sequence, position })
    }

    fn prefill(&mut self, sequence: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        self.append(sequence, tokens, 1, |_, _, _, _| Ok(()))
    }

    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError> {
        out.reset(plan.sequences.len());
        for step in &plan.sequences {
            let limit = self.limits().context_tokens;
            match self.sequences.get(&step.sequence).map(|s| s.tokens.len()) {
                None | Some(0) => return Err(DecodeError::UnknownSequence(step.sequence)),
                Some(tokens) if tokens as u64 >= u64::from(limit) => {
                    let wanted = tokens as u64 + 1;
                    return Err(DecodeError::ContextFull { wanted, limit });
                }
                Some(_) => {}
            }
        }
        for (step, out) in plan.sequences.iter().zip(&mut out.sequences) {
            self.step_sequence(step, out)?;
        }
        Ok(())
    }

    fn rewind(&mut self, sequence: SequenceId, position: u32) -> Result<(), DecodeError> {
        let held = self
            .sequences
            .get_mut(&sequence)
            .ok_or(DecodeError::UnknownSequence(sequence))?;
        check_position(position, held.tokens.len())?;
        held.tokens.truncate(position as usize);
        let computed = (position as usize).saturating_sub(1);
        held.cut(&self.network, self.drafter.as_ref(), computed);
        held.sampler.rewind(&held.tokens);
        Ok(())
    }

    fn close(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn tap(
        &mut self,
        sequence: SequenceId,
        tokens: &[TokenId],
        tap: Tap<'_>,
    ) -> Result<(), DecodeError> {
        match tap {
            Tap::Logits(sink) => {
                self.append(sequence, tokens, 0, |network, position, layer, row| {
                    if layer.is_none() {
                        sink(position, &finite(network.logits(row), "logits", position)?);
                    }
                    Ok(())
                })?;
            }
            Tap::Hidden { layers, sink } => {
                self.append(sequence, tokens, 0, |_, position, layer, row| {
                    if let Some(i) =
                        layer.and_then(|l| layers.iter().position(|&x| x as usize == l))
                    {
                        sink(position, i, row);
                    }
                    Ok(())
                })?;
            }
            Tap::Draft { width, sink } => {
                self.prefill(sequence, tokens)?;
                let held = &self.sequences[&sequence];
                if let Some(drafter) = self.drafter.as_ref().filter(|_| !held.tokens.is_empty()) {
                    let rows = held.draft(&self.network, drafter, width);
                    for (slot, row) in (1..).zip(rows) {
                        let position = held.computed as u32 + slot;
                        sink(slot, &finite(row, "draft logits", position)?);
                    }
                }
            }
        }
        let held = self.sequences.get_mut(&sequence).expect("tapped above");
        let computed = held.tokens.len().saturating_sub(1);
        held.cut(&self.network, self.drafter.as_ref(), computed);
        Ok(())
    }
}

fn check_position(position: u32, tokens: usize) -> Result<(), DecodeError> {
    match position as usize <= tokens {
        true => Ok(()),
        false => Err(DecodeError::Position {
            position,
            tokens: tokens as u32,
            why: "beyond the end",
        }),
    }
}

fn finite(row: Vec<f32>, what: &'static str, position: u32) -> Result<Vec<f32>, DecodeError> {
    match row.iter().all(|x| x.is_finite()) {
        true => Ok(row),
        false => Err(DecodeError::NotFinite { what, position }),
    }
}
