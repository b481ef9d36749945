//! The resident engine on NVIDIA GPUs: layout of weights and structs, schedule, compile step, driver.
//!
//! In every build: no CUDA is needed to compile it or to run without a GPU. Kernels are in
//! `kernels/`; their primitive layer is `kernels/dev.cuh`, which is PTX on a GPU and an emulator in
//! `cargo test` (`emulator/`, a dev-dependency, so that the product needs no C++ compiler).
//! State: the resident kernel drafts, verifies and accepts for one sequence, runs of many steps without the
//! host included. How it works, what was measured and what was tried: docs/resident-engine.md.

pub mod bench;
pub mod check;
pub mod cubins;
pub mod decoder;
pub mod error;
pub mod fault;
pub mod gpu;
pub mod images;
pub mod layout;
pub mod load;
pub mod nvrtc;
pub mod parity;
pub mod program;
pub mod replay;
pub mod resident;
pub mod ring;
pub mod schedule;
pub mod shapes;
pub mod strips;
pub mod synthetic;
pub mod timeline;

pub use decoder::CudaDecoder;
pub use error::CudaError;
