//! Kernel parity and schedule tests that need no GPU: the kernel sources on the emulator against the
//! definitions of `model::reference`.

mod all_reduce;
mod cases;
mod draft;
#[path = "../../../model/tests/golden/mod.rs"]
#[allow(dead_code)] // what takes a decoder
mod golden;
mod group;
mod known;
mod kv_fp8;
mod op_cases;
mod ops;
mod parity;
mod resident;
mod schedule;
mod strips;
mod wide;
