//! Generation defaults of a checkpoint: `generation_config.json`, and for the end tokens also
//! `config.json`. Released files contradict themselves (`do_sample: false` beside temperature 1 and
//! top-p 0.95), so `do_sample` counts only where no temperature is given.

use std::path::Path;

use serde_json::{Map, Value};

use crate::TokenId;
use crate::error::{self, ModelError};
use crate::sampling::SamplingParams;

/// What to use where a request does not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end an answer, ascending.
    pub eos_ids: Vec<TokenId>,
    /// Put before a prompt that has no template; most models of the family have none.
    pub bos_id: Option<TokenId>,
    /// Distribution; everything not in the file is off.
    pub sampling: SamplingParams,
    /// Answer length the model's makers suggest.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Reads the two files from a checkpoint's directory; either may be missing.
    ///
    /// # Errors
    /// [`ModelError::File`]: not JSON, or a field of another type or out of range (ids from
    /// `vocab_size` on included).
    pub fn open(dir: &Path, vocab_size: u32) -> Result<Self, ModelError> {
        let path = dir.join("generation_config.json");
        let object =
            |path: &Path| match error::read_text_if_there(path, error::TEXT_JSON_BYTES_MAX)? {
                Some(text) => error::parse_object(path, &text),
                None => Ok(Map::new()),
            };
        let fields = object(&path)?;
        let reader = Reader {
            path: &path,
            fields: &fields,
        };
        let mut defaults = reader.defaults(vocab_size)?;
        if defaults.eos_ids.is_empty() {
            let path = dir.join("config.json");
            let fields = object(&path)?;
            defaults.eos_ids = Reader {
                path: &path,
                fields: &fields,
            }
            .ids("eos_token_id", vocab_size)?;
        }
        Ok(defaults)
    }
}

struct Reader<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn defaults(&self, vocab_size: u32) -> Result<GenerationDefaults, ModelError> {
        let greedy = self.fields.get("do_sample") == Some(&Value::Bool(false));
        let off = SamplingParams::default();
        let temperature = self.number("temperature", 0.0, 1e4)?;
        let sampling = SamplingParams {
            temperature: temperature.unwrap_or(if greedy || self.fields.is_empty() {
                0.0
            } else {
                1.0
            }),
            top_k: self.count("top_k")?.unwrap_or(off.top_k),
            top_p: self.number("top_p", 0.0, 1.0)?.unwrap_or(off.top_p),
            min_p: self.number("min_p", 0.0, 1.0)?.unwrap_or(off.min_p),
            repetition_penalty: self
                .number("repetition_penalty", 1e-3, 1e3)?
                .unwrap_or(off.repetition_penalty),
            ..off
        };
        Ok(GenerationDefaults {
            eos_ids: self.ids("eos_token_id", vocab_size)?,
            bos_id: self.ids("bos_token_id", vocab_size)?.first().copied(),
            sampling,
            max_new_tokens: self.count("max_new_tokens")?,
        })
    }

    fn field(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, found: &Value) -> ModelError {
        ModelError::file(
            self.path,
            format!("field `{name}`: expected {expected}, found {found}"),
        )
    }

    fn number(&self, name: &str, min: f64, max: f64) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.field(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if (min..=max).contains(&x) => Ok(Some(x as f32)),
            _ => Err(self.wrong(name, &format!("a number from {min} to {max}"), value)),
        }
    }

    fn count(&self, name: &str) -> Result<Option<u32>, ModelError> {
        let Some(value) = self.field(name) else {
            return Ok(None);
        };
        match value.as_u64().map(u32::try_from) {
            Some(Ok(n)) => Ok(Some(n)),
            _ => Err(self.wrong(name, "a count", value)),
        }
    }

    /// One token id or a list of them; sorted, each once.
    fn ids(&self, name: &str, vocab_size: u32) -> Result<Vec<TokenId>, ModelError> {
        let Some(value) = self.field(name) else {
            return Ok(Vec::new());
        };
        let list = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::new();
        for entry in list {
            match entry.as_u64() {
                Some(id) if id < u64::from(vocab_size) => ids.push(id as TokenId),
                _ => return Err(self.wrong(name, &format!("token ids below {vocab_size}"), entry)),
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(generation: &str, config: &str) -> Result<GenerationDefaults, ModelError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        GenerationDefaults::open(dir.path(), 100)
    }

    #[test]
    fn temperature_wins_over_do_sample() {
        let text =
            r#"{"do_sample": false, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 2048}"#;
        let defaults = open(text, r#"{"eos_token_id": 7}"#).unwrap();
        assert_eq!(
            (defaults.sampling.temperature, defaults.sampling.top_p),
            (1.0, 0.95)
        );
        assert_eq!(
            (defaults.eos_ids, defaults.max_new_tokens),
            (vec![7], Some(2048))
        );
        assert_eq!(
            open(r#"{"do_sample": false}"#, "{}")
                .unwrap()
                .sampling
                .temperature,
            0.0
        );
    }

    #[test]
    fn end_tokens_are_one_or_many() {
        let defaults = open(r#"{"eos_token_id": [9, 3, 9]}"#, r#"{"eos_token_id": 7}"#).unwrap();
        assert_eq!(defaults.eos_ids, [3, 9]);
    }

    #[test]
    fn wrong_fields_are_named() {
        for (text, part) in [
            (
                r#"{"eos_token_id": 100}"#,
                "field `eos_token_id`: expected token ids below 100, found 100",
            ),
            (
                r#"{"top_p": 2}"#,
                "field `top_p`: expected a number from 0 to 1, found 2",
            ),
            (
                r#"{"top_k": -1}"#,
                "field `top_k`: expected a count, found -1",
            ),
            ("[]", "expected a JSON object"),
            ("{", "text that is not JSON"),
        ] {
            let message = open(text, "{}").unwrap_err().to_string();
            assert!(
                message.contains(part) && message.contains("generation_config.json"),
                "{message}"
            );
        }
    }
}
