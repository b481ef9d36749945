//! Which part of a model one GPU holds, and what its kernel is compiled for. Owns no memory.

use crate::images::{Activations, Kv, Shape};
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
    /// What products take of their activations; [`super::Resident::new`] is given an image that was compiled for it.
    pub activations: Activations,
    /// What the target's caches hold; the image is compiled for it too.
    pub kv: Kv,
}

impl Part {
    /// What the image of this part makes constant.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape::of(self.ranks)
            .with(self.activations)
            .with_kv(self.kv)
    }

    /// Its caches.
    #[must_use]
    pub fn caches(&self) -> Caches {
        Caches {
            context: self.context,
            kv: self.kv,
        }
    }
}
