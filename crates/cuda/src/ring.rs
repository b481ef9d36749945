//! The host's side of a run: tokens that the kernel puts into a ring in host memory, and what the host
//! tells it.
//!
//! Protocol (`kernels/resident_run.cuh`): the device writes a word of 16 bytes whose tag is the
//! number of the token, counted from 1 since the ring began; the host reads a word once its tag is
//! the next number and says how many it has taken; the device waits, with a limit, while the ring is
//! full. Invariant: nothing is ever reset, so a word of a run before is never taken for a new one.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::layout::{HostWords, REASONS};

/// One word of the ring.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default)]
pub struct RingWord {
    token: u32,
    position: u32,
    step: u32,
    tag: u32,
}

/// A token that a run has given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// The token.
    pub token: u32,
    /// Its index in the sequence.
    pub position: u32,
    /// Tokens that its step drafted.
    pub drafted: u32,
    /// How many of them were right.
    pub kept: u32,
    /// Why the run has ended with it: index into [`REASONS`]; 0 while it goes on.
    pub reason: u32,
}

impl Given {
    /// Whether it is the run's last.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.reason != 0
    }

    /// Name of the reason.
    #[must_use]
    pub fn reason_name(&self) -> &'static str {
        REASONS.get(self.reason as usize).unwrap_or(&"?")
    }
}

/// Reader of a ring.
#[derive(Debug)]
pub struct Ring {
    words: *mut RingWord,
    mask: u32,
    host: *mut HostWords,
    taken: u32,
}

// SAFETY: one reader; the device's side is ordered by the words' tags.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring of `words`, a power of two, at its beginning.
    ///
    /// # Safety
    /// `words` and `host` are zeroed, stay allocated as long as this, and are written by one device
    /// (or emulator) only, apart from this.
    ///
    /// # Panics
    /// When `count` is not a power of two.
    #[must_use]
    pub unsafe fn new(words: *mut RingWord, count: usize, host: *mut HostWords) -> Self {
        assert!(count.is_power_of_two(), "a ring of {count} words");
        Self {
            words,
            mask: count as u32 - 1,
            host,
            taken: 0,
        }
    }

    /// Tokens taken since the ring began.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Words of the ring.
    #[must_use]
    pub fn words(&self) -> u32 {
        self.mask + 1
    }

    /// Addresses of the words and of what the host says, for the kernel's arguments.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64) {
        (self.words as u64, self.host as u64)
    }

    /// The next token, when it is there.
    pub fn take(&mut self) -> Option<Given> {
        let at = self.words.wrapping_add((self.taken & self.mask) as usize);
        // SAFETY: inside the ring, which lives as long as this (`new`).
        let tag = unsafe { AtomicU32::from_ptr(&raw mut (*at).tag) }.load(Ordering::Acquire);
        if tag != self.taken.wrapping_add(1) {
            return None;
        }
        // SAFETY: as above; the word was written at once, and is not written again before it is taken.
        let word = unsafe { at.read_volatile() };
        self.taken = tag;
        // SAFETY: allocated as long as this (`new`).
        unsafe { AtomicU32::from_ptr(&raw mut (*self.host).taken) }.store(tag, Ordering::Release);
        Some(Given {
            token: word.token,
            position: word.position,
            drafted: word.step & 255,
            kept: word.step >> 8 & 255,
            reason: word.step >> 16,
        })
    }

    /// Asks a run to end after its step, or takes that back.
    pub fn stop(&self, stop: bool) {
        // SAFETY: allocated as long as this (`new`).
        unsafe { AtomicU32::from_ptr(&raw mut (*self.host).stop) }
            .store(u32::from(stop), Ordering::Release);
    }
}
