//! A sign of life that a computation gives from inside its long calls.
//!
//! Owns one time: that of the last beat. Any thread may read it, at no cost to the one that beats. Refuses
//! to judge: how long a silence is too long is the reader's business.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When a computation last showed that it goes on.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    last_us: AtomicU64,
    beats: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last_us: AtomicU64::new(0),
            beats: AtomicU64::new(0),
        }
    }
}

impl Heartbeat {
    /// Says: alive now. About 50 ns, so not for the innermost loops.
    pub fn beat(&self) {
        let now = self.start.elapsed().as_micros() as u64;
        self.last_us.store(now, Ordering::Release);
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Time since the last beat, or since it was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        let last = Duration::from_micros(self.last_us.load(Ordering::Acquire));
        self.start.elapsed().saturating_sub(last)
    }

    /// Beats so far.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }
}
