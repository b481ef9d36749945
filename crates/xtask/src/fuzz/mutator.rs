//! Mutations of inputs: bits, ranges, numbers, and words that make sense somewhere.
//!
//! Invariant: the same seed gives the same inputs.

use serde_json::Value;

/// Mutated inputs do not grow beyond this.
const INPUT_BYTES_MAX: usize = 1 << 20;

/// Pieces that make sense somewhere.
const WORDS: [&str; 62] = [
    "{%",
    "%}",
    "{{",
    "}}",
    "{%-",
    "-%}",
    "for",
    "in",
    "endfor",
    "if",
    "endif",
    "set",
    "macro",
    "endmacro",
    "range(99999)",
    "namespace()",
    "[::-1]",
    "|tojson",
    "|length",
    "messages",
    "loop.index0",
    "null",
    "true",
    "[]",
    "{}",
    "\"",
    "\\u0000",
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "NaN",
    "data_offsets",
    "\"F8_E4M3\"",
    "\"U8\"",
    "target_layer_ids",
    "../",
    "\u{0}",
    "\n\n",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
    "<|channel|>",
    "<|message|>",
    "<|call|>",
    "&quot;",
    "\\ud800",
    "\u{feff}",
    "$ref",
    "anyOf",
    "{0,99999999}",
    "```",
    "<script>",
    "(((((((((((((((((((((((((((((((((",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[",
];

/// Seeded mutations.
pub(super) struct Mutator {
    state: u64,
}

impl Mutator {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    /// A number below `below`.
    pub(super) fn next(&mut self, below: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % below.max(1) as u64) as usize
    }

    /// One of the seeds with 1 to 6 changes.
    pub(super) fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.next(seeds.len())].clone();
        for _ in 0..=self.next(6) {
            self.change(&mut input);
        }
        input.truncate(INPUT_BYTES_MAX);
        input
    }

    /// One of the seeds, which are JSON, with one or two of its values changed.
    pub(super) fn mutate_json(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let seed = &seeds[self.next(seeds.len())];
        let Ok(mut value) = serde_json::from_slice::<Value>(seed) else {
            return seed.clone();
        };
        for _ in 0..=self.next(2) {
            self.change_json(&mut value);
        }
        value.to_string().into()
    }

    /// Changes one value somewhere inside.
    fn change_json(&mut self, value: &mut Value) {
        let deeper = self.next(5) > 0;
        match value {
            Value::Object(map) if deeper && !map.is_empty() => {
                let at = self.next(map.len());
                let key = map.keys().nth(at).cloned().unwrap_or_default();
                if self.next(12) == 0 {
                    map.remove(&key);
                } else if let Some(inner) = map.get_mut(&key) {
                    self.change_json(inner);
                }
            }
            Value::Array(list) if deeper && !list.is_empty() => {
                let at = self.next(list.len());
                match self.next(8) {
                    0 => drop(list.remove(at)),
                    1 => list.push(list[at].clone()),
                    _ => self.change_json(&mut list[at]),
                }
            }
            Value::String(text) if self.next(2) == 0 => {
                let mut bytes = std::mem::take(text).into_bytes();
                self.change(&mut bytes);
                *text = String::from_utf8_lossy(&bytes).into_owned();
            }
            other => *other = self.json_value(),
        }
    }

    fn json_value(&mut self) -> Value {
        let word = WORDS[self.next(WORDS.len())];
        match self.next(12) {
            0 => Value::Null,
            1 => true.into(),
            2 => (-1).into(),
            3 => 0.into(),
            4 => u64::MAX.into(),
            5 => 1e300.into(),
            6 => 0.5.into(),
            7 => Value::Array(vec![]),
            8 => serde_json::json!({}),
            9 => vec![word; self.next(200)].into(),
            10 => word.repeat(self.next(300)).into(),
            _ => word.into(),
        }
    }

    /// A shard whose header has 1 to 6 changes, before the same data.
    pub(super) fn mutate_header(&mut self, shard: &[u8]) -> Vec<u8> {
        let Some((length, rest)) = shard.split_first_chunk::<8>() else {
            return shard.to_vec();
        };
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header = self.mutate(&[header.to_vec()]);
        [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        // Headers are at the front: half of the changes go there.
        let span = if self.next(2) == 0 {
            input.len().min(256)
        } else {
            input.len()
        };
        let at = self.next(span);
        let length = self.next(64).min(input.len() - at);
        match self.next(8) {
            0 if at < input.len() => input[at] ^= 1 << self.next(8),
            1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff][self.next(5)],
            2 => drop(input.drain(at..at + length)),
            3 => {
                let part = input[at..at + length].to_vec();
                let to = self.next(input.len() + 1);
                drop(input.splice(to..to, part));
            }
            4 => input.truncate(at),
            5 => {
                let number =
                    [0, 1, u64::MAX, 1 << 63, 1 << 32, 1 << 20][self.next(6)].to_le_bytes();
                let end = (at + 8).min(input.len());
                input[at..end].copy_from_slice(&number[..end - at]);
            }
            _ => {
                let word = WORDS[self.next(WORDS.len())].as_bytes();
                let end = at
                    + if self.next(2) == 0 {
                        0
                    } else {
                        word.len().min(input.len() - at)
                    };
                drop(input.splice(at..end, word.iter().copied()));
            }
        }
    }
}
