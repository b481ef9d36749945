//! Attention for whole sequences: causal, and in a sliding window with sinks, without length x length masks.
//!
//! A sliding layer is cut into chunks of one window: queries of a chunk see the keys of the chunk
//! before and their own, so the work is linear in the length. A sink is one more key: queries get a
//! 65th column that holds the head's sink logit, the sink key holds 1/scale there and zero elsewhere
//! (every other key holds zero there), and its value is zero. The fused kernel then needs no change
//! and the gradient of the sink flows through the query. Columns and keys are padded to eights.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::shape::Shape;

/// Keys and columns are padded to a multiple of this for the fused kernels.
pub const PAD: i64 = 8;

/// What all layers share for one batch: rotation and masks.
#[derive(Debug)]
pub struct Context {
    shape: Shape,
    batch: i64,
    length: i64,
    cos: Tensor,
    sin: Tensor,
    kind: Kind,
    mask: OnceCell<Tensor>,
}

/// cos and sin of the rotary embedding for these positions, `[..., head_dim / 2]` f32.
pub fn rotation(positions: &Tensor, head_dim: i64, theta: f64) -> (Tensor, Tensor) {
    let device = positions.device();
    let index = Tensor::arange(head_dim / 2, (Kind::Double, device)) * (2.0 / head_dim as f64);
    let frequency = (index * -theta.ln()).exp();
    let angle = positions.to_kind(Kind::Double).unsqueeze(-1) * frequency;
    (
        angle.cos().to_kind(Kind::Float),
        angle.sin().to_kind(Kind::Float),
    )
}

/// Rotates halves of `[..., head_dim]`; cos and sin broadcast as `[..., head_dim / 2]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = x.size()[x.dim() - 1] / 2;
    let (a, b) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
    Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin], -1)
}

/// The constant added to keys so that the last [`PAD`] rows begin with a sink: `[keys, columns]`.
pub fn sink_key(keys: i64, head_dim: i64, options: (Kind, Device)) -> Tensor {
    let out = Tensor::zeros([keys, head_dim + PAD], options);
    let _ = out
        .get(keys - PAD)
        .narrow(0, head_dim, 1)
        .fill_((head_dim as f64).sqrt());
    out
}

impl Context {
    /// For `batch` sequences of `length` positions starting at 0.
    #[must_use]
    pub fn new(shape: &Shape, batch: i64, length: i64, device: Device, kind: Kind) -> Self {
        let positions = Tensor::arange(length, (Kind::Int64, device));
        let (cos, sin) = rotation(&positions, shape.head_dim, shape.theta);
        let broadcast = |t: Tensor| t.to_kind(kind).reshape([1, length, 1, shape.head_dim / 2]);
        Self {
            shape: shape.clone(),
            batch,
            length,
            cos: broadcast(cos),
            sin: broadcast(sin),
            kind,
            mask: OnceCell::new(),
        }
    }

    /// `[batch, length, heads, head_dim]` query, key, value; query and key rotated.
    fn split(&self, qkv: &Tensor) -> [Tensor; 3] {
        let (heads, kv, width) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let all = qkv.reshape([self.batch, self.length, heads + 2 * kv, width]);
        let rotated = rotate(&all.narrow(2, 0, heads + kv), &self.cos, &self.sin);
        [
            rotated.narrow(2, 0, heads),
            rotated.narrow(2, heads, kv),
            all.narrow(2, heads + kv, kv),
        ]
    }

    /// Mean logit that each head gives the first position, `[heads]` f32: where a trained model puts
    /// attention that it does not want, and so where a sink should begin.
    pub fn first_key(&self, qkv: &Tensor) -> Tensor {
        let [q, k, _] = self.split(qkv);
        let (heads, kv, width) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let late = self.length - self.length / 4;
        let q =
            q.narrow(1, self.length / 4, late)
                .reshape([self.batch, late, kv, heads / kv, width]);
        let k = k.narrow(1, 0, 1).unsqueeze(3);
        let logits = (q * k).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
        let mean = logits.mean_dim([0i64, 1].as_slice(), false, Kind::Float);
        mean.reshape([heads]) / (width as f64).sqrt()
    }

    /// Causal attention over everything before; returns `[batch, length, heads * head_dim]`.
    pub fn full(&self, qkv: &Tensor) -> Tensor {
        let [q, k, v] = self.split(qkv).map(|t| t.transpose(1, 2));
        let rows = Tensor::scaled_dot_product_attention(
            &q,
            &k,
            &v,
            None::<&Tensor>,
            0.0,
            true,
            None,
            true,
        );
        rows.transpose(1, 2).reshape([self.batch, self.length, -1])
    }

