//! The small ops on a GPU: the cases of the emulator.

use cuda::cubins::{compile, find_nvcc};
use cuda::images::{Request, Shape};
use cuda::layout::OpArgs;
use cudarc::driver::{DevicePtr, LaunchConfig};

use crate::{gpu, op_cases};

#[test]
#[ignore = "needs a GPU"]
fn small_ops_match_their_definitions() {
    let gpu = gpu();
    let cubin = compile(
        &find_nvcc().unwrap(),
        &Request::new("ops.cu", Shape::default()),
    )
    .unwrap();
    let function = gpu.function(&cubin.image, "ops", 4096).unwrap();
    let run = |mut args: OpArgs, buffers: &mut [Vec<u32>]| {
        let device: Vec<_> = buffers.iter().map(|b| gpu.upload(b).unwrap()).collect();
        for (slot, buffer) in args.p.iter_mut().zip(&device) {
            *slot = buffer.device_ptr(&gpu.stream).0;
        }
        let shape = LaunchConfig {
            grid_dim: (1, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 4096,
        };
        // SAFETY: the cases size their buffers as ops.cuh says.
        unsafe { gpu.launch(&function, shape, &args) }.unwrap();
        for (buffer, device) in buffers.iter_mut().zip(&device) {
            *buffer = gpu.download(device).unwrap();
        }
    };
    op_cases::rms_norm_rows(&run);
    op_cases::rope_heads(&run);
    op_cases::swiglu_values(&run);
    op_cases::router_choices(&run);
    op_cases::attention_heads(&run);
    op_cases::argmax_rows(&run);
    op_cases::accepted_prefix(&run);
}
