//! The drafter on a CPU: `model::reference::draft_network` over packed weights, its FP8 products
//! rounded to BF16: twice as fast, and no text can change, because the target judges every draft.
//!
//! Its layers' keys and values are further layers of the cache. Context rows are written for all
//! layers in one pass; a block writes its own keys and values at its positions, where the context
//! rows of the accepted tokens replace them after the verify.

use model::draft::{Draft, DraftConfig, DraftWeights, DraftWindow};

use crate::attention::AttentionScratch;
use crate::isa::Isa;
use crate::kv::LayerShape;
use crate::linear::linear;
use crate::network::{
    Batch, DamagedWeight, Network, PackedSwiglu, Packer, add_ffn, add_product, attend_rows,
    normalise, pack_heads, project, rope_index, run_experts,
};
use crate::panels::{PANEL, Panels};
use crate::pool::Team;
use crate::rms_norm::rms_norm;
use crate::scratch::Widths;

struct Projection {
    matrix: Panels,
    bias: Option<Vec<f32>>,
}

struct DraftLayer {
    window: DraftWindow,
    input_norm: Vec<f32>,
    /// Q, K, V.
    qkv: [Projection; 3],
    o: Projection,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    ffn: Vec<PackedSwiglu>,
}

/// A drafter, packed.
pub(crate) struct PackedDraft {
    pub config: DraftConfig,
    mask_embedding: Option<Vec<f32>>,
    fc: Panels,
    hidden_norm: Vec<f32>,
    layers: Vec<DraftLayer>,
    norm: Vec<f32>,
    rope: usize,
    context_rope: usize,
    /// Index of its first layer in the cache.
    first_layer: usize,
}

