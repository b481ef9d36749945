//! Batched sampling with a KV cache: the model's own answers, by the ten thousand.
//!
//! All rows of a batch move one position a step; a row whose prompt is not over takes its next prompt
//! token instead of a sample, so prompts of different lengths need no padding and no mask.
//! A row's answer ends at the stop token or at the last position.

use tch::{Device, Kind, Tensor, no_grad};

use crate::attention::{rotate, rotation};
use crate::error::{Error, Result};
use crate::net::{Net, group};

/// A prompt and what the model wrote after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Index of the domain in the caller's list.
    pub domain: u16,
    /// 1 when every token is the most likely one.
    pub greedy: bool,
    /// Length of the prompt.
    pub prompt: usize,
    /// Prompt and answer; the answer includes the stop token if it came.
    pub tokens: Vec<u16>,
}

/// One row to sample.
#[derive(Clone, Debug)]
pub struct Request {
    /// Index of the domain in the caller's list.
    pub domain: u16,
    /// The prompt.
    pub tokens: Vec<u16>,
    /// 0 for greedy.
    pub temperature: f64,
}

/// Candidates kept before top-p.
const CANDIDATES: i64 = 64;

/// Samples all `requests` up to `length` positions; stops a row at `stop`.
pub fn sample(
    net: &Net,
    requests: &[Request],
    length: usize,
    top_p: f64,
    stop: u16,
) -> Result<Vec<Answer>> {
    if let Some(long) = requests
        .iter()
        .find(|r| r.tokens.len() >= length || r.tokens.is_empty())
    {
        return Err(Error::Invalid(format!(
            "a prompt of {} tokens does not fit sequences of {length}",
            long.tokens.len()
        )));
    }
    no_grad(|| {
        let device = net.params.device();
        let mut batch = Rows::new(net, requests, length, device);
        let shortest = requests.iter().map(|r| r.tokens.len()).min().unwrap_or(0);
        for position in 0..length as i64 - 1 {
            let hidden = batch.advance(net, position);
            if position as usize + 1 < shortest {
                continue;
            }
            let next = batch.choose(net, &hidden, top_p);
            batch.put(position + 1, &next, stop);
            if position % 32 == 31 && batch.done.all().int64_value(&[]) == 1 {
                break;
            }
        }
        Ok(batch.answers(requests, stop))
    })
}

struct Rows {
    tokens: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    greedy: Tensor,
    all_greedy: bool,
    done: Tensor,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    cos: Tensor,
    sin: Tensor,
}

impl Rows {
    fn new(net: &Net, requests: &[Request], length: usize, device: Device) -> Self {
        let shape = &net.shape;
        let n = requests.len();
        let mut tokens = vec![0i64; n * length];
        for (row, request) in tokens.chunks_exact_mut(length).zip(requests) {
            for (to, &from) in row.iter_mut().zip(&request.tokens) {
                *to = i64::from(from);
            }
        }
        let lengths: Vec<i64> = requests.iter().map(|r| r.tokens.len() as i64).collect();
        let heat: Vec<f32> = requests
            .iter()
            .map(|r| r.temperature.max(1e-3) as f32)
            .collect();
        let greedy: Vec<bool> = requests.iter().map(|r| r.temperature <= 0.0).collect();
        let cache = || {
            let size = [n as i64, shape.kv_heads, length as i64, shape.head_dim];
            Tensor::zeros(size, (net.kind, device))
        };
        let positions = Tensor::arange(length as i64, (Kind::Int64, device));
        let (cos, sin) = rotation(&positions, shape.head_dim, shape.theta);
        Self {
            tokens: Tensor::from_slice(&tokens)
                .reshape([n as i64, length as i64])
                .to_device(device),
            lengths: Tensor::from_slice(&lengths).to_device(device),
            temperature: Tensor::from_slice(&heat).unsqueeze(1).to_device(device),
            greedy: Tensor::from_slice(&greedy).unsqueeze(1).to_device(device),
            all_greedy: greedy.iter().all(|&g| g),
            done: Tensor::zeros([n as i64], (Kind::Bool, device)),
            keys: (0..shape.layers).map(|_| cache()).collect(),
            values: (0..shape.layers).map(|_| cache()).collect(),
            cos: cos.to_kind(net.kind),
            sin: sin.to_kind(net.kind),
        }
    }

    /// Runs the token at `position` of every row; hidden rows after the last norm.
    fn advance(&mut self, net: &Net, position: i64) -> Tensor {
        let tokens = self.tokens.select(1, position);
        let mut x = Tensor::embedding(net.embedding(), &tokens, -1, false, false);
        for layer in 0..net.shape.layers as usize {
            let h = net.norm(&x, group::NORM_IN, layer);
            x = x + self.attend(net, &h, layer, position);
            let h = net.norm(&x, group::NORM_POST, layer);
            x = x + net.feed_forward(&h, layer).0;
        }
        net.norm(&x, group::NORM, 0)
    }

