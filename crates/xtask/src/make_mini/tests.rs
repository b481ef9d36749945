//! The whole command on a tiny synthetic GGUF, and the sliced form against the dense one.

use std::io::Write;
use std::path::Path;

use model::chat_template::{ChatTemplate, Conversation};
use model::decoder::{Decoder, Tap};
use model::generation::GenerationDefaults;
use model::reference::ReferenceDecoder;
use model::tokenizer::Tokenizer;
use model::{Checkpoint, Config, Weights};

use super::*;

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 512;
const LAYERS: usize = 3;
/// The 256 bytes, one merged token, three control tokens.
const VOCAB: usize = 260;

/// Writes a GGUF file piece by piece.
#[derive(Default)]
struct GgufWriter {
    metadata: Vec<u8>,
    metadata_count: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
    tensor_count: u64,
    state: u64,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl GgufWriter {
    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.metadata_count += 1;
        text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        &mut self.metadata
    }

    fn number(&mut self, key: &str, value: usize) {
        self.key(key, 4).extend((value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6).extend(value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        text(self.key(key, 8), value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let out = self.key(key, 9);
        out.extend(8u32.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| text(out, value));
    }

    /// A random tensor: Q8_0 for the embedding, Q4_1 for matrices, F32 near 1 for vectors.
    fn tensor(&mut self, name: &str, shape: &[usize]) {
        let kind: u32 = if name == "token_embd.weight" {
            8
        } else if shape.len() == 2 {
            3
        } else {
            0
        };
        text(&mut self.infos, name);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        // GGUF lists the fastest dimension first.
        shape
            .iter()
            .rev()
            .for_each(|&size| self.infos.extend((size as u64).to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.tensor_count += 1;
        let elements: usize = shape.iter().product();
        let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
        match kind {
            0 => (0..elements).for_each(|i| {
                self.data
                    .extend((0.9 + 0.01 * (i % 20) as f32).to_le_bytes())
            }),
            3 => (0..elements / 32).for_each(|_| {
                self.data.extend([half(0.02), half(-0.15)].concat());
                let codes: Vec<u8> = (0..16).map(|_| self.byte()).collect();
                self.data.extend(codes);
            }),
            _ => (0..elements / 32).for_each(|_| {
                self.data.extend(half(0.004));
                let codes: Vec<u8> = (0..32).map(|_| self.byte()).collect();
                self.data.extend(codes);
            }),
        }
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn byte(&mut self) -> u8 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.state >> 56) as u8
    }

    fn save(&self, path: &Path) {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.metadata_count.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        std::fs::File::create(path)
            .unwrap()
            .write_all(&out)
            .unwrap();
    }
}

fn vocabulary() -> Vec<String> {
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let printable = (0x21..=0x7e)
        .chain(0xa1..=0xac)
        .chain(0xae..=0xff)
        .chain(0x100..=0x143);
    let bytes = printable.filter_map(char::from_u32).map(String::from);
    specials
        .into_iter()
        .chain(bytes)
        .chain(["he".to_owned()])
        .collect()
}

fn write_gguf(path: &Path) {
    let mut gguf = GgufWriter {
        state: 1,
        ..GgufWriter::default()
    };
    gguf.text("general.architecture", "llama");
    for (key, value) in [
        ("llama.block_count", LAYERS),
        ("llama.embedding_length", HIDDEN),
        ("llama.feed_forward_length", INTERMEDIATE),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 16),
        ("llama.vocab_size", VOCAB),
        ("llama.context_length", 64),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.padding_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
    ] {
        gguf.number(key, value);
    }
    gguf.float("llama.rope.freq_base", 1e5);
    gguf.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    gguf.text("tokenizer.ggml.model", "gpt2");
    gguf.text("tokenizer.ggml.pre", "smollm");
    gguf.text("tokenizer.chat_template", "{{ messages[0].content }}");
    gguf.texts("tokenizer.ggml.tokens", &vocabulary());
    gguf.texts("tokenizer.ggml.merges", &["h e".to_owned()]);
    let out = gguf.key("tokenizer.ggml.token_type", 9);
    out.extend(5u32.to_le_bytes());
    out.extend((VOCAB as u64).to_le_bytes());
    (0..VOCAB).for_each(|i| out.extend((if i < 3 { 3i32 } else { 1 }).to_le_bytes()));
    gguf.tensor("token_embd.weight", &[VOCAB, HIDDEN]);
    gguf.tensor("output_norm.weight", &[HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("attn_norm", &[HIDDEN][..]),
            ("attn_q", &[HIDDEN, HIDDEN]),
            ("attn_k", &[HIDDEN / 2, HIDDEN]),
            ("attn_v", &[HIDDEN / 2, HIDDEN]),
            ("attn_output", &[HIDDEN, HIDDEN]),
            ("ffn_norm", &[HIDDEN]),
            ("ffn_gate", &[INTERMEDIATE, HIDDEN]),
            ("ffn_up", &[INTERMEDIATE, HIDDEN]),
            ("ffn_down", &[HIDDEN, INTERMEDIATE]),
        ] {
            gguf.tensor(&format!("blk.{layer}.{name}.weight"), shape);
        }
    }
    gguf.save(path);
}

/// Makes the checkpoint and computes the logits of a few tokens, one row a token.
fn logits(gguf: &Path, out: &Path, form: Form) -> Vec<f32> {
    run(&Options {
        file: gguf.to_owned(),
        out: out.to_owned(),
        form,
    })
    .unwrap();
    let config = Config::load(out).unwrap();
    let checkpoint = Checkpoint::open(out).unwrap();
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let mut decoder = ReferenceDecoder::new(&config, &weights, None);
    let sequence = decoder.open().unwrap();
    let mut rows = Vec::new();
    let mut sink = |_: u32, row: &[f32]| rows.extend_from_slice(row);
    decoder
        .tap(
            sequence,
            &[1, 70, 71, 5, 200, 259, 3, 99],
            Tap::Logits(&mut sink),
        )
        .unwrap();
    rows
}

fn mean_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

#[test]
fn the_sliced_form_is_the_dense_model() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("tiny.gguf");
    write_gguf(&gguf);
    let make = |form| logits(&gguf, &dir.path().join("out"), form);
    let dense = make(Form::Dense);
    let spread = dense.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert!(spread > 0.5, "logits of {spread} would hide a difference");
    // The same products, summed expert by expert.
    let sliced = mean_difference(&dense, &make(Form::Sliced));
    assert!(sliced < 1e-5, "{sliced}");
    // Quantised, it is near but not the same.
    let mini = mean_difference(&dense, &make(Form::Mini));
    assert!((1e-4..spread / 4.0).contains(&mini), "{mini} of {spread}");
}

#[test]
fn tokenizer_template_and_defaults_open() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("tiny.gguf");
    write_gguf(&gguf);
    let out = dir.path().join("out");
    run(&Options {
        file: gguf,
        out: out.clone(),
        form: Form::Mini,
    })
    .unwrap();
    let tokenizer = Tokenizer::open(&out, VOCAB as u32).unwrap();
    let tokens = tokenizer.encode("<|im_start|>he 12\u{e9}").unwrap();
    assert_eq!((tokens[0], tokens[1]), (1, 259));
    assert_eq!(tokenizer.decode(&tokens), "he 12\u{e9}");
    let messages = [serde_json::json!({"content": "hi"})];
    let conversation = Conversation {
        messages: &messages,
        ..Conversation::default()
    };
    let template = ChatTemplate::open(&out).unwrap().unwrap();
    assert_eq!(template.render(&conversation).unwrap(), "hi");
    assert_eq!(
        GenerationDefaults::open(&out, VOCAB as u32)
            .unwrap()
            .eos_ids,
        [0, 2]
    );
}

#[test]
fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    write_gguf(&path);
    let bytes = std::fs::read(&path).unwrap();
    let out = dir.path().join("out");
    let attempt = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        run(&Options {
            file: path.clone(),
            out: out.clone(),
            form: Form::Sliced,
        })
    };
    for length in [0, 3, 20, 100, 5000, bytes.len() - 32] {
        assert!(attempt(&bytes[..length]).is_err(), "{length}");
    }
    // Counts and lengths of 2^64 - 1 wherever eight bytes of the header can be one.
    for at in (8..2000).step_by(8) {
        let mut damaged = bytes.clone();
        damaged[at..at + 8].fill(0xff);
        let _ = attempt(&damaged);
    }
    assert!(attempt(&bytes).is_ok());
}
