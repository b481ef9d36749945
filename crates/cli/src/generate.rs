//! `kilotok generate`: one prompt, one answer, streamed; or one JSON object.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::{Event, Finished, StepRecord};
use model::TokenId;
use model::decoder::TokenLogprobs;
use serde_json::{Value, json};

use crate::args::GenerateArgs;
use crate::failure::bad_input;
use crate::session::{self, Session};
use crate::{output, prompt, report};

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let text = match args.token_ids.is_empty() {
        true => Some(prompt::text(args.prompt.as_deref(), args.file.as_deref())?),
        false => None,
    };
    let trace = args.trace.as_deref().map(Trace::create).transpose()?;
    let session = Session::open(&args.model, &args.draft, text.is_some())?;
    let tokens = match &text {
        Some(text) => session.encode(&rendered(args, &session, text)?)?,
        None => args.token_ids.clone(),
    };
    if tokens.is_empty() {
        return bad_input("empty prompt: the text has no tokens");
    }
    let mut request = session.request(tokens, &args.sampling, &args.draft);
    request.logprobs = args.logprobs;
    request.trace = trace.is_some();
    let mut answer = Answer {
        trace,
        stream: !args.json,
        ..Answer::default()
    };
    for event in session.engine.submit(request)? {
        answer.take(event)?;
    }
    answer.finish(args, &session)
}

/// The prompt as the model reads it.
fn rendered(args: &GenerateArgs, session: &Session, text: &str) -> Result<String> {
    if args.raw {
        return Ok(text.to_owned());
    }
    let Some(template) = prompt::template(&args.template, &session.dir)? else {
        return bad_input(format!(
            "{}: has no chat template; use --raw",
            session.dir.display()
        ));
    };
    let mut messages = prompt::opening(&args.template);
    messages.push(prompt::message("user", text));
    prompt::render(&template, &args.template, &messages)
}

/// What has come so far.
#[derive(Default)]
struct Answer {
    text: String,
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
    end: Option<Finished>,
    trace: Option<Trace>,
    /// Print text as it comes.
    stream: bool,
}

impl Answer {
    fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Prompt(_) => {}
            Event::Piece(piece) => {
                if let (Some(trace), Some(step)) = (&mut self.trace, &piece.step) {
                    trace.step(step)?;
                }
                self.tokens.extend(piece.tokens);
                self.logprobs.extend(piece.logprobs);
                self.show(&piece.text)?;
            }
            Event::Finished(end) => {
                self.show(&end.text)?;
                self.end = Some(*end);
            }
        }
        Ok(())
    }

    fn show(&mut self, text: &str) -> Result<()> {
        self.text.push_str(text);
        if self.stream && !text.is_empty() {
            output::write(text.as_bytes())?;
        }
        Ok(())
    }

    fn finish(mut self, args: &GenerateArgs, session: &Session) -> Result<()> {
        if let Some(trace) = &mut self.trace {
            trace.close()?;
        }
        let end = self
            .end
            .take()
            .context("the engine stopped before the answer was complete")?;
        if self.stream && !self.text.ends_with('\n') {
            output::write(b"\n")?;
        }
        session::check_end(&end.reason)?;
        if args.json {
            return output::json(&self.json(&end, args, session));
        }
        if session.tokenizer.is_none() {
            let ids: Vec<String> = self.tokens.iter().map(ToString::to_string).collect();
            output::line(&ids.join(","))?;
        }
        eprintln!(
            "[{}; load {:.0} ms{}; ended by {}]",
            report::stats_line(&end.stats, session.drafting),
            session.load_ms,
            args.model.numbers.note("; "),
            end.reason.name()
        );
        Ok(())
    }

    fn json(&self, end: &Finished, args: &GenerateArgs, session: &Session) -> Value {
        let mut out = json!({
            "text": self.text,
            "token_ids": self.tokens,
            "finish_reason": end.reason.name(),
            "stats": report::stats_json(&end.stats, session.drafting),
        });
        out["stats"]["load_ms"] = report::round(session.load_ms).into();
        for (what, value) in args.model.numbers.given() {
            out["stats"][what] = value.into();
        }
        if args.logprobs.is_some() {
            let entry = |logprobs: &TokenLogprobs| {
                let top: Vec<Value> = logprobs
                    .top
                    .iter()
                    .map(|(id, x)| json!({"id": id, "logprob": x}))
                    .collect();
                json!({"logprob": logprobs.chosen, "top": top})
            };
            out["logprobs"] = self.logprobs.iter().map(entry).collect();
        }
        out
    }
}

/// The file of `--trace`: one JSON line a step.
struct Trace {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Trace {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(output::create("--trace", path)?),
        })
    }

    fn step(&mut self, step: &StepRecord) -> Result<()> {
        let line = json!({
            "step": step.step,
            "sequence": step.request,
            "position": step.position,
            "width": step.width,
            "drafted": step.drafted,
            "accepted": step.accepted,
            "bonus": step.bonus,
            "draft_us": report::round(step.draft_us),
            "verify_us": report::round(step.verify_us),
        });
        writeln!(self.file, "{line}")
            .with_context(|| format!("{}: cannot write", self.path.display()))
    }

    fn close(&mut self) -> Result<()> {
        self.file
            .flush()
            .with_context(|| format!("{}: cannot write", self.path.display()))
    }
}
