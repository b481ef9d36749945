//! Calls that a model makes by itself name a function that there is: a mask over the name alone.
//!
//! Small models copy the placeholder of their template (`<function=NAME>`) or make names up; no client can use such
//! a call. Everything else about the answer stays free, whether to call included. Invariants: bytes decide, not
//! tokens; a place where no token fits is left free, so that a mask never leaves nothing to say; masks depend on the
//! answer so far only, so that output with drafting is that without.

use crate::parse::Format;
use crate::text::Codec;
use engine::ConstraintFactory;
use model::TokenId;
use model::decoder::Constraint;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

type ByFirst = BTreeMap<u8, Vec<(TokenId, Box<[u8]>)>>;

/// Tokens of the vocabulary by their first byte; special ones are no part of a name.
#[derive(Default)]
pub(crate) struct Tokens(OnceLock<ByFirst>);

impl Tokens {
    fn by_first(&self, codec: &dyn Codec) -> &ByFirst {
        self.0.get_or_init(|| {
            let mut all = ByFirst::new();
            for token in (0..codec.vocab_size()).filter(|token| !codec.is_special(*token)) {
                let bytes = codec.token_bytes(token);
                if let Some(first) = bytes.first() {
                    all.entry(*first).or_default().push((token, bytes.into()));
                }
            }
            all
        })
    }
}

/// What names may come where.
struct Rule {
    codec: Arc<dyn Codec>,
    tokens: Arc<Tokens>,
    /// What stands before a name.
    opening: &'static [u8],
    /// Names, each with what ends it.
    names: Vec<Vec<u8>>,
}

/// Binds the names of calls in `format`; `None` where the format or a name does not allow it.
pub(crate) fn bind(
    codec: &Arc<dyn Codec>,
    tokens: &Arc<Tokens>,
    format: Format,
    names: &[&str],
    inner: Option<ConstraintFactory>,
) -> Option<ConstraintFactory> {
    let (opening, end): (&'static [u8], &str) = match format {
        Format::Mimo => (b"<tool_call>\n<function=", ">"),
        Format::Hermes => (b"<tool_call>\n{\"name\": \"", "\""),
        Format::Harmony => return None,
    };
    let plain = |name: &&str| {
        name.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
    };
    if names.is_empty() || !names.iter().all(plain) {
        return None;
    }
    let rule = Arc::new(Rule {
        codec: Arc::clone(codec),
        tokens: Arc::clone(tokens),
        opening,
        names: names
            .iter()
            .map(|name| format!("{name}{end}").into_bytes())
            .collect(),
    });
    Some(Arc::new(move || {
        Box::new(Named {
            rule: Arc::clone(&rule),
            tail: Vec::new(),
            inner: inner.as_ref().map(|make| make()),
        })
    }))
}

struct Named {
    rule: Arc<Rule>,
    /// The answer's last bytes, enough for an opening and a name.
    tail: Vec<u8>,
    inner: Option<Box<dyn Constraint>>,
}

impl Rule {
    fn push(&self, tail: &mut Vec<u8>, token: TokenId) {
        tail.extend(self.codec.token_bytes(token));
        let longest = self.names.iter().map(Vec::len).max().unwrap_or(0);
        let keep = self.opening.len() + longest;
        tail.drain(..tail.len().saturating_sub(keep));
    }

    /// The part of a name that is there, when one has begun.
    fn begun<'t>(&self, tail: &'t [u8]) -> Option<&'t [u8]> {
        let open = self.opening;
        let at = tail
            .windows(open.len())
            .rposition(|window| window == open)?;
        let part = &tail[at + open.len()..];
        let begins = |name: &Vec<u8>| name.len() > part.len() && name.starts_with(part);
        self.names.iter().any(begins).then_some(part)
    }

    /// Leaves the tokens that go on with a name, where there are any.
    fn narrow(&self, part: &[u8], row: &mut [u32]) {
        let mut narrow = vec![0; row.len()];
        let tokens = self.tokens.by_first(&*self.codec);
        for name in self.names.iter().filter(|name| name.starts_with(part)) {
            let rest = &name[part.len()..];
            let fitting = rest.first().and_then(|first| tokens.get(first));
            for (token, bytes) in fitting.into_iter().flatten() {
                // A token may end the name and say more.
                let fits = rest.starts_with(bytes) || bytes.starts_with(rest);
                let word = *token as usize / 32;
                if fits && word < row.len() {
                    narrow[word] |= row[word] & 1 << (token % 32);
                }
            }
        }
        if narrow.iter().any(|word| *word != 0) {
            row.copy_from_slice(&narrow);
        }
    }
}

