//! Losses on logits with their gradients written out, chunk by chunk, so that `[rows, vocab]` is never kept.
//!
//! For a row with target distribution p and weights a (distillation), b (next token y):
//! loss = a KL(p || q) + b (-log q[y]); gradient on the logits = (a + b) q - a p - b onehot(y).
//! The gradient on the rows follows by one product with the output matrix, which stays frozen.

use tch::{Kind, Tensor, no_grad};

/// Rows a chunk: two f32 `[chunk, vocab]` tensors are 3.2 GB for a vocabulary of 49,152.
const CHUNK: i64 = 8192;

/// Sums over rows, on the device.
#[derive(Debug)]
pub struct Sums {
    /// Weighted loss.
    pub loss: Tensor,
    /// Sum of -log q[y] by row, `[rows]` f32.
    pub cross_entropy: Tensor,
    /// KL(p || q) by row, `[rows]` f32; zeros without a teacher.
    pub divergence: Tensor,
    /// Gradient of the loss on the rows, `[rows, hidden]`.
    pub grad: Tensor,
}

/// The teacher's side: rows after its last norm and its output matrix.
#[derive(Clone, Copy, Debug)]
pub struct Teacher<'a> {
    /// `[rows, hidden]`.
    pub rows: &'a Tensor,
    /// `[vocab, hidden]`.
    pub head: &'a Tensor,
}

/// Loss and gradient for `rows`, `[n, hidden]`, against next tokens `next`, `[n]` int64.
///
/// `distill` and `copy` are the weights a and b, `[n, 1]` f32; they carry any normalisation.
#[must_use]
pub fn head_loss(
    rows: &Tensor,
    head: &Tensor,
    teacher: Option<Teacher<'_>>,
    next: &Tensor,
    distill: &Tensor,
    copy: &Tensor,
) -> Sums {
    no_grad(|| {
        let count = rows.size()[0];
        let (mut ce, mut kl, mut grads) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        while start < count {
            let n = CHUNK.min(count - start);
            let part = |t: &Tensor| t.narrow(0, start, n);
            let taught = teacher.map(|t| part(t.rows).matmul(&t.head.tr()));
            let logits = part(rows).matmul(&head.tr());
            let chunk = chunk_loss(
                &logits,
                taught.as_ref(),
                &part(next),
                &part(distill),
                &part(copy),
            );
            ce.push(chunk.0);
            kl.push(chunk.1);
            grads.push(chunk.2.to_kind(rows.kind()).matmul(head));
            start += n;
        }
        let (ce, kl) = (Tensor::cat(&ce, 0), Tensor::cat(&kl, 0));
        let loss = (&ce * copy.squeeze_dim(-1)).sum(Kind::Float)
            + (&kl * distill.squeeze_dim(-1)).sum(Kind::Float);
        Sums {
            loss,
            cross_entropy: ce,
            divergence: kl,
            grad: Tensor::cat(&grads, 0),
        }
    })
}

/// Cross-entropy by row, divergence by row, gradient on the logits (f32).
pub fn chunk_loss(
    logits: &Tensor,
    taught: Option<&Tensor>,
    next: &Tensor,
    distill: &Tensor,
    copy: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    let log_q = logits.log_softmax(-1, wide(logits));
    let next = next.unsqueeze(-1);
    let ce = -log_q.gather(-1, &next, false).squeeze_dim(-1);
    let q = log_q.exp();
    let Some(taught) = taught else {
        let grad = (q * copy).scatter_add(-1, &next, &-copy);
        return (ce.shallow_clone(), ce.zeros_like(), grad);
    };
    let log_p = taught.log_softmax(-1, wide(taught));
    let p = log_p.exp();
    let kl = (&p * (log_p - log_q)).sum_dim_intlist([-1i64].as_slice(), false, wide(logits));
    let mut grad = q * (distill + copy);
    let _ = grad.g_sub_(&(p * distill));
    let grad = grad.scatter_add(-1, &next, &-copy);
    (ce, kl, grad)
}

fn wide(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// Sends `grad` back through `rows`: the gradient of sum(rows * grad) is grad.
pub fn backward(rows: &Tensor, grad: &Tensor) {
    (rows * grad.reshape_as(rows)).sum(Kind::Float).backward();
}
