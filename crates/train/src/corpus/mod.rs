//! Builds the training text: documents from public packages, without duplicates and without any text
//! that evaluation uses, tokenised once.
//!
//! Owns the layout of a corpus directory: `DOMAIN.u16`, `DOMAIN.eval.u16`, `prompts.json`,
//! `manifest.json` with a SHA-256 for each. Invariants: a document that shares 13 words in a row with
//! an evaluation file is dropped, by comparison and not by trust; the result depends on the sources
//! alone.

mod chat;
mod code;
mod maths;
mod overlap;
pub mod pack;
pub mod prompts;
mod requests;
mod tools;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::files;

/// A piece of text of one domain.
#[derive(Clone, Debug)]
pub struct Document {
    domain: &'static str,
    text: String,
    /// The text up to where a model would answer; such documents also serve as prompts.
    prompt: Option<String>,
}

/// Where sources lie and what to leave out.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Directory with `wheels/*.whl`, `gsm8k/train.jsonl`, `t0/*.jsonl`, `dstc8/*.json`.
    pub root: PathBuf,
    /// Prompt files whose text must not occur.
    pub exclude: Vec<PathBuf>,
    /// tokenizer.json.
    pub tokenizer: PathBuf,
    /// Training tokens a domain at most.
    pub tokens_max: usize,
}

/// What ends a document.
pub const SEPARATOR: u16 = 0;
const EVAL_TOKENS: usize = 400_000;

/// Builds the corpus into `out`.
pub fn build(sources: &Sources, out: &Path) -> Result<()> {
    let overlap = overlap::Overlap::read(&sources.exclude)?;
    let tokenizer = Tokenizer::from_file(&sources.tokenizer)
        .map_err(|e| Error::Invalid(format!("{}: {e}", sources.tokenizer.display())))?;
    let mut manifest = BTreeMap::new();
    let mut prompts = Vec::new();
    for (domain, collect) in [
        (
            "code",
            code::documents as fn(&Path) -> Result<Vec<Document>>,
        ),
        ("math", maths::documents),
        ("tools", tools::documents),
        ("chat", chat::documents),
    ] {
        let documents = collect(&sources.root)?;
        let found = documents.len();
        let mut seen = HashSet::new();
        let (mut kept, mut overlapping) = (Vec::new(), 0);
        for document in documents {
            if !seen.insert(fingerprint(&document.text)) {
                continue;
            }
            if overlap.contains(&document.text.replace(maths::TAIL, " ")) {
                overlapping += 1;
                continue;
            }
            kept.push(document);
        }
        // Sources in a fixed shuffle, so that a prefix of the stream is a sample of the whole.
        kept.sort_by_key(|d| crate::data::mix(fingerprint(&d.text)));
        let about = write_domain(
            domain,
            &kept,
            &tokenizer,
            sources.tokens_max,
            out,
            &mut prompts,
        )?;
        eprintln!(
            "{domain}: {found} documents, {} kept, {overlapping} overlap, {about}",
            kept.len()
        );
        manifest.insert(
            domain,
            json!({"documents": found, "kept": kept.len(),
            "overlapping": overlapping, "files": about}),
        );
    }
    write_prompts(&prompts, &tokenizer, out, &mut manifest)?;
    files::write_json(&out.join("manifest.json"), &json!(manifest))
}

/// Hash of the words: white space and case do not make a document new.
fn fingerprint(text: &str) -> u64 {
    text.split_whitespace()
        .flat_map(|w| w.bytes().chain([b' ']))
        .fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(b.to_ascii_lowercase())).wrapping_mul(0x100_0000_01b3)
        })
}

fn write_domain(
    domain: &str,
    documents: &[Document],
    tokenizer: &Tokenizer,
    tokens_max: usize,
    out: &Path,
    prompts: &mut Vec<Document>,
) -> Result<Value> {
    let (mut train, mut eval): (Vec<u16>, Vec<u16>) = (Vec::new(), Vec::new());
    for part in documents.chunks(2000) {
        let texts: Vec<&str> = part.iter().map(|d| d.text.as_str()).collect();
        let encoded = tokenizer
            .encode_batch(texts, false)
            .map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
        for (document, tokens) in part.iter().zip(encoded) {
            let held = fingerprint(&document.text).is_multiple_of(50) && eval.len() < EVAL_TOKENS;
            let to = if held { &mut eval } else { &mut train };
            to.extend(tokens.get_ids().iter().map(|&t| t as u16));
            to.push(SEPARATOR);
            if !held && document.prompt.is_some() {
                prompts.push(document.clone());
            }
        }
        if train.len() > tokens_max {
            break;
        }
    }
    let mut about = json!({});
    for (name, tokens) in [
        (format!("{domain}.u16"), train),
        (format!("{domain}.eval.u16"), eval),
    ] {
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        files::write(&out.join(&name), &bytes)?;
        about[name] = json!({"tokens": tokens.len(), "sha256": files::hash(&bytes)});
    }
    Ok(about)
}

fn write_prompts(
    prompts: &[Document],
    tokenizer: &Tokenizer,
    out: &Path,
    manifest: &mut BTreeMap<&str, Value>,
) -> Result<()> {
    const EACH: usize = 30_000;
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let mut list = Vec::new();
    for document in prompts {
        let count = taken.entry(document.domain).or_default();
        let Some(prompt) = document.prompt.as_deref().filter(|_| *count < EACH) else {
            continue;
        };
        let encoded = tokenizer
            .encode(prompt, false)
            .map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
        *count += 1;
        list.push(json!({"domain": document.domain, "tokens": encoded.get_ids()}));
    }
    let bytes = serde_json::to_vec(&list).map_err(|e| Error::Invalid(e.to_string()))?;
    files::write(&out.join("prompts.json"), &bytes)?;
    manifest.insert(
        "prompts",
        json!({"count": taken, "sha256": files::hash(&bytes)}),
    );
    Ok(())
}

/// The base model's chat form: the default system turn, one question, one answer.
fn conversation(domain: &'static str, system: Option<&str>, user: &str, answer: &str) -> Document {
    let prompt = format!(
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        system.unwrap_or(SYSTEM)
    );
    Document {
        domain,
        text: format!("{prompt}{answer}<|im_end|>\n"),
        prompt: Some(prompt),
    }
}

/// The base model's default system message.
pub const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

/// Text of every member of every wheel under `root/wheels` whose name ends so.
fn wheel_files(root: &Path, endings: &[&str]) -> Result<Vec<(String, String)>> {
    use std::io::Read;
    let directory = root.join("wheels");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&directory)
        .map_err(crate::error::io(&directory))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "whl"))
        .collect();
    paths.sort();
    let mut out = Vec::new();
    for path in paths {
        let broken = |e: zip::result::ZipError| Error::Invalid(format!("{}: {e}", path.display()));
        let file = std::fs::File::open(&path).map_err(crate::error::io(&path))?;
        let mut archive = zip::ZipArchive::new(file).map_err(broken)?;
        for i in 0..archive.len() {
            let mut member = archive.by_index(i).map_err(broken)?;
            if !endings.iter().any(|e| member.name().ends_with(e)) || member.size() > 8 << 20 {
                continue;
            }
            let (name, mut text) = (member.name().to_owned(), String::new());
            if member.read_to_string(&mut text).is_ok() {
                out.push((name, text));
            }
        }
    }
    Ok(out)
}
