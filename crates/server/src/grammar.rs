//! Structured output: JSON schemas, regular expressions, choices and Lark grammars as masks over the
//! vocabulary, through llguidance; and the limit on thinking, which is a mask too.
//!
//! Invariants: grammars are compiled off the engine's thread, within [`parser_limits`] and
//! [`COMPILE_LIMIT`]; the engine only clones a compiled one; a mask never leaves nothing to say (a
//! finished or failed grammar allows the end tokens). Masks apply to the target, and a draft is cut at
//! its first violation, so that output with drafting is that without.

use crate::error::ApiError;
use crate::text::Codec;
use engine::ConstraintFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use model::TokenId;
use model::decoder::Constraint;
use serde_json::Value;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

/// A grammar that takes longer to compile is refused.
pub(crate) const COMPILE_LIMIT: Duration = Duration::from_secs(10);

/// What a client can do where `oneOf` is refused.
const ONE_OF: &str = "oneOf whose branches may hold together is not supported: give the branches different types, or a \
    required property with another const in each, or use anyOf";

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

/// What an answer has to look like.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Grammar {
    /// A JSON schema.
    Schema(Value),
    /// A regular expression for the whole answer.
    Regex(String),
    /// A Lark grammar.
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub(crate) fn any_object() -> Self {
        Self::Schema(serde_json::json!({"type": "object"}))
    }

    /// One of several texts.
    pub(crate) fn choice(options: &[String]) -> Self {
        let quoted = options
            .iter()
            .map(|text| Value::from(text.as_str()).to_string());
        Self::Lark(format!("start: {}", quoted.collect::<Vec<_>>().join(" | ")))
    }

    /// Bytes of its text.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Schema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
        }
    }

    fn top_level(&self) -> TopLevelGrammar {
        match self {
            Self::Schema(schema) => {
                TopLevelGrammar::from_json_schema(crate::schema::compact(schema.clone()))
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        }
    }
}

/// What binds an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guide {
    /// After the thinking, if there is any.
    pub(crate) grammar: Option<Grammar>,
    /// Where the answer begins.
    pub(crate) thinking: Thinking,
    /// Most tokens of thinking.
    pub(crate) budget: Option<u32>,
}

/// Whether an answer begins with thinking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// It does not.
    #[default]
    No,
    /// The prompt has opened it.
    Open,
    /// The model opens it.
    Expected,
}

/// Makes grammars for one vocabulary.
pub(crate) struct Grammars {
    codec: Arc<dyn Codec>,
    eos: Arc<[TokenId]>,
    /// Built with the first grammar: the trie of a large vocabulary takes a moment.
    factory: OnceLock<Result<ParserFactory, String>>,
}

struct Environment {
    trie: TokTrie,
    codec: Arc<dyn Codec>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.codec.encode(text).unwrap_or_default()
        })
    }
}

fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000,
        max_grammar_size: 500_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

impl Grammars {
    pub(crate) fn new(codec: Arc<dyn Codec>, eos: &[TokenId]) -> Self {
        Self {
            codec,
            eos: eos.into(),
            factory: OnceLock::new(),
        }
    }

    fn factory(&self) -> Result<&ParserFactory, ApiError> {
        let built = self.factory.get_or_init(|| self.build());
        built
            .as_ref()
            .map_err(|error| ApiError::internal(format!("structured output: {error}")))
    }

