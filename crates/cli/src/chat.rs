//! `kilotok chat`: a conversation on the terminal, streamed, with history.
//!
//! Invariant: Ctrl-C ends an answer and keeps what was said; the program goes on. The history is
//! what the template renders, so `/retry` and `/edit` are cuts of it.

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use anyhow::{Context, Result};
use engine::{Event, FinishReason, Received, Stats};
use model::chat_template::ChatTemplate;
use serde_json::Value;

use crate::args::ChatArgs;
use crate::failure::{bad_input, one_line};
use crate::session::{self, Session};
use crate::{interrupt, output, prompt, report};

const HELP: &str = "\
/retry         answer the last message again, with another seed
/edit TEXT     replace the last message and answer it
/system TEXT   set the system message and begin anew
/clear         begin anew
/stats         statistics of the last answer
/help          this
/quit          leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next.";

/// How often Ctrl-C is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs the command.
pub(crate) fn run(args: &ChatArgs) -> Result<()> {
    let session = Session::open(&args.model, &args.draft, true)?;
    let Some(template) = prompt::template(&args.template, &session.dir)? else {
        return bad_input(format!("{}: has no chat template", session.dir.display()));
    };
    interrupt::install()?;
    let mut chat = Chat {
        messages: prompt::opening(&args.template),
        seed: args.sampling.seed,
        terminal: std::io::stdin().is_terminal(),
        last: None,
        args,
        session,
        template,
    };
    if chat.terminal {
        let seconds = chat.session.load_ms / 1e3;
        eprintln!(
            "{} ready after {seconds:.2} s; /help lists the commands",
            chat.session.dir.display()
        );
    }
    chat.converse()
}

struct Chat<'a> {
    args: &'a ChatArgs,
    session: Session,
    template: ChatTemplate,
    messages: Vec<Value>,
    seed: u64,
    terminal: bool,
    last: Option<Stats>,
}

impl Chat<'_> {
    /// Takes lines until there are no more; what cannot be answered is said, and the next is taken.
    fn converse(&mut self) -> Result<()> {
        while let Some(line) = self.read_line()? {
            match self.take(line.trim()) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if output::is_closed_pipe(&error) => return Err(error),
                Err(error) => eprintln!("kilotok: {}", one_line(&error)),
            }
        }
        Ok(())
    }

    /// The next message; a closing backslash continues it. `None` at the end of input.
    fn read_line(&self) -> Result<Option<String>> {
        let mut whole = String::new();
        loop {
            if self.terminal {
                eprint!("{}", if whole.is_empty() { "> " } else { ". " });
            }
            interrupt::answering(false);
            let mut line = String::new();
            match std::io::stdin().lock().read_line(&mut line) {
                Ok(0) => return Ok(Some(whole).filter(|text| !text.is_empty())),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return bad_input("standard input: expected UTF-8 text, found other bytes");
                }
                Err(error) => return Err(error).context("standard input"),
            }
            match line.trim_end().strip_suffix('\\') {
                Some(part) => whole += &format!("{part}\n"),
                None => return Ok(Some(whole + &line)),
            }
        }
    }

    /// Handles a line; `false` ends the program.
    fn take(&mut self, line: &str) -> Result<bool> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "" => {}
            "/quit" | "/exit" => return Ok(false),
            "/help" => eprintln!("{HELP}"),
            "/clear" => self.messages = prompt::opening(&self.args.template),
            "/system" => self.messages = vec![prompt::message("system", rest.trim())],
            "/stats" => match &self.last {
                Some(stats) => eprintln!("[{}]", report::stats_line(stats, self.session.drafting)),
                None => eprintln!("no answer yet"),
            },
            "/retry" => {
                let text = self.cut_last_turn().context("nothing to answer again")?;
                self.seed = self.seed.wrapping_add(1);
                self.answer(&text)?;
            }
            "/edit" if rest.trim().is_empty() => eprintln!("/edit TEXT: the new text is missing"),
            "/edit" => {
                self.cut_last_turn().context("nothing to edit")?;
                self.answer(rest.trim())?;
            }
            _ if command.starts_with('/') => eprintln!("{command} is no command; /help lists them"),
            _ => self.answer(line)?,
        }
        Ok(true)
    }

    /// Removes the last user message and all after it; gives its text.
    fn cut_last_turn(&mut self) -> Option<String> {
        let at = self
            .messages
            .iter()
            .rposition(|message| message["role"] == "user")?;
        let text = self.messages[at]["content"].as_str()?.to_owned();
        self.messages.truncate(at);
        Some(text)
    }

    /// Answers a message. When it cannot be answered, the history stays as it was.
    fn answer(&mut self, text: &str) -> Result<()> {
        self.messages.push(prompt::message("user", text));
        match self.stream() {
            Ok((answer, stats)) => {
                self.messages.push(prompt::message("assistant", &answer));
                if self.terminal {
                    eprintln!("[{}]", report::stats_line(&stats, self.session.drafting));
                }
                self.last = Some(stats);
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    /// The conversation so far, as the model is asked.
    fn request(&self) -> Result<engine::Request> {
        let rendered = prompt::render(&self.template, &self.args.template, &self.messages)?;
        let tokens = self.session.encode(&rendered)?;
        let mut request = self
            .session
            .request(tokens, &self.args.sampling, &self.args.draft);
        request.sampling.seed = self.seed;
        Ok(request)
    }

    fn stream(&self) -> Result<(String, Stats)> {
        let request = self.request()?;
        interrupt::answering(true);
        let stream = self.session.engine.submit(request)?;
        let mut answer = String::new();
        loop {
            if interrupt::pressed() {
                stream.cancel();
            }
            let (text, end) = match stream.next_timeout(LOOK_EVERY) {
                Received::Event(Event::Piece(piece)) => (piece.text, None),
                Received::Event(Event::Finished(end)) => (end.text, Some((end.reason, end.stats))),
                Received::Event(Event::Prompt(_)) | Received::Nothing => continue,
                Received::End => anyhow::bail!("the engine stopped before the answer was complete"),
            };
            output::write(text.as_bytes())?;
            answer += &text;
            if let Some((reason, stats)) = end {
                output::write(b"\n")?;
                session::check_end(&reason)?;
                if reason == FinishReason::Cancelled {
                    eprintln!("(stopped)");
                }
                return Ok((answer, stats));
            }
        }
    }
}