impl PackedDraft {
    pub(crate) fn new(
        draft: &Draft,
        weights: &DraftWeights<'_>,
        network: &mut Network,
        packer: &Packer<'_>,
    ) -> Result<Self, DamagedWeight> {
        let config = &draft.config;
        let a = &config.attention;
        let layers = weights.layers.iter().enumerate().map(|(i, weights)| {
            let prefix = format!("layers.{i}");
            let projection = |name: &str, p: &model::draft::weights::Projection<'_>| {
                Ok(Projection {
                    matrix: packer
                        .draft_matrix(|| format!("{prefix}.self_attn.{name}.weight"), &p.matrix)?,
                    bias: p.bias.clone(),
                })
            };
            Ok(DraftLayer {
                window: config.layers[i],
                input_norm: weights.input_norm.clone(),
                qkv: [
                    projection("q_proj", &weights.q)?,
                    projection("k_proj", &weights.k)?,
                    projection("v_proj", &weights.v)?,
                ],
                o: projection("o_proj", &weights.o)?,
                q_norm: weights.q_norm.clone(),
                k_norm: weights.k_norm.clone(),
                sinks: weights.sinks.clone(),
                post_norm: weights.post_norm.clone(),
                ffn: vec![
                    packer
                        .swiglu(&format!("{prefix}.mlp"), &weights.ffn)?
                        .for_drafts(),
                ],
            })
        });
        Ok(Self {
            fc: packer.draft_matrix(|| "fc.weight".into(), &weights.fc)?,
            hidden_norm: weights.hidden_norm.clone(),
            layers: layers.collect::<Result<_, _>>()?,
            norm: weights.norm.clone(),
            rope: rope_index(&mut network.ropes, a.rope_dims, a.rope_theta),
            context_rope: rope_index(&mut network.ropes, a.rope_dims, config.context_rope_theta),
            first_layer: network.config.layers.len(),
            mask_embedding: draft.mask_embedding.clone(),
            config: config.clone(),
        })
    }

    /// What its layers need of the cache. A block looks back `window - 1` positions.
    pub(crate) fn cache_layers(config: &DraftConfig) -> impl Iterator<Item = LayerShape> {
        let a = config.attention.clone();
        config
            .layers
            .clone()
            .into_iter()
            .map(move |window| LayerShape {
                kv_heads: a.kv_heads,
                qk_dim: a.qk_dim,
                v_dim: a.v_dim,
                window: match window {
                    DraftWindow::Full => None,
                    DraftWindow::Causal(w) | DraftWindow::Symmetric(w) => Some(w - 1),
                },
            })
    }

    /// Widens the scratch of the target.
    pub(crate) fn widen(config: &DraftConfig, widths: &mut Widths) {
        widths.attention(&config.attention);
        widths.ffn(1, 1, config.intermediate);
        widths.taps = config.taps.len() * config.hidden;
        let a = &config.attention;
        let context = config.layers.len() * a.kv_heads * (a.qk_dim + a.v_dim);
        widths.projected = widths.projected.max(context);
        widths.heads = widths.heads.max(widths.taps);
    }

    /// Writes the context of the batch's rows from `scratch.taps`; `taken[i]` is the row of the taps
    /// that belongs to `batch.rows[i]`.
    pub(crate) fn append_context(
        &self,
        network: &Network,
        team: Team<'_>,
        batch: &Batch<'_>,
        taken: &[u32],
    ) {
        let (config, scratch) = (&self.config, batch.scratch);
        let (hidden, columns) = (config.hidden, config.taps.len() * config.hidden);
        let rows = scratch.row_list(batch.rows.len());
        for r in team.share(rows.len()) {
            let at = taken[r] as usize * columns;
            // SAFETY: taps are complete; each thread has its own rows.
            unsafe {
                scratch
                    .heads
                    .set(network.isa, r, scratch.taps.read(at..at + columns))
            };
        }
        team.barrier();
        // SAFETY: complete since the barrier; each thread has its own panels of `x`.
        unsafe {
            let panels = team.share(self.fc.panels());
            linear(
                network.isa,
                &self.fc,
                panels,
                &scratch.heads,
                rows,
                |r, panel, values| {
                    let count = PANEL.min(hidden - panel * PANEL);
                    let at = r * hidden + panel * PANEL;
                    scratch
                        .x
                        .write(at..at + count)
                        .copy_from_slice(&values[..count]);
                },
            );
        }
        team.barrier();
        normalise(
            team,
            network.isa,
            scratch,
            rows,
            &self.hidden_norm,
            config.eps,
            hidden,
        );
        team.barrier();
        let all = self.layers.iter().flat_map(|layer| &layer.qkv[1..]);
        let all = all.map(|p| (&p.matrix, p.bias.as_deref()));
        project(team, network.isa, scratch, all, rows);
        team.barrier();
        let a = &config.attention;
        let (k, v) = (a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim);
        let width = self.layers.len() * (k + v);
        for r in team.share(rows.len()) {
            for (l, layer) in self.layers.iter().enumerate() {
                let at = r * width + l * (k + v);
                // SAFETY: complete since the barrier; each thread has its own rows.
                let both = unsafe { scratch.projected.write(at..at + k + v) };
                let (key, value) = both.split_at_mut(k);
                self.store(network, self.context_rope, layer, l, batch, r, key, value);
            }
        }
        team.barrier();
    }

    /// Norm, rotation and scale of one key and value row, into the cache.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &self,
        network: &Network,
        rope: usize,
        layer: &DraftLayer,
        index: usize,
        batch: &Batch<'_>,
        r: usize,
        key: &mut [f32],
        value: &mut [f32],
    ) {
        let (a, row) = (&self.config.attention, batch.rows[r]);
        // SAFETY: the network's instruction set is the machine's.
        unsafe {
            head_norm(network.isa, key, &layer.k_norm, self.config.eps);
            network.ropes[rope].rotate(network.isa, key, a.qk_dim, row.position as u32);
        }
        for v in value.iter_mut() {
            *v *= a.value_scale;
        }
        let sequence = batch.sequences[row.sequence];
        let index = self.first_layer + index;
        // SAFETY: each thread has its own rows, hence positions.
        unsafe { batch.cache.write(sequence, index, row.position, key, value) };
    }

    /// Drafts: `batch.rows` are whole blocks, anchor first, each with the mask token after it;
    /// `starts[i]..ends[i]` is the block of row `i`. Logits of the rows `wanted` end in
    /// `scratch.logits`.
    pub(crate) fn block(
        &self,
        network: &Network,
        team: Team<'_>,
        batch: &Batch<'_>,
        blocks: &[std::ops::Range<usize>],
        wanted: &[u32],
        attention: &mut AttentionScratch,
    ) {
        let (config, scratch) = (&self.config, batch.scratch);
        let hidden = config.hidden;
        for r in team.share(batch.rows.len()) {
            // SAFETY: each thread has its own rows.
            let x = unsafe { scratch.x.write(r * hidden..(r + 1) * hidden) };
            let masked = batch.rows[r].position != blocks[r].start;
            match (&self.mask_embedding, masked) {
                (Some(mask), true) => x.copy_from_slice(mask),
                (None, true) => network.embed(config.mask_token, x),
                (_, false) => network.embed(batch.rows[r].token, x),
            }
        }
        team.barrier();
        for (l, layer) in self.layers.iter().enumerate() {
            self.layer(network, l, layer, team, batch, blocks, attention);
        }
        normalise(
            team,
            network.isa,
            scratch,
            wanted,
            &self.norm,
            config.eps,
            hidden,
        );
        team.barrier();
        network.head_rows(team, scratch, wanted, true);
        team.barrier();
    }

    #[allow(clippy::too_many_arguments)]
    fn layer(
        &self,
        network: &Network,
        index: usize,
        layer: &DraftLayer,
        team: Team<'_>,
        batch: &Batch<'_>,
        blocks: &[std::ops::Range<usize>],
        attention: &mut AttentionScratch,
    ) {
        let (config, scratch, isa) = (&self.config, batch.scratch, network.isa);
        let (a, hidden) = (&config.attention, config.hidden);
        let rows = scratch.row_list(batch.rows.len());
        let weight = &layer.input_norm;
        normalise(team, isa, scratch, rows, weight, config.eps, hidden);
        team.barrier();
        let qkv = layer.qkv.iter().map(|p| (&p.matrix, p.bias.as_deref()));
        project(team, isa, scratch, qkv, rows);
        team.barrier();
        let rope = &network.ropes[self.rope];
        for r in team.share(rows.len()) {
            // SAFETY: each thread has its own rows; the instruction set is the machine's.
            let [k, v] = unsafe {
                let [q, k, v] = scratch.projections(r, a);
                head_norm(isa, q, &layer.q_norm, config.eps);
                rope.rotate(isa, q, a.qk_dim, batch.rows[r].position as u32);
                [k, v]
            };
            self.store(network, self.rope, layer, index, batch, r, k, v);
        }
        team.barrier();
        attend_rows(
            team,
            isa,
            a,
            layer.sinks.as_deref(),
            batch,
            self.first_layer + index,
            |r| visible(layer.window, batch.rows[r].position, blocks[r].end),
            attention,
        );
        team.barrier();
        pack_heads(team, isa, scratch, rows, a.heads * a.v_dim);
        team.barrier();
        add_product(
            team,
            isa,
            scratch,
            &layer.o.matrix,
            layer.o.bias.as_deref(),
            rows,
        );
        team.barrier();
        let weight = &layer.post_norm;
        normalise(team, isa, scratch, rows, weight, config.eps, hidden);
        if team.thread == 0 {
            let mut routing = scratch.routing.write().expect("no thread panics");
            routing.dense(rows.len());
        }
        team.barrier();
        let routing = scratch.routing.read().expect("no thread panics");
        run_experts(team, isa, scratch, &layer.ffn, &routing);
        drop(routing);
        add_ffn(team, scratch, rows, hidden);
        team.barrier();
    }
}

/// Keys that the block row at `position` sees, in a block that ends before `end`.
fn visible(window: DraftWindow, position: usize, end: usize) -> std::ops::Range<usize> {
    match window {
        DraftWindow::Full => 0..end,
        DraftWindow::Causal(w) => (position + 1).saturating_sub(w)..position + 1,
        DraftWindow::Symmetric(w) => (position + 1).saturating_sub(w)..end.min(position + w),
    }
}

/// RMSNorm of every head in place. `heads`: `[count, dim]`; `weight`: `[dim]`.
///
/// # Safety
/// `isa` is the machine's.
unsafe fn head_norm(isa: Isa, heads: &mut [f32], weight: &[f32], eps: f32) {
    let mut copy = [0.0f32; HEAD_MAX];
    for head in heads.chunks_exact_mut(weight.len()) {
        let copy = &mut copy[..head.len()];
        copy.copy_from_slice(head);
        // SAFETY: by contract.
        unsafe { rms_norm(isa, copy, weight, eps, head) };
    }
}

/// Widest head that a drafter may have here; checked when it is packed.
pub(crate) const HEAD_MAX: usize = 1024;
