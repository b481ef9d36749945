//! Kernel parity and schedule tests that need no GPU: the kernel sources on the emulator against the
//! definitions of `model::reference`. One file an op.

mod cases;
mod linear;
mod pages;
