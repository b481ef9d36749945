//! Makes models: corpus, sparse experts from a dense model, training for FP4, a DFlash drafter.
//!
//! Owns everything that needs libtorch. Nothing of the engine depends on this crate, and it stays
//! outside the workspace's default members.
//! Invariants: a phase starts from a checkpoint's weights alone; every file is written aside and
//! renamed; what training rounds is what `formats` decodes, bit for bit.
#![forbid(unsafe_code)]
#![expect(
    clippy::assign_op_pattern,
    reason = "`x += y` writes a tensor in place, over a value that a gradient may need"
)]

pub mod attention;
pub mod corpus;
pub mod data;
pub mod distill;
pub mod draft;
pub mod drafter;
pub mod error;
pub mod export;
pub mod export_draft;
pub mod files;
pub mod generate;
pub mod loss;
pub mod net;
pub mod optim;
pub mod params;
pub mod quant;
pub mod recipe;
pub mod report;
pub mod sample;
pub mod shape;
pub mod sparsify;
pub mod state;
pub mod synthetic;
pub mod tasks;
pub mod weights;
