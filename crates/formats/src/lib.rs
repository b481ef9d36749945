//! Number formats of the weights: MXFP4, FP8 E4M3 in 128 x 128 blocks, BF16.
//!
//! Owns encoding and decoding, bit for bit. Does no I/O and knows no tensor names.
//! Invariant: decoding is exact in f32; every encoder states its rounding.
#![forbid(unsafe_code)]

pub mod bf16;
pub mod fp8;
pub mod mxfp4;