    fn build(&self) -> Result<ParserFactory, String> {
        let vocab_size = self.codec.vocab_size();
        let eos = self.eos.first().copied();
        let eos = eos.ok_or("the model has no end token")?;
        let word = |token| {
            let mut bytes = self.codec.token_bytes(token);
            if self.codec.is_special(token) {
                bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
            bytes
        };
        let words: Vec<Vec<u8>> = (0..vocab_size).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, eos), &words);
        let codec = Arc::clone(&self.codec);
        let environment: TokEnv = Arc::new(Environment { trie, codec });
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = parser_limits();
        Ok(factory)
    }

    /// Compiles what binds an answer. Takes milliseconds to seconds: not for a thread that serves.
    pub(crate) fn compile(&self, guide: &Guide) -> Result<ConstraintFactory, ApiError> {
        let matcher = match &guide.grammar {
            Some(grammar) => Some(self.matcher(grammar)?),
            None => None,
        };
        let encode = |text| self.codec.encode(text).unwrap_or_default();
        let thought = Thought {
            state: match guide.thinking {
                Thinking::No => State::Answering,
                Thinking::Open => State::Thinking,
                Thinking::Expected if matcher.is_some() => State::Opening(0),
                Thinking::Expected => State::Thinking,
            },
            tail: Vec::new(),
            tokens: 0,
            closing: 0,
        };
        let shared = Arc::new(Shared {
            codec: Arc::clone(&self.codec),
            eos: Arc::clone(&self.eos),
            open: encode(THINK),
            close: encode(THINK_END),
            budget: guide.budget,
        });
        let matcher = Mutex::new(matcher);
        Ok(Arc::new(move || {
            let matcher = matcher.lock().unwrap_or_else(PoisonError::into_inner);
            Box::new(Guided {
                shared: Arc::clone(&shared),
                matcher: matcher.as_ref().map(Matcher::deep_clone),
                thought: thought.clone(),
            })
        }))
    }

    fn matcher(&self, grammar: &Grammar) -> Result<Matcher, ApiError> {
        let parser = self.factory()?.create_parser(grammar.top_level());
        let mut matcher = Matcher::new(parser);
        // The first mask finds what compiling alone does not: a lexer that explodes.
        let probe = matcher.compute_mask_or_eos();
        if let (Err(error), _) | (_, Some(error)) = (
            probe.map_err(|error| error.to_string()),
            matcher.get_error(),
        ) {
            let line = match error.lines().next().unwrap_or("it is not valid") {
                line if line.contains("oneOf constraints") => ONE_OF,
                line => line,
            };
            let message = format!("the grammar cannot be used: {line}");
            return Err(ApiError::invalid("response_format", message));
        }
        Ok(matcher)
    }
}

struct Shared {
    codec: Arc<dyn Codec>,
    eos: Arc<[TokenId]>,
    open: Vec<TokenId>,
    close: Vec<TokenId>,
    budget: Option<u32>,
}

/// Where the thinking stands.
#[derive(Clone)]
struct Thought {
    state: State,
    /// Last bytes, to see the end marker over token boundaries.
    tail: Vec<u8>,
    tokens: u32,
    /// Tokens of the end marker forced so far.
    closing: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many tokens of `<think>` are there.
    Opening(usize),
    Thinking,
    Answering,
}

struct Guided {
    shared: Arc<Shared>,
    matcher: Option<Matcher>,
    thought: Thought,
}

impl Thought {
    /// The one token that may come next, while one is forced.
    fn forced(&self, shared: &Shared) -> Option<TokenId> {
        match self.state {
            State::Opening(n) => shared.open.get(n).copied(),
            State::Thinking if shared.budget.is_some_and(|most| self.tokens >= most) => {
                shared.close.get(self.closing).copied()
            }
            State::Thinking | State::Answering => None,
        }
    }

    fn push(&mut self, token: TokenId, shared: &Shared) {
        let forced = self.forced(shared);
        match self.state {
            State::Opening(n) if n + 1 < shared.open.len() => self.state = State::Opening(n + 1),
            State::Opening(_) => self.state = State::Thinking,
            State::Thinking => {
                self.tokens += 1;
                self.closing += usize::from(forced.is_some());
                self.tail.extend(shared.codec.token_bytes(token));
                let end = THINK_END.as_bytes();
                if self.tail.windows(end.len()).any(|window| window == end) {
                    self.state = State::Answering;
                }
                let keep = self.tail.len().saturating_sub(end.len() - 1);
                self.tail.drain(..keep);
            }
            State::Answering => {}
        }
    }
}

