//! When a server gives free memory back to the system (docs/reliability.md, *Memory under load*).
//!
//! Invariant: while somebody waits for an answer it happens once a minute at most, because others who allocate
//! wait meanwhile.

use std::time::{Duration, Instant};

use anyhow::Result;
use engine::EngineHandle;

/// How often free memory goes back to the system while requests keep coming.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(60);
/// How often it is looked whether anybody asks for anything.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// Gives free memory back to the system for as long as the process lives: when the last request has ended,
/// because nobody waits then, and once a minute while requests keep coming.
pub(crate) fn give_back(engine: EngineHandle) -> Result<()> {
    let thread = std::thread::Builder::new().name("heap".to_owned());
    thread.spawn(move || {
        let (mut given, mut steps_then) = (Instant::now(), 0);
        loop {
            std::thread::sleep(IDLE_LOOK);
            let now = engine.metrics();
            let idle = now.running + now.waiting == 0;
            let used = now.steps_total != steps_then;
            if (idle && used) || given.elapsed() >= GIVE_BACK_EVERY {
                cpu::heap::give_back();
                given = Instant::now();
                // What came during a busy time is given back once more at its end.
                steps_then = if idle { now.steps_total } else { 0 };
            }
        }
    })?;
    Ok(())
}
