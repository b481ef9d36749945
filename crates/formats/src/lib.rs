//! Number formats of the weights: MXFP4, FP8 E4M3 in 128 x 128 blocks, BF16.
//!
//! Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3 (E2M1, E8M0, shared exponent);
//! OCP 8-bit Floating Point (OFP8) v1.0 (E4M3); the layout of released MiMo-V2 checkpoints for the
//! 128 x 128 grids and the nibble order.
//!
//! Owns encoding and decoding, bit for bit. Does no I/O and knows no tensor names.
//! Invariant: decoding is exact in f32; every encoder states its rounding.
#![forbid(unsafe_code)]

pub mod bf16;
pub mod fp8;
pub mod mxfp4;
