//! Which part of a model one GPU holds, and how. Owns no memory.

use crate::images::{Activations, Kv};
use crate::program::Caches;

/// Which part of a model a GPU gets.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// This GPU.
    pub rank: usize,
    /// GPUs of the group; those that are not there are looped back.
    pub ranks: usize,
    /// Positions of the caches.
    pub context: usize,
    /// What products take of their activations.
    pub activations: Activations,
    /// What the target's caches hold.
    pub kv: Kv,
}

impl Part {
    /// Its caches.
    #[must_use]
    pub fn caches(&self) -> Caches {
        Caches {
            context: self.context,
            kv: self.kv,
        }
    }
}
