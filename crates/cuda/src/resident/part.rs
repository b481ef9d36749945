//! Which part of a model one GPU holds, and how. Owns no memory.

use crate::program::Settings;

/// Which part of a model a GPU gets.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// This GPU.
    pub rank: usize,
    /// GPUs of the group; those that are not there are looped back.
    pub ranks: usize,
    /// Caches, and how numbers are kept.
    pub settings: Settings,
}

impl From<Settings> for Part {
    /// All of it.
    fn from(settings: Settings) -> Self {
        let (rank, ranks) = (0, 1);
        Self {
            rank,
            ranks,
            settings,
        }
    }
}
