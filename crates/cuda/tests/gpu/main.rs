//! The same cases on a GPU: parity of the kernels, and the struct layout as the device compiler sees
//! it. They need a GPU and are ignored unless asked for: `cargo test -p cuda --test gpu -- --ignored`.

#[path = "../emulated/cases.rs"]
mod cases;
mod goldens;
mod layout;
#[path = "../emulated/op_cases.rs"]
mod op_cases;
mod ops;

use cuda::gpu::Gpu;

/// The first GPU.
fn gpu() -> Gpu {
    Gpu::open(0).unwrap()
}
