//! A server that says the same text over and over, for tests of pages and clients without a model:
//! `cargo run -p server --example scripted -- [PORT] [STEP_US] [ADMISSION_DB]`. Speeds are simulated.

use engine::scripted::{Drafter, Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use server::admission::SeatRules;
use server::text::{ByteCodec, ModelText};
use server::{Served, ServerError, Settings};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const TEXT: &str = "Here is a **scripted** answer.\n\n```rust\nfn main() {\n    println!(\"hello\");\n}\n\
                    ```\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n";

/// The text over and over, after the template's `assistant\n`.
fn script() -> Script {
    let marker: Vec<u32> = "assistant\n".bytes().map(u32::from).collect();
    Script::Token(Arc::new(move |tokens| {
        let start = tokens.windows(marker.len()).rposition(|w| w == marker);
        let said = tokens.len() - start.map_or(0, |at| at + marker.len());
        match said >= 40 * TEXT.len() {
            true => ByteCodec::END,
            false => TEXT.as_bytes()[said % TEXT.len()].into(),
        }
    }))
}

fn main() -> Result<(), ServerError> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(8000);
    let step_us = arguments
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(4000);
    let admission = arguments.next().map(PathBuf::from);
    let mut limits = ScriptedOptions::default().limits;
    // A token is a byte here, and the instructions of a coding agent are 28,000.
    limits.context_tokens = 1 << 17;
    limits.pages = 1 << 15;
    let options = ScriptedOptions {
        limits,
        step_time: Duration::from_micros(step_us),
        drafter: Drafter::Sometimes(0.8),
        ..ScriptedOptions::default()
    };
    let text = ModelText::bytes(options.limits.vocab_size)?;
    let decoder = Scripted::new(options, script());
    let options = EngineOptions {
        calibrate: false,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(decoder), text.detokenizer(), options);
    let engine = engine.map_err(|source| ServerError::System {
        what: "engine thread",
        source,
    })?;
    let settings = Settings {
        port,
        model_name: "scripted".to_owned(),
        seats: SeatRules {
            seats: u32::from(admission.is_some()),
            ..SeatRules::default()
        },
        admission,
        ..Settings::default()
    };
    server::serve::start_logging(false);
    let served = Served::new(settings, engine, text)?;
    server::serve::run(served, |address| {
        eprintln!("ready at http://{address} (scripted)")
    })
}
