//! The Decoder on a CPU: the ops of `model::reference` with SIMD and threads.
//!
//! Owns packed weights (16-row panels, still in their stored format), the KV cache, and a pool of
//! pinned threads that walk the forward pass together. One dispatch point (`linear`) chooses the
//! instruction set. Invariants: the arithmetic of a row does not depend on other rows, on the
//! number of threads, or on the instruction set; nothing allocates in a step after warm-up.

pub mod activations;
pub mod attention;
pub mod buffer;
pub mod decoder;
mod draft;
pub mod heap;
pub mod isa;
pub mod kv;
pub mod linear;
mod network;
pub mod panels;
pub mod pool;
pub mod rms_norm;
pub mod rope;
pub mod router;
mod sample;
mod scratch;
pub mod swiglu;

pub use decoder::{CpuDecoder, CpuOptions, cache_bytes};
pub use network::DamagedWeight;
