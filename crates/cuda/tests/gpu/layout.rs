//! Structs and shared memory of the resident kernel as the device compiler has them.

use cuda::cubins::{compile, find_nvcc};
use cuda::images::{Request, Shape};
use cuda::layout::{Instr, RESIDENT_HEADER_BYTES, StepArgs, StepState};
use cuda::resident::layout;

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
    let seen = layout(&gpu, &gpu.module(&cubin.image).unwrap()).unwrap();
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