    fn attend(&mut self, net: &Net, h: &Tensor, layer: usize, position: i64) -> Tensor {
        let shape = &net.shape;
        let (heads, kv, width) = (shape.heads, shape.kv_heads, shape.head_dim);
        let rows = h.size()[0];
        let qkv = h.linear(net.params.at(group::QKV, layer), None::<&Tensor>);
        let all = qkv.reshape([rows, heads + 2 * kv, width]);
        let (cos, sin) = (self.cos.get(position), self.sin.get(position));
        let rotated = rotate(&all.narrow(1, 0, heads + kv), &cos, &sin);
        self.keys[layer]
            .select(2, position)
            .copy_(&rotated.narrow(1, heads, kv));
        self.values[layer]
            .select(2, position)
            .copy_(&all.narrow(1, heads + kv, kv));
        let slides = shape.sliding[layer];
        let first = if slides {
            (position - shape.window).max(0)
        } else {
            0
        };
        let keys = self.keys[layer].narrow(2, first, position + 1 - first);
        let values = self.values[layer].narrow(2, first, position + 1 - first);
        let q = rotated
            .narrow(1, 0, heads)
            .reshape([rows, kv, heads / kv, width]);
        let scores = q.matmul(&keys.transpose(-2, -1)).to_kind(Kind::Float) / (width as f64).sqrt();
        let seen = position + 1 - first;
        let weights = if slides && shape.sinks {
            let sink = net.params.at(group::SINK, layer).to_kind(Kind::Float);
            let sink = sink
                .reshape([1, kv, heads / kv, 1])
                .expand([rows, kv, heads / kv, 1], false);
            Tensor::cat(&[scores, sink], -1)
                .softmax(-1, Kind::Float)
                .narrow(-1, 0, seen)
        } else {
            scores.softmax(-1, Kind::Float)
        };
        let out = weights
            .to_kind(net.kind)
            .matmul(&values)
            .reshape([rows, heads * width]);
        out.linear(net.params.at(group::OUT, layer), None::<&Tensor>)
    }

    /// The next token of every row: temperature, then top-p among the likeliest.
    fn choose(&self, net: &Net, hidden: &Tensor, top_p: f64) -> Tensor {
        let logits = hidden.matmul(&net.embedding().tr());
        if self.all_greedy {
            return logits.argmax(-1, false);
        }
        let count = CANDIDATES.min(net.shape.vocab);
        let (values, index) = logits.topk(count, -1, true, true);
        let logits = values.to_kind(Kind::Float) / &self.temperature;
        let p = logits.softmax(-1, Kind::Float);
        let before = p.cumsum(-1, Kind::Float) - &p;
        let cut = before.ge(top_p);
        let noise = -(-(logits.rand_like().clamp(1e-9, 1.0 - 1e-7)).log()).log();
        let noise = noise.masked_fill(&self.greedy, 0.0);
        let pick = (logits.log_softmax(-1, Kind::Float) + noise)
            .masked_fill(&cut, f64::NEG_INFINITY)
            .argmax(-1, true);
        index.gather(-1, &pick, false).squeeze_dim(-1)
    }

    fn put(&mut self, position: i64, next: &Tensor, stop: u16) {
        let writing = self.lengths.le(position);
        let forced = self.tokens.select(1, position);
        let next = next.where_self(&writing, &forced);
        self.tokens.select(1, position).copy_(&next);
        self.done = self
            .done
            .logical_or(&writing.logical_and(&next.eq(i64::from(stop))));
    }

    fn answers(&self, requests: &[Request], stop: u16) -> Vec<Answer> {
        let length = self.tokens.size()[1] as usize;
        let flat: Vec<i64> = Vec::<i64>::try_from(self.tokens.to_device(Device::Cpu).reshape([-1]))
            .unwrap_or_default();
        let rows = flat.chunks_exact(length);
        rows.zip(requests)
            .map(|(row, request)| {
                let prompt = request.tokens.len();
                let end = row[prompt..].iter().position(|&t| t == i64::from(stop));
                let end = end.map_or(length, |i| prompt + i + 1);
                Answer {
                    domain: request.domain,
                    greedy: request.temperature <= 0.0,
                    prompt,
                    tokens: row[..end].iter().map(|&t| t as u16).collect(),
                }
            })
            .collect()
    }
}

/// Answers as bytes: domain, greedy, prompt length, length, tokens, all little-endian u16.
#[must_use]
pub fn encode(answers: &[Answer]) -> Vec<u8> {
    let mut out = Vec::new();
    for answer in answers {
        let head = [
            answer.domain,
            u16::from(answer.greedy),
            answer.prompt as u16,
            answer.tokens.len() as u16,
        ];
        for word in head.iter().chain(&answer.tokens) {
            out.extend(word.to_le_bytes());
        }
    }
    out
}

/// Undoes [`encode`]; `None` when the bytes are cut short.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Vec<Answer>> {
    let words: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .collect();
    let mut rest = words.as_slice();
    let mut out = Vec::new();
    while let [domain, greedy, prompt, length, tail @ ..] = rest {
        let tokens = tail.get(..usize::from(*length))?;
        out.push(Answer {
            domain: *domain,
            greedy: *greedy == 1,
            prompt: usize::from(*prompt),
            tokens: tokens.to_vec(),
        });
        rest = &tail[usize::from(*length)..];
    }
    rest.is_empty().then_some(out)
}
