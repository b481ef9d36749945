//! What the engine adds to a decoder that makes 8 tokens every 4 ms:
//! `cargo bench -p engine --bench overhead`. The decoder is scripted and sleeps; its rate is
//! measured, not assumed, because a sleep overshoots. One thread reads all streams, woken through
//! their hooks, as the executor of a server would.

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{DraftWidth, Engine, EngineHandle, EngineOptions, Event, Received, Request, Stream};
use model::detokenizer::ByteTokens;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const TOKENS: u32 = 4000;

fn main() {
    for streams in [1usize, 64] {
        let engine = start();
        let (wake, woken) = channel();
        let start = Instant::now();
        let open: Vec<Stream> = (0..streams)
            .map(|i| {
                let wake = wake.clone();
                let mut request = Request::new(vec![1; 16]);
                request.stop.max_tokens = Some(TOKENS);
                request.stop.stop_strings = vec!["never said".to_owned()];
                request.draft = DraftWidth::Fixed(8);
                request.notify = Some(Arc::new(move || {
                    let _ = wake.send(i);
                }));
                engine.submit(request).expect("room in the queue")
            })
            .collect();
        let pieces = read(&open, &woken);
        let wall_us = start.elapsed().as_secs_f64() * 1e6;
        report(streams, pieces, wall_us, &engine);
    }
}

fn start() -> EngineHandle {
    let mut options = ScriptedOptions {
        step_time: Duration::from_millis(4),
        ..ScriptedOptions::default()
    };
    options.limits.pages = 64 * 1024;
    let decoder = Scripted::new(options, Script::text("The quick brown fox. "));
    let options = EngineOptions {
        calibrate: false,
        ..EngineOptions::default()
    };
    Engine::start(Box::new(decoder), Arc::new(ByteTokens), options).expect("a thread")
}

fn read(open: &[Stream], woken: &Receiver<usize>) -> usize {
    let (mut pieces, mut ended) = (0, 0);
    while ended < open.len() {
        let i = woken.recv().expect("the engine holds the other end");
        while let Received::Event(event) = open[i].try_next() {
            pieces += usize::from(matches!(event, Event::Piece(_)));
            ended += usize::from(matches!(event, Event::Finished(_)));
        }
    }
    pieces
}

fn report(streams: usize, pieces: usize, wall_us: f64, engine: &EngineHandle) {
    let metrics = engine.metrics();
    println!(
        "{streams:3} streams: {:.0} tokens/s, {pieces} pieces, {:.2} % of the decoder's rate, \
         {:.1} us of delivery a step",
        streams as f64 * f64::from(TOKENS) / wall_us * 1e6,
        100.0 * metrics.step_us_total / wall_us,
        metrics.host_us_total / metrics.steps_total as f64,
    );
}
