//! A file mapped read-only into memory: the one place of this crate with `unsafe`.
//!
//! Invariant: the mapping lives as long as the value, and nothing in this crate writes the file.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::error::ModelError;

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Mapped(Mmap);

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let failed =
            |what: &str, e: std::io::Error| ModelError::file(path, format!("cannot {what}: {e}"));
        let file = File::open(path).map_err(|e| failed("open", e))?;
        // SAFETY: the mapping is read-only and private to this value. Truncating a checkpoint while
        // it is in use raises SIGBUS, as with every program that maps its input; the documentation
        // of the command line says not to.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| failed("map", e))?;
        Ok(Self(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn release(&self) {
        // SAFETY: the mapping is of a file and read-only, so dropped pages come back with the same
        // bytes when they are read again. Failure only costs memory.
        let _ = unsafe { self.0.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}
