//! `linear.cuh` on a GPU: parity at the shapes of MiMo-V2.5-Pro, and its share of the stream.

use cuda::cubins::{compile, find_nvcc};
use cuda::layout::{
    FP4_BLOCK_BYTES, FP4_BLOCKS_PER_PAGE, FP8_BLOCK_BYTES, FP8_BLOCKS_PER_PAGE, LINEAR_STAGES,
    LinearArgs,
};
use cuda_emulator::Format;
use cudarc::driver::{CudaFunction, DevicePtr, LaunchConfig};

use crate::cases::{Case, relative_error};
use crate::gpu;

const THREADS: u32 = 288;

fn page_bytes(format: Format) -> usize {
    match format {
        Format::Fp4 => FP4_BLOCK_BYTES * FP4_BLOCKS_PER_PAGE,
        Format::Fp8 => FP8_BLOCK_BYTES * FP8_BLOCKS_PER_PAGE,
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Fp4 => "linear_fp4",
        Format::Fp8 => "linear_fp8",
    }
}

/// Ring, barriers and scales before x; the kernel `linear_layout` reports the exact figure.
fn shared_bytes(format: Format, k: usize) -> u32 {
    (2 * LINEAR_STAGES * page_bytes(format) + 512 + k * 16) as u32
}

fn function(gpu: &cuda::gpu::Gpu, name: &str, shared: u32) -> CudaFunction {
    let cubin = compile(&find_nvcc().unwrap(), "linear.cu", &[]).unwrap();
    gpu.function(&cubin.image, name, shared).unwrap()
}

fn run(format: Format, case: &Case, rows: &[f32]) -> Vec<f32> {
    let gpu = gpu();
    let k = case.x.len() / 8;
    let shared = shared_bytes(format, k);
    let f = function(&gpu, name(format), shared);
    let (weights, x) = (
        gpu.upload(&case.pages).unwrap(),
        gpu.upload(&case.x).unwrap(),
    );
    let out = gpu.upload(rows).unwrap();
    let args = LinearArgs {
        weights: weights.device_ptr(&gpu.stream).0,
        x: x.device_ptr(&gpu.stream).0,
        out: out.device_ptr(&gpu.stream).0,
        tiles: case.tiles() as i32,
        k: k as i32,
    };
    let shape = LaunchConfig {
        grid_dim: (gpu.multiprocessors().unwrap(), 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: shared,
    };
    // SAFETY: the buffers above have the sizes of the case.
    unsafe { gpu.launch(&f, shape, &args) }.unwrap();
    gpu.download(&out).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn product_matches_the_definition_at_the_models_shapes() {
    for (format, rows, k) in [
        (Format::Fp4, 512, 6144),
        (Format::Fp4, 6144, 512),
        (Format::Fp8, 3392, 6144),
        (Format::Fp8, 6144, 2048),
        (Format::Fp8, 100, 256),
    ] {
        let case = Case::new(format, rows, k, 5);
        let poison = vec![f32::NAN; case.tiles() * 512];
        let out = run(format, &case, &poison);
        let error = relative_error(&case.rows(&out), &case.expected());
        println!("linear {format:?} [{rows}, {k}]: relative L2 error {error:.2e}");
        assert!(
            error < 2e-4,
            "{format:?} [{rows}, {k}]: relative L2 error {error:.2e}"
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn struct_layout_agrees_with_the_device_compiler() {
    let gpu = gpu();
    let f = function(&gpu, "linear_layout", 0);
    let out = gpu.upload(&[0u64; 8]).unwrap();
    let address = out.device_ptr(&gpu.stream).0;
    let shape = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (1, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: `out` has the seven words that the kernel writes.
    unsafe { gpu.launch(&f, shape, &address) }.unwrap();
    let seen = gpu.download(&out).unwrap();
    let expected = LinearArgs::layout();
    let order = [seen[0], 0, seen[1], seen[2], seen[3], seen[4]];
    assert!(
        expected.iter().zip(order).all(|(a, b)| *a as u64 == b),
        "{expected:?} {seen:?}"
    );
    for (format, x) in [(Format::Fp4, seen[5]), (Format::Fp8, seen[6])] {
        assert!(
            x + 16 <= u64::from(shared_bytes(format, 1)),
            "{format:?}: x lies at {x}"
        );
    }
}