    /// Attention to the window before and the row itself, with an optional sink logit a head.
    pub fn sliding(&self, qkv: &Tensor, sink: Option<&Tensor>) -> Tensor {
        let [q, k, v] = self.split(qkv);
        let (heads, kv, width) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let (chunk, group) = (self.shape.window, heads / kv);
        let count = self.batch * self.length / chunk;
        let q = q
            .reshape([count, chunk, kv, group, width])
            .permute([0, 2, 3, 1, 4]);
        let q = with_sink(&q, sink.map(|s| s.reshape([1, kv, group, 1, 1])).as_ref());
        let q = q.reshape([count, kv, group * chunk, width + PAD]);
        let keys = 2 * chunk + PAD;
        let k = self.two_chunks(&k).constant_pad_nd([0, PAD, 0, PAD])
            + sink_key(keys, width, (self.kind, qkv.device()));
        let v = self.two_chunks(&v).constant_pad_nd([0, 0, 0, PAD]);
        let mask = self.mask.get_or_init(|| self.build_mask(qkv.device()));
        let scale = 1.0 / (width as f64).sqrt();
        let rows =
            Tensor::scaled_dot_product_attention(&q, &k, &v, Some(mask), 0.0, false, scale, false);
        rows.reshape([count, kv, group, chunk, width])
            .permute([0, 3, 1, 2, 4])
            .reshape([self.batch, self.length, heads * width])
    }

    /// `[batch, length, kv, width]` to `[batch * chunks, kv, 2 * chunk, width]`: a chunk and the one before.
    fn two_chunks(&self, x: &Tensor) -> Tensor {
        let (kv, width, chunk) = (self.shape.kv_heads, self.shape.head_dim, self.shape.window);
        let n = self.length / chunk;
        let padded = x.constant_pad_nd([0, 0, 0, 0, chunk, 0]).reshape([
            self.batch,
            n + 1,
            chunk,
            kv,
            width,
        ]);
        Tensor::cat(&[padded.narrow(1, 0, n), padded.narrow(1, 1, n)], 2)
            .reshape([self.batch * n, 2 * chunk, kv, width])
            .transpose(1, 2)
    }

    /// 0 where visible, -inf elsewhere: `[batch * chunks, kv, group * chunk, 2 * chunk + PAD]`.
    fn build_mask(&self, device: Device) -> Tensor {
        let (chunk, kv) = (self.shape.window, self.shape.kv_heads);
        let (n, group) = (self.length / chunk, self.shape.heads / kv);
        let int = (Kind::Int64, device);
        let query = Tensor::arange(chunk, int).unsqueeze(1) + chunk;
        let key = Tensor::arange(2 * chunk, int).unsqueeze(0);
        let distance = query - &key;
        let near = distance.ge(0).logical_and(&distance.le(chunk));
        let start = Tensor::arange(n, int).reshape([n, 1, 1]) * chunk - chunk;
        let visible = near.unsqueeze(0).logical_and(&(start + key).ge(0));
        let last = Tensor::arange(PAD, int).eq(i64::from(!self.shape.sinks) * PAD);
        let sink = last.reshape([1, 1, PAD]).expand([n, chunk, PAD], false);
        let visible = Tensor::cat(&[visible, sink], 2);
        additive(&visible, self.kind)
            .reshape([1, n, 1, chunk, -1])
            .expand([self.batch, n, group, chunk, 2 * chunk + PAD], false)
            .reshape([self.batch * n, 1, group * chunk, 2 * chunk + PAD])
            .expand([self.batch * n, kv, group * chunk, 2 * chunk + PAD], false)
    }
}

/// 0 where true, -inf where false.
pub fn additive(visible: &Tensor, kind: Kind) -> Tensor {
    Tensor::zeros(visible.size(), (kind, visible.device()))
        .masked_fill(&visible.logical_not(), f64::NEG_INFINITY)
}

/// Appends [`PAD`] columns to `[..., width]`; the first holds the sink logit, broadcast.
pub fn with_sink(q: &Tensor, sink: Option<&Tensor>) -> Tensor {
    let mut size = q.size();
    let last = size.len() - 1;
    size[last] = PAD;
    let Some(sink) = sink else {
        let zeros = Tensor::zeros(&size, (q.kind(), q.device()));
        return Tensor::cat(&[q, &zeros], -1);
    };
    size[last] = PAD - 1;
    let zeros = Tensor::zeros(&size, (q.kind(), q.device()));
    size[last] = 1;
    let sink = sink.to_kind(q.kind()).expand(&size, false);
    Tensor::cat(&[q, &sink, &zeros], -1)
}
