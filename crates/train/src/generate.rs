//! Self-distillation: prompts in, the model's own answers out.
//!
//! A domain's prompts come from the corpus; the model also invents chat prompts, by continuing an
//! open user turn at temperature 1. Prompts are ordered by length so that a batch ends together.

use std::path::Path;

use serde_json::Value;

use crate::data::mix;
use crate::error::{Error, Result};
use crate::files;
use crate::net::Net;
use crate::recipe::Generate;
use crate::sample::{Answer, Request, sample};

/// Reads `prompts.json`: a list of `{domain, tokens}`.
fn prompts(path: &Path, domains: &[String]) -> Result<Vec<(u16, Vec<u16>)>> {
    let list = files::read_json(path)?;
    let mut out = Vec::new();
    for item in list.as_array().into_iter().flatten() {
        let Some(domain) = domains.iter().position(|d| item["domain"] == d.as_str()) else {
            continue;
        };
        let tokens = item["tokens"].as_array().into_iter().flatten();
        out.push((
            domain as u16,
            tokens.filter_map(Value::as_u64).map(|t| t as u16).collect(),
        ));
    }
    Ok(out)
}

/// Samples answers to the corpus's prompts and to invented ones.
pub fn generate(net: &Net, settings: &Generate, path: &Path) -> Result<Vec<Answer>> {
    tch::manual_seed(settings.seed as i64);
    let mut pool = prompts(path, &settings.domains)?;
    pool.sort_by_cached_key(|p| {
        mix(settings.seed ^ p.1.iter().fold(0, |h, &t| mix(h ^ u64::from(t))))
    });
    if settings.invented > 0 {
        let chat = settings
            .domains
            .iter()
            .position(|d| d == "chat")
            .unwrap_or(0) as u16;
        let invented = invent(net, settings, &pool, chat)?;
        eprintln!("{} invented prompts", invented.len());
        pool.splice(0..0, invented.into_iter().map(|tokens| (chat, tokens)));
    }
    let mut requests = Vec::new();
    for (domain, &wanted) in settings.answers.iter().enumerate() {
        let fits = |p: &&(u16, Vec<u16>)| {
            usize::from(p.0) == domain && (1..=settings.prompt_max).contains(&p.1.len())
        };
        let list: Vec<&(u16, Vec<u16>)> = pool.iter().filter(fits).collect();
        if list.is_empty() && wanted > 0 {
            let name = &settings.domains[domain];
            return Err(Error::Invalid(format!(
                "{}: no prompts for `{name}`",
                path.display()
            )));
        }
        let heats = &settings.temperatures;
        requests.extend((0..wanted).map(|i| Request {
            domain: domain as u16,
            tokens: list[i % list.len()].1.clone(),
            // Prompts come round again with another temperature.
            temperature: heats[(i + i / list.len()) % heats.len()],
        }));
    }
    // Greedy rows together: a batch of them needs no sampling.
    requests.sort_by_key(|r| (r.temperature > 0.0, r.tokens.len()));
    run(net, settings, &requests)
}

fn run(net: &Net, settings: &Generate, requests: &[Request]) -> Result<Vec<Answer>> {
    let mut out = Vec::new();
    let start = std::time::Instant::now();
    let mut written = 0;
    for part in requests.chunks(settings.batch) {
        let longest = part.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let length = settings.length.min(longest + settings.answer_max);
        let mut answers = sample(net, part, length, settings.top_p, settings.stop)?;
        for answer in &mut answers {
            answer.tokens.truncate(answer.prompt + settings.answer_max);
        }
        written += answers
            .iter()
            .map(|a| a.tokens.len() - a.prompt)
            .sum::<usize>();
        out.extend(answers);
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{} of {} answers, {written} tokens, {:.0} tok/s",
            out.len(),
            requests.len(),
            written as f64 / seconds
        );
    }
    // Back to a random order: files are cut, and held-out answers are the first.
    out.sort_by_cached_key(|a| mix(a.tokens.iter().fold(7, |h, &t| mix(h ^ u64::from(t)))));
    Ok(out)
}

/// Prompts that the model writes after the default system turn and an open user turn.
fn invent(
    net: &Net,
    settings: &Generate,
    pool: &[(u16, Vec<u16>)],
    chat: u16,
) -> Result<Vec<Vec<u16>>> {
    // The text around a question is what two prompts of the pool have in common.
    let mut of_chat = pool.iter().filter(|p| p.0 == chat).map(|p| p.1.as_slice());
    let (Some(a), Some(b)) = (of_chat.next(), of_chat.next()) else {
        return Ok(Vec::new());
    };
    let ahead = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let after = a
        .iter()
        .rev()
        .zip(b.iter().rev())
        .take_while(|(x, y)| x == y)
        .count();
    let (opening, closing) = (a[..ahead].to_vec(), a[a.len() - after..].to_vec());
    let requests: Vec<Request> = (0..settings.invented)
        .map(|_| Request {
            domain: chat,
            tokens: opening.clone(),
            temperature: 1.0,
        })
        .collect();
    let mut out = Vec::new();
    for part in requests.chunks(settings.batch) {
        for answer in sample(net, part, ahead + 160, 0.95, settings.stop)? {
            let ended = answer.tokens.last() == Some(&settings.stop);
            let written = answer.tokens.len() - answer.prompt;
            if ended && written > 6 {
                let mut tokens = answer.tokens[..answer.tokens.len() - 1].to_vec();
                tokens.extend(&closing);
                out.push(tokens);
            }
        }
    }
    out.sort_unstable();
    out.dedup();
    out.sort_by_cached_key(|t| mix(t.iter().fold(3, |h, &x| mix(h ^ u64::from(x)))));
    Ok(out)
}

/// Conversations of a token stream: documents in chat form, the last assistant turn as the answer.
#[must_use]
pub fn conversations(stream: &[u16], domain: u16, length_max: usize) -> Vec<Answer> {
    // <|im_start|>, "ass", "istant", line feed in this vocabulary.
    const OPENING: [u16; 4] = [1, 520, 9531, 198];
    let mut out = Vec::new();
    for document in stream.split(|&t| t == crate::corpus::SEPARATOR) {
        let turn = document.windows(4).rposition(|w| w == OPENING);
        let Some(prompt) = turn.map(|at| at + 4).filter(|_| document[0] == 1) else {
            continue;
        };
        let end = document.len().min(length_max);
        if prompt + 8 <= end {
            out.push(Answer {
                domain,
                greedy: true,
                prompt,
                tokens: document[..end].to_vec(),
            });
        }
    }
    out
}

/// Answers as one stream of documents, for `data::Corpus`.
#[must_use]
pub fn stream(answers: &[Answer]) -> Vec<u8> {
    let mut out = Vec::new();
    for answer in answers {
        for token in answer.tokens.iter().chain([&crate::corpus::SEPARATOR]) {
            out.extend(token.to_le_bytes());
        }
    }
    out
}
