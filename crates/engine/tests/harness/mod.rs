//! Engines over scripted decoders, and answers read to their end.
#![allow(dead_code, unreachable_pub)]

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{
    Engine, EngineHandle, EngineOptions, Event, FinishReason, Piece, Request, Stats, Stream,
};
use model::TokenId;
use model::decoder::TokenLogprobs;
use model::detokenizer::ByteTokens;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub fn start(decoder: ScriptedOptions, script: Script, options: EngineOptions) -> EngineHandle {
    let decoder = Scripted::new(decoder, script);
    Engine::start(Box::new(decoder), Arc::new(ByteTokens), options).unwrap()
}

#[derive(Debug, Default)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt: Vec<Option<TokenLogprobs>>,
    pub pieces: Vec<Piece>,
    pub reason: Option<FinishReason>,
    pub stats: Stats,
}

pub fn read(stream: Stream) -> Answer {
    read_all(stream, 1).remove(0)
}

pub fn read_all(stream: Stream, samples: usize) -> Vec<Answer> {
    let mut answers: Vec<Answer> = (0..samples).map(|_| Answer::default()).collect();
    for event in stream {
        match event {
            Event::Prompt(rows) => answers[0].prompt = rows,
            Event::Piece(piece) => {
                let answer = &mut answers[piece.sample as usize];
                assert!(answer.reason.is_none(), "a piece after the end");
                answer.text += &piece.text;
                answer.tokens.extend(&piece.tokens);
                answer.logprobs.extend(piece.logprobs.iter().cloned());
                answer.pieces.push(piece);
            }
            Event::Finished(end) => {
                let answer = &mut answers[end.sample as usize];
                answer.text += &end.text;
                assert!(answer.reason.replace(end.reason).is_none(), "two ends");
                answer.stats = end.stats;
            }
        }
    }
    answers
}

pub fn ask(handle: &EngineHandle, request: Request) -> Answer {
    read(handle.submit(request).unwrap())
}

/// A greedy request of `tokens` tokens.
pub fn request(prompt: &[TokenId], tokens: u32) -> Request {
    let mut request = Request::new(prompt.to_vec());
    request.stop.max_tokens = Some(tokens);
    request
}

/// Waits until nothing runs.
pub fn settle(handle: &EngineHandle) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let metrics = handle.metrics();
        if metrics.running == 0 && metrics.waiting == 0 {
            return;
        }
        assert!(
            Instant::now() < end,
            "the engine does not settle: {metrics:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
