//! Load against a server that speaks OpenAI's chat API: closed loop (so many users, each asks again
//! when it was answered) or open loop (requests come at a rate, whatever the answers do).
//!
//! Refuses: judging the answers. Invariants: the same plan sends the same prompts at the same times;
//! every prompt differs from the start on, so that a prefix cache helps no one; a request that failed
//! is counted and never part of a figure of speed.

mod plot;
mod request;
mod summary;

pub use plot::plot;
pub use summary::{Spread, Summary};

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use request::{Ask, Failed, Sample, Target, ask};
use thiserror::Error;

/// A load that cannot be run.
#[derive(Debug, Error)]
pub enum LoadError {
    /// No address.
    #[error("{url}: {why}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The server does not answer as it should.
    #[error("{url}: {why}")]
    Server {
        /// The server.
        url: String,
        /// What it did.
        why: String,
    },
    /// The system refused threads.
    #[error("cannot start threads")]
    System(#[source] std::io::Error),
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrival {
    /// So many users at once.
    Users(u32),
    /// So many requests a second on average, with random gaps (a Poisson process).
    PerSecond(f64),
}

/// What to send.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `http://host:port`, with or without `/v1`.
    pub url: String,
    /// Bearer token.
    pub api_key: Option<String>,
    /// Model to name; `None` is the first that the server names.
    pub model: Option<String>,
    /// Loads, one after the other.
    pub arrivals: Vec<Arrival>,
    /// Requests of each load.
    pub requests: usize,
    /// Texts to ask, round and round; empty asks random words.
    pub prompts: Vec<String>,
    /// Random words in a prompt.
    pub prompt_words: usize,
    /// Longest answer.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f64,
    /// Go on after the model's end token, so that all answers have one length.
    pub ignore_eos: bool,
    /// Of prompts and gaps.
    pub seed: u64,
}

/// One load's figures.
#[derive(Clone, Debug)]
pub struct Level {
    /// The load.
    pub arrival: Arrival,
    /// Its figures.
    pub summary: Summary,
}

/// Runs all loads; `done` hears of each as it ends. Returns the model's name and the loads.
///
/// # Errors
/// [`LoadError`]; requests that fail are counted, unless the very first does.
pub fn run(plan: &Plan, done: impl Fn(&Level)) -> Result<(String, Vec<Level>), LoadError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(LoadError::System)?;
    runtime.block_on(async {
        let target = Target::parse(&plan.url, plan.api_key.clone())?;
        let load = Arc::new(Load::open(plan, target).await?);
        let mut levels = Vec::new();
        for (turn, &arrival) in plan.arrivals.iter().enumerate() {
            let summary = load.run(arrival, turn).await;
            let level = Level { arrival, summary };
            done(&level);
            levels.push(level);
        }
        Ok((load.ask.model.clone(), levels))
    })
}

struct Load {
    target: Target,
    ask: Ask,
    plan: Plan,
}

/// What came of requests so far.
#[derive(Default)]
struct Results(Mutex<(Vec<Sample>, Vec<Failed>)>);

impl Results {
    fn push(&self, result: Result<Sample, Failed>) {
        let mut all = self.0.lock().unwrap_or_else(|poison| poison.into_inner());
        match result {
            Ok(sample) => all.0.push(sample),
            Err(failed) => all.1.push(failed),
        }
    }
}

impl Load {
    /// Finds the model, and asks once: a server that refuses the fields beyond OpenAI's is asked
    /// without them from then on.
    async fn open(plan: &Plan, target: Target) -> Result<Self, LoadError> {
        let model = match &plan.model {
            Some(model) => model.clone(),
            None => target.first_model().await?,
        };
        let ask = Ask {
            model,
            prompt: String::new(),
            max_tokens: plan.max_tokens,
            temperature: plan.temperature,
            ignore_eos: plan.ignore_eos,
            extras: true,
        };
        let plan = plan.clone();
        let mut load = Self { target, ask, plan };
        let mut first = load.send(usize::MAX).await;
        if matches!(&first, Err(failed) if [400, 422].contains(&failed.status)) {
            load.ask.extras = false;
            first = load.send(usize::MAX).await;
        }
        match first {
            Ok(_) => Ok(load),
            Err(failed) => Err(LoadError::Server {
                url: load.plan.url.clone(),
                why: failed.to_string(),
            }),
        }
    }

    async fn send(&self, number: usize) -> Result<Sample, Failed> {
        let prompt = self.plan.prompt(number);
        ask(
            &self.target,
            &Ask {
                prompt,
                ..self.ask.clone()
            },
        )
        .await
    }

    async fn run(self: &Arc<Self>, arrival: Arrival, turn: usize) -> Summary {
        let results = Arc::new(Results::default());
        let start = Instant::now();
        match arrival {
            Arrival::Users(users) => self.closed(users, turn, &results).await,
            Arrival::PerSecond(rate) => self.open_loop(rate, turn, &results).await,
        }
        let wall = start.elapsed();
        let all = std::mem::take(&mut *results.0.lock().unwrap_or_else(|p| p.into_inner()));
        let (samples, failures) = all;
        let refused = failures
            .iter()
            .filter(|failed| failed.status == 429)
            .count();
        Summary {
            refused,
            failed: failures.len() - refused,
            first_failure: failures.first().map(|failed| failed.why.clone()),
            ..Summary::of(&samples, wall)
        }
    }

    async fn closed(self: &Arc<Self>, users: u32, turn: usize, results: &Arc<Results>) {
        let next = Arc::new(AtomicUsize::new(0));
        let user = |_| {
            let (load, next, results) = (Arc::clone(self), Arc::clone(&next), Arc::clone(results));
            tokio::spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= load.plan.requests {
                        return;
                    }
                    results.push(load.send(turn * load.plan.requests + number).await);
                }
            })
        };
        let users: Vec<_> = (0..users).map(user).collect();
        for user in users {
            let _ = user.await;
        }
    }

    async fn open_loop(self: &Arc<Self>, rate: f64, turn: usize, results: &Arc<Results>) {
        let mut random = Random(self.plan.seed ^ turn as u64);
        let mut at = tokio::time::Instant::now();
        let mut open = Vec::new();
        for number in 0..self.plan.requests {
            tokio::time::sleep_until(at).await;
            let (load, results) = (Arc::clone(self), Arc::clone(results));
            open.push(tokio::spawn(async move {
                results.push(load.send(turn * load.plan.requests + number).await);
            }));
            let gap_s = -(1.0 - random.unit()).ln() / rate;
            at += Duration::from_secs_f64(gap_s.min(3600.0));
        }
        for request in open {
            let _ = request.await;
        }
    }
}

/// Words of random prompts.
const WORDS: [&str; 16] = [
    "river", "count", "light", "seven", "garden", "write", "stone", "table", "answer", "north",
    "paper", "green", "engine", "story", "window", "bread",
];

impl Plan {
    /// Prompt of request `number`.
    fn prompt(&self, number: usize) -> String {
        if !self.prompts.is_empty() {
            return self.prompts[number % self.prompts.len()].clone();
        }
        let mut random = Random(self.seed ^ (number as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let word = |_| WORDS[(random.next() % WORDS.len() as u64) as usize];
        let words: Vec<&str> = (0..self.prompt_words).map(word).collect();
        words.join(" ")
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to but not 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
