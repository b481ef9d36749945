//! What can go wrong, each with where it went wrong.

use std::path::PathBuf;

/// The trainer's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The trainer's error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A config, recipe or index says something that the trainer cannot do.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Field, expected, found.
        what: String,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{}: tensor `{name}`: {what}", path.display())]
    Tensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Expected, found.
        what: String,
    },
    /// The loss or a gradient is not a number; the last checkpoint stands.
    #[error("step {step}: {what} is not finite; the last good checkpoint is {}", checkpoint.display())]
    NotFinite {
        /// Optimizer steps done.
        step: u64,
        /// What is not finite.
        what: String,
        /// The checkpoint to resume from.
        checkpoint: PathBuf,
    },
    /// A recipe or an argument does not fit the data.
    #[error("{0}")]
    Invalid(String),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// Names the file in an I/O error.
pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}
