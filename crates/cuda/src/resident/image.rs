//! The kernel's image for a program: found or compiled, loaded, and looked at.

use std::sync::Arc;

use cudarc::driver::{CudaModule, DevicePtr, LaunchConfig};

use crate::CudaError;
use crate::gpu::Gpu;
use crate::images::{Shape, kernel_image};
use crate::layout::LAYOUT_WORDS;
use crate::program::Program;
use crate::shapes::fingerprint;

/// The module of `program`'s shapes.
///
/// # Errors
/// No image for this GPU; `$KILOTOK_CUBIN` is another model's; the driver's.
pub(super) fn module(gpu: &Gpu, program: &Program) -> Result<Arc<CudaModule>, CudaError> {
    let module = gpu.module(&kernel_image("resident.cu", Shape::of(program))?)?;
    let (found, expected) = (
        layout(gpu, &module)?[LAYOUT_WORDS - 1],
        fingerprint(program),
    );
    match found == expected {
        true => Ok(module),
        false => Err(CudaError::Shape {
            what: "the kernel image",
            expected: format!("one for these shapes ({expected:016x})"),
            found: format!("shapes {found:016x}"),
        }),
    }
}

/// What the device compiler made of an image of the resident kernel: sizes of `StepArgs`, `Instr` and `StepState`, bytes of shared
/// memory before the activations, fingerprint of the shapes.
///
/// # Errors
/// The driver's.
pub fn layout(gpu: &Gpu, module: &Arc<CudaModule>) -> Result<Vec<u64>, CudaError> {
    let function = Gpu::function_of(module, "resident_layout", 0)?;
    let out = gpu.upload(&[0u64; LAYOUT_WORDS])?;
    let one = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (1, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: `out` has the words that the kernel writes.
    unsafe { gpu.launch(&function, one, &out.device_ptr(&gpu.stream).0) }?;
    gpu.download(&out)
}
