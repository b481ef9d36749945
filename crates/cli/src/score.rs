//! `kilotok score`: log-probabilities that the model gives to tokens that are already there.

use anyhow::Result;
use model::decoder::{DecodeError, Tap};
use model::tokenizer::Tokenizer;
use model::{Config, Decoder, TokenId};
use serde_json::json;

use crate::args::ScoreArgs;
use crate::failure::bad_input;
use crate::progress::Progress;
use crate::{backend, model_dir, output, prompt};

/// Tokens computed between two looks at the progress.
const CHUNK: usize = 256;

/// Scores of `n` tokens.
struct Scores {
    /// `n - 1` natural logarithms: entry `i` is of token `i + 1` given tokens `0..=i`.
    logprobs: Vec<f64>,
    /// `n` ids: the most probable token after each.
    argmax: Vec<TokenId>,
}

/// Runs the command.
pub(crate) fn run(args: &ScoreArgs) -> Result<()> {
    let dir = model_dir::resolve(args.model.model.as_deref())?;
    let config = Config::load(&dir)?;
    let tokenizer = match args.token_ids.is_empty() {
        true => Some(Tokenizer::open(&dir, config.vocab_size as u32)?),
        false => None,
    };
    let tokens = match &tokenizer {
        Some(tokenizer) => {
            tokenizer.encode(&prompt::text(args.prompt.as_deref(), args.file.as_deref())?)?
        }
        None => args.token_ids.clone(),
    };
    if tokens.is_empty() {
        return bad_input("empty prompt: there are no tokens to score");
    }
    let options = backend::Options {
        device: args.model.device,
        threads: args.model.threads,
        context_tokens: args.model.max_model_len,
        sequences: 1,
        kv_tokens: Some(tokens.len()),
        numbers: args.model.numbers,
        draft: None,
        replay: None,
    };
    let mut decoder = backend::open(&dir, &config, &options)?;
    let scores = score(decoder.as_mut(), &tokens)?;
    if args.json {
        return output::json(
            &json!({"next_token_logprobs": scores.logprobs, "argmax": scores.argmax}),
        );
    }
    print(&tokens, &scores, tokenizer.as_ref())
}

fn score(decoder: &mut dyn Decoder, tokens: &[TokenId]) -> Result<Scores> {
    let limit = decoder.limits().context_tokens;
    if tokens.len() > limit as usize {
        return Err(DecodeError::ContextFull {
            wanted: tokens.len() as u64,
            limit,
        }
        .into());
    }
    let mut scores = Scores {
        logprobs: Vec::new(),
        argmax: Vec::new(),
    };
    let mut damaged = None;
    let mut progress = Progress::new("scoring", tokens.len() as u64);
    let sequence = decoder.open()?;
    for chunk in tokens.chunks(CHUNK) {
        let mut sink = |position: u32, logits: &[f32]| {
            let (argmax, log_sum) = summary(logits);
            if !log_sum.is_finite() {
                damaged.get_or_insert(position);
            }
            scores.argmax.push(argmax);
            if let Some(&next) = tokens.get(position as usize + 1) {
                scores
                    .logprobs
                    .push(f64::from(logits[next as usize]) - log_sum);
            }
        };
        decoder.tap(sequence, chunk, Tap::Logits(&mut sink))?;
        progress.set(scores.argmax.len() as u64);
    }
    match damaged {
        Some(position) => Err(DecodeError::NotFinite {
            what: "logits",
            position,
        }
        .into()),
        None => Ok(scores),
    }
}

/// The first largest logit's index, and the logarithm of the sum of exponentials.
fn summary(logits: &[f32]) -> (TokenId, f64) {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    let max = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    (best as TokenId, max + sum.ln())
}

fn print(tokens: &[TokenId], scores: &Scores, tokenizer: Option<&Tokenizer>) -> Result<()> {
    let name = |token: TokenId| match tokenizer {
        Some(tokenizer) => format!(
            "{token} {:?}",
            String::from_utf8_lossy(tokenizer.token_bytes(token))
        ),
        None => token.to_string(),
    };
    let mut text = format!(
        "{:>10}  token\n{:>10}  {}\n",
        "logprob",
        "",
        name(tokens[0])
    );
    for (token, logprob) in tokens[1..].iter().zip(&scores.logprobs) {
        text += &format!("{logprob:>10.4}  {}\n", name(*token));
    }
    if !scores.logprobs.is_empty() {
        let mean = scores.logprobs.iter().sum::<f64>() / scores.logprobs.len() as f64;
        text += &format!(
            "perplexity {:.4} over {} tokens\n",
            (-mean).exp(),
            scores.logprobs.len()
        );
    }
    output::write(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sum_is_exact_for_large_logits() {
        let (argmax, sum) = summary(&[1000.0, 1001.0, 1001.0, -1000.0]);
        assert_eq!(argmax, 1);
        let expected = 1001.0 + (2.0 + (-1.0f64).exp()).ln();
        assert!((sum - expected).abs() < 1e-12);
        assert!(!summary(&[f32::NAN, 1.0]).1.is_finite());
    }
}