impl Guided {
    /// Fills one row, given where the thinking stands.
    fn row(&mut self, thought: &Thought, row: &mut [u32]) {
        if let Some(token) = thought.forced(&self.shared) {
            row.fill(0);
            allow(row, token);
            return;
        }
        match (&mut self.matcher, thought.state) {
            (Some(matcher), State::Answering) => match matcher.compute_mask_or_eos() {
                Ok(mask) => self.answer_row(&mask, row),
                Err(_) => self.end_row(row),
            },
            (matcher, state) => {
                row.fill(u32::MAX);
                if matcher.is_some() && state != State::Answering {
                    self.shared.eos.iter().for_each(|token| forbid(row, *token));
                }
            }
        }
    }

    /// A grammar's mask; where it allows one end token all are.
    fn answer_row(&self, mask: &SimpleVob, row: &mut [u32]) {
        let words = mask.as_slice();
        let n = words.len().min(row.len());
        row[..n].copy_from_slice(&words[..n]);
        row[n..].fill(0);
        let eos = &self.shared.eos;
        if row.iter().all(|word| *word == 0) || eos.first().is_some_and(|e| mask.is_allowed(*e)) {
            eos.iter().for_each(|token| allow(row, *token));
        }
    }

    fn end_row(&self, row: &mut [u32]) {
        row.fill(0);
        self.shared.eos.iter().for_each(|token| allow(row, *token));
    }

    /// Moves the grammar past a token; the first end token stands for all.
    fn consume(&mut self, token: TokenId) {
        if let Some(matcher) = &mut self.matcher {
            let eos = self.shared.eos.contains(&token);
            let token = if eos { self.shared.eos[0] } else { token };
            if !matcher.is_stopped() {
                // A token the grammar forbids leaves it failed, and a failed one allows the end only.
                let _ = matcher.consume_token(token);
            }
        }
    }
}

impl Constraint for Guided {
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize {
        let words = masks.len() / (drafted.len() + 1);
        let mut thought = self.thought.clone();
        let mut consumed = 0;
        let mut usable = drafted.len() + 1;
        for i in 0..=drafted.len() {
            let row = &mut masks[i * words..(i + 1) * words];
            self.row(&thought, row);
            let Some(token) = drafted.get(i) else {
                break;
            };
            if !allowed(row, *token) {
                usable = i + 1;
                break;
            }
            // After its end a grammar allows end tokens, and takes none in.
            let open = self.matcher.as_ref().is_some_and(|m| !m.is_stopped());
            if thought.state == State::Answering && open {
                self.consume(*token);
                consumed += 1;
            }
            thought.push(*token, &self.shared);
        }
        if let Some(matcher) = &mut self.matcher
            && consumed > 0
        {
            let _ = matcher.rollback(consumed);
        }
        usable
    }

    fn commit(&mut self, tokens: &[TokenId]) {
        for token in tokens {
            if self.thought.state == State::Answering {
                self.consume(*token);
            }
            self.thought.push(*token, &self.shared);
        }
    }
}

