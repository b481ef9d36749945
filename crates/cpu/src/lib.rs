//! The Decoder on a CPU: the ops of `model::reference` with SIMD and threads.
