//! Every op in plain f32 Rust: the definition and the oracle for all backends.

pub mod accept;
pub mod sample;
