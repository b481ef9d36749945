//! Structs and shared memory of the resident kernel as the device compiler has them.

use cuda::cubins::{compile, find_nvcc};
use cuda::images::{Request, Shape};
use cuda::layout::{Instr, LAYOUT_WORDS, RESIDENT_HEADER_BYTES, StepArgs, StepState};
use cudarc::driver::{DevicePtr, LaunchConfig};

use crate::gpu;

#[test]
#[ignore = "needs a GPU"]
fn sizes_agree_with_the_device_compiler() {
    let gpu = gpu();
    let cubin = compile(
        &find_nvcc().unwrap(),
        &Request::new("resident.cu", Shape::default()),
    )
    .unwrap();
    let function = gpu.function(&cubin.image, "resident_layout", 0).unwrap();
    let out = gpu.upload(&[0u64; LAYOUT_WORDS]).unwrap();
    let address = out.device_ptr(&gpu.stream).0;
    let shape = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (1, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: `out` has the words that the kernel writes.
    unsafe { gpu.launch(&function, shape, &address) }.unwrap();
    let seen = gpu.download(&out).unwrap();
    let sizes = [
        size_of::<StepArgs>(),
        size_of::<Instr>(),
        size_of::<StepState>(),
    ];
    assert_eq!(seen[..3], sizes.map(|s| s as u64));
    assert!(
        seen[3] <= RESIDENT_HEADER_BYTES as u64,
        "x lies at {}",
        seen[3]
    );
    assert_eq!(seen[4], 0, "an image for every model");
}
