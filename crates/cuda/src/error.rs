//! What can go wrong, one line each: what, where, expected, found.

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A shape that the kernels do not take.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// The quantity.
        what: &'static str,
        /// What the kernels take.
        expected: String,
        /// What was given.
        found: String,
    },
    /// No compiler, or it refused the source.
    #[error("compiling {kernel}: {reason}")]
    Compile {
        /// Source file.
        kernel: String,
        /// The compiler's words, or what was looked for.
        reason: String,
    },
    /// No compiler and no image that was compiled before.
    #[error("no image of {kernel} for {arch}: {reason}")]
    NoImage {
        /// Source file.
        kernel: String,
        /// Architecture.
        arch: String,
        /// What was tried.
        reason: String,
    },
    /// The compiled kernel would use memory that a step must not touch.
    #[error("{kernel}: {bytes} bytes of {what} (spills make every step slower; expected 0)")]
    Spill {
        /// Kernel.
        kernel: String,
        /// Spill stores, spill loads or stack frame.
        what: &'static str,
        /// Bytes a thread.
        bytes: u64,
    },
    /// No usable GPU.
    #[error("no GPU: {0}")]
    NoGpu(String),
    /// A driver call failed.
    #[error("{call}: {reason}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// More CTAs than run at once.
    #[error(
        "launch refused: {ctas} CTAs wait for each other, but {} fit at once ({each} on each of \
         {multiprocessors} multiprocessors with {shared_bytes} bytes of shared memory a CTA)",
        each * multiprocessors
    )]
    Grid {
        /// CTAs of the grid.
        ctas: u32,
        /// CTAs that a multiprocessor holds.
        each: u32,
        /// Multiprocessors.
        multiprocessors: u32,
        /// Shared memory of a CTA, bytes.
        shared_bytes: usize,
    },
    /// A wait inside the resident kernel ran out of time.
    #[error("the resident kernel stopped at {place}: {reason}")]
    Fault {
        /// Step, instruction, CTA and thread.
        place: String,
        /// What was waited for, wanted and seen.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
