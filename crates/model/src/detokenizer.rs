//! Tokens to bytes, one token at a time: what a stream needs, and no more.
//!
//! A trait so that the engine and its tests need no tokenizer file. Bytes and not text, because a
//! UTF-8 character may be split over tokens; whoever joins them decides what to show.

use crate::TokenId;

/// Turns tokens into the bytes they stand for.
pub trait Detokenizer: Send + Sync {
    /// Appends the bytes of `token` to `out`: nothing for special tokens and for ids that the
    /// vocabulary does not have.
    fn append(&self, token: TokenId, out: &mut Vec<u8>);
}

/// For tests: token `t` is byte `t`, ids from 256 on have no bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByteTokens;

impl Detokenizer for ByteTokens {
    fn append(&self, token: TokenId, out: &mut Vec<u8>) {
        out.extend(u8::try_from(token));
    }
}