fn allow(row: &mut [u32], token: TokenId) {
    if let Some(word) = row.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

fn forbid(row: &mut [u32], token: TokenId) {
    if let Some(word) = row.get_mut(token as usize / 32) {
        *word &= !(1 << (token % 32));
    }
}

fn allowed(row: &[u32], token: TokenId) -> bool {
    row.get(token as usize / 32)
        .is_some_and(|word| word >> (token % 32) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::ByteCodec;
    use serde_json::json;

    const VOCAB: u32 = 512;

    fn guide(grammar: Grammar) -> Guide {
        Guide {
            grammar: Some(grammar),
            ..Guide::default()
        }
    }

    fn start(guide: &Guide) -> Box<dyn Constraint> {
        let codec = Arc::new(ByteCodec { vocab_size: VOCAB });
        let grammars = Grammars::new(codec, &[ByteCodec::END, 300]);
        grammars.compile(guide).unwrap()()
    }

    fn rows(constraint: &mut dyn Constraint, drafted: &[TokenId]) -> Vec<Vec<u32>> {
        let words = VOCAB.div_ceil(32) as usize;
        let mut masks = vec![0; words * (drafted.len() + 1)];
        let usable = constraint.masks(drafted, &mut masks);
        masks
            .chunks(words)
            .take(usable)
            .map(<[u32]>::to_vec)
            .collect()
    }

    fn bytes(text: &str) -> Vec<TokenId> {
        text.bytes().map(TokenId::from).collect()
    }

    /// Always takes the smallest allowed token of `wish`, else the smallest allowed at all.
    fn speak(constraint: &mut dyn Constraint, wish: &str, limit: usize) -> String {
        let mut text = Vec::new();
        for i in 0..limit {
            let mask = &rows(constraint, &[])[0];
            let wished = wish.as_bytes().get(i).map(|b| TokenId::from(*b));
            let token = wished
                .filter(|t| allowed(mask, *t))
                .or_else(|| (0..VOCAB).find(|t| allowed(mask, *t)))
                .unwrap();
            constraint.commit(&[token]);
            let Ok(byte) = u8::try_from(token) else { break };
            text.push(byte);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn choices_and_regular_expressions_hold() {
        let options = ["yes".to_owned(), "no \"way\"".to_owned()];
        let mut constraint = start(&guide(Grammar::choice(&options)));
        assert_eq!(speak(constraint.as_mut(), "no", 50), "no \"way\"");
        let mut constraint = start(&guide(Grammar::Regex("[a-c]{3}[0-9]".to_owned())));
        assert_eq!(speak(constraint.as_mut(), "cxc", 50), "cac0");
    }

    #[test]
    fn drafts_are_cut_at_the_first_violation_and_leave_no_trace() {
        let mut constraint = start(&guide(Grammar::Regex("abcd".to_owned())));
        let before = rows(constraint.as_mut(), &bytes("abxd"));
        assert_eq!(before.len(), 3);
        assert!(allowed(&before[2], u32::from(b'c')));
        assert_eq!(rows(constraint.as_mut(), &bytes("abxd")), before);
        constraint.commit(&bytes("ab"));
        let after = rows(constraint.as_mut(), &bytes("cd"));
        assert_eq!(after.len(), 3);
        assert!(allowed(&after[2], ByteCodec::END) && allowed(&after[2], 300));
    }

    #[test]
    fn masks_of_a_draft_are_those_of_plain_decoding() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"},
            "b": {"enum": ["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false});
        let text = bytes(r#"{"a": -12, "b": "yy"}"#);
        let mut drafting = start(&guide(Grammar::Schema(schema.clone())));
        let mut plain = start(&guide(Grammar::Schema(schema)));
        for chunk in text.chunks(7) {
            let masks = rows(drafting.as_mut(), chunk);
            assert_eq!(masks.len(), chunk.len() + 1);
            for (mask, token) in masks.iter().zip(chunk) {
                assert_eq!(*mask, rows(plain.as_mut(), &[])[0]);
                plain.commit(&[*token]);
            }
            drafting.commit(chunk);
        }
        assert!(allowed(&rows(drafting.as_mut(), &[])[0], ByteCodec::END));
    }

    #[test]
    fn the_grammar_waits_for_the_thinking_and_the_budget_ends_it() {
        let guide = Guide {
            grammar: Some(Grammar::Regex("[0-9]".to_owned())),
            thinking: Thinking::Expected,
            budget: Some(4),
        };
        let mut constraint = start(&guide);
        let text = speak(constraint.as_mut(), "<think>abcdefgh", 60);
        assert_eq!(text, "<think>abcd</think>0");
    }

    #[test]
    fn grammars_that_explode_or_are_none_are_refused() {
        let codec = Arc::new(ByteCodec { vocab_size: VOCAB });
        let grammars = Grammars::new(codec, &[ByteCodec::END]);
        for grammar in [
            Grammar::Regex("(".to_owned()),
            Grammar::Lark("start: nothing".to_owned()),
            Grammar::Schema(json!({"type": "nonsense"})),
        ] {
            let refused = grammars.compile(&guide(grammar.clone()));
            let error = refused.map(|_| ()).unwrap_err();
            assert_eq!(error.status.as_u16(), 400, "{grammar:?}");
        }
    }
}