impl Constraint for Named {
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize {
        let words = masks.len() / (drafted.len() + 1);
        let usable = match &mut self.inner {
            Some(inner) => inner.masks(drafted, masks),
            None => {
                masks.fill(u32::MAX);
                drafted.len() + 1
            }
        };
        let mut tail = self.tail.clone();
        for i in 0..usable {
            let row = &mut masks[i * words..(i + 1) * words];
            if let Some(part) = self.rule.begun(&tail) {
                self.rule.narrow(part, row);
            }
            let Some(token) = drafted.get(i) else {
                break;
            };
            let word = row.get(*token as usize / 32);
            if word.is_none_or(|word| word >> (token % 32) & 1 == 0) {
                return i + 1;
            }
            self.rule.push(&mut tail, *token);
        }
        usable
    }

    fn commit(&mut self, tokens: &[TokenId]) {
        for token in tokens {
            self.rule.push(&mut self.tail, *token);
        }
        if let Some(inner) = &mut self.inner {
            inner.commit(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::ByteCodec;

    const VOCAB: u32 = 512;
    const WORDS: usize = VOCAB as usize / 32;

    fn start() -> Box<dyn Constraint> {
        let codec: Arc<dyn Codec> = Arc::new(ByteCodec { vocab_size: VOCAB });
        let made = bind(
            &codec,
            &Arc::default(),
            Format::Mimo,
            &["get", "go.up"],
            None,
        );
        made.unwrap()()
    }

    fn next(named: &mut dyn Constraint) -> Vec<u8> {
        let mut row = vec![0; WORDS];
        assert_eq!(named.masks(&[], &mut row), 1);
        let is = |byte: &u8| row[usize::from(*byte) / 32] >> (byte % 32) & 1 == 1;
        (0..=255).filter(is).collect()
    }

    fn tokens(text: &str) -> Vec<TokenId> {
        text.bytes().map(TokenId::from).collect()
    }

    #[test]
    fn a_call_names_a_function_that_there_is_and_the_rest_is_free() {
        let mut named = start();
        for (said, allowed) in [
            ("I call <tool_call>\n<function", 256),
            ("=", 1),
            ("g", 2),
            ("o", 1),
            (".up", 1),
            (">\n<parameter=NAME>", 256),
            ("<function=", 256),
        ] {
            named.commit(&tokens(said));
            assert_eq!(next(&mut *named).len(), allowed, "after {said}");
        }
        let mut named = start();
        named.commit(&tokens("<tool_call>\n<function="));
        assert_eq!(next(&mut *named), b"g");
    }

    #[test]
    fn drafts_are_cut_where_a_name_goes_wrong() {
        let mut named = start();
        named.commit(&tokens("<tool_call>\n<func"));
        for (draft, usable) in [("tion=NAME>", 6), ("tion=get>\nx", 12), ("tion=gex", 8)] {
            let draft = tokens(draft);
            let mut masks = vec![0; (draft.len() + 1) * WORDS];
            assert_eq!(named.masks(&draft, &mut masks), usable, "{draft:?}");
        }
    }

    #[test]
    fn names_that_need_escapes_and_other_formats_are_left_free() {
        let codec: Arc<dyn Codec> = Arc::new(ByteCodec { vocab_size: VOCAB });
        let bind = |format, name| bind(&codec, &Arc::default(), format, &[name], None).is_some();
        assert!(bind(Format::Mimo, "a") && bind(Format::Hermes, "a-b_c.d"));
        assert!(!bind(Format::Hermes, "a\"b") && !bind(Format::Harmony, "a"));
    }
}
