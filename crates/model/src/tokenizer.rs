//! Text to tokens and tokens to bytes, from a checkpoint's `tokenizer.json`.
//!
//! Owns a table of the bytes of every token, so that a stream detokenises one token at a time.
//! Refuses: a tokenizer with ids outside the model's vocabulary, and any decoder but byte-level BPE
//! (every model of the family has it), because only there has a token bytes of its own.

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::TokenId;
use crate::detokenizer::Detokenizer;
use crate::error::{self, ModelError};

/// A loaded tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Token `t` is `bytes[ends[t - 1]..ends[t]]`.
    ends: Vec<u32>,
    /// Ascending.
    special: Vec<TokenId>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a checkpoint's directory. `vocab_size` is the model's: it may be
    /// larger than the tokenizer's (padding), not smaller.
    ///
    /// # Errors
    /// [`ModelError::File`]: missing, not a tokenizer, or one that does not fit.
    pub fn open(dir: &Path, vocab_size: u32) -> Result<Self, ModelError> {
        let path = dir.join("tokenizer.json");
        let Some(text) = error::read_text_if_there(&path, error::TEXT_JSON_BYTES_MAX)? else {
            return Err(ModelError::file(
                &path,
                "not found; give token ids, or a checkpoint with a tokenizer",
            ));
        };
        check(&text).map_err(|message| ModelError::file(&path, message))?;
        // The library panics on some files that are JSON and no tokenizer.
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()));
        let inner = match parsed {
            Ok(Ok(inner)) => inner,
            Ok(Err(error)) => {
                let message = format!("not a tokenizer: {}", one_line(&error));
                return Err(ModelError::file(&path, message));
            }
            Err(_) => return Err(ModelError::file(&path, "not a tokenizer")),
        };
        Self::new(inner, vocab_size, path)
    }

    fn new(
        inner: tokenizers::Tokenizer,
        vocab_size: u32,
        path: PathBuf,
    ) -> Result<Self, ModelError> {
        let added = inner.get_added_tokens_decoder();
        let mut by_id = vec![None; vocab_size as usize];
        for (token, id) in inner.get_vocab(true) {
            let Some(slot) = by_id.get_mut(id as usize) else {
                let message = format!(
                    "token `{token}` has id {id}, config.json says vocab_size {vocab_size}"
                );
                return Err(ModelError::file(&path, message));
            };
            *slot = Some(token);
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(by_id.len()));
        for (id, token) in by_id.iter().enumerate() {
            match token {
                Some(token) if added.contains_key(&(id as u32)) => bytes.extend(token.as_bytes()),
                Some(token) => append_byte_level(token, &mut bytes),
                None => {}
            }
            let end = u32::try_from(bytes.len());
            ends.push(end.map_err(|_| ModelError::file(&path, "its tokens take more than 4 GiB"))?);
        }
        let mut special: Vec<TokenId> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        special.sort_unstable();
        Ok(Self {
            inner,
            bytes,
            ends,
            special,
        })
    }

    /// Tokens of a text. Special tokens written out in it are recognised; none is added.
    ///
    /// # Errors
    /// [`ModelError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, ModelError> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(ModelError::Encode {
                message: one_line(&error),
            }),
        }
    }

    /// Bytes of one token, special ones included (their name); nothing for ids without a token.
    #[must_use]
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        let Some(&end) = self.ends.get(token as usize) else {
            return &[];
        };
        let start = token
            .checked_sub(1)
            .map_or(0, |before| self.ends[before as usize]);
        &self.bytes[start as usize..end as usize]
    }

    /// Whether a token is a control token, which is no text.
    #[must_use]
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.binary_search(&token).is_ok()
    }

    /// The id of a token given as it is written in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// Text of several tokens, special ones left out; bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let mut bytes = Vec::new();
        tokens
            .iter()
            .for_each(|&token| self.append(token, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Size of the vocabulary: the model's.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.ends.len() as u32
    }
}

impl Detokenizer for Tokenizer {
    fn append(&self, token: TokenId, out: &mut Vec<u8>) {
        if !self.is_special(token) {
            out.extend_from_slice(self.token_bytes(token));
        }
    }
}

/// The parts that are looked at before the library sees the file.
#[derive(Deserialize)]
struct File {
    decoder: Option<Decoder>,
}

#[derive(Deserialize)]
struct Decoder {
    #[serde(rename = "type")]
    kind: String,
}

/// That the text is JSON throughout, and of a byte-level tokenizer.
fn check(text: &str) -> Result<(), String> {
    match serde_json::from_str::<File>(text) {
        Ok(File {
            decoder: Some(decoder),
        }) if decoder.kind == "ByteLevel" => Ok(()),
        Ok(file) => {
            let found = file.decoder.map_or("none".to_owned(), |d| d.kind);
            Err(format!(
                "field `decoder`: expected type ByteLevel, found {found}"
            ))
        }
        Err(error) => Err(format!("not a tokenizer: {}", one_line(&error))),
    }
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().replace(['\n', '\r'], " ")
}

/// Byte-level BPE writes each byte as a printable character (GPT-2's table). A character outside
/// the table stands for itself.
fn append_byte_level(token: &str, out: &mut Vec<u8>) {
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Printable bytes stand for themselves; the other 68, in order, are U+0100 onwards.
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
