//! The same cases on a GPU: parity of the kernels, and the struct layout as the device compiler sees
//! it. Without a GPU these tests fail, unless KILOTOK_NO_GPU=1 says that there is none.

#[path = "../emulated/cases.rs"]
mod cases;
mod linear;
#[path = "../emulated/op_cases.rs"]
mod op_cases;
mod ops;

use cuda::gpu::Gpu;

/// The GPU, or `None` where KILOTOK_NO_GPU=1 says that this machine has none.
fn gpu() -> Option<Gpu> {
    if std::env::var_os("KILOTOK_NO_GPU").is_some_and(|v| v == "1") {
        return None;
    }
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(e) => panic!("{e}; set KILOTOK_NO_GPU=1 where there is none"),
    }
}
