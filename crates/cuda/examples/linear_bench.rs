//! How fast `kernels/linear.cuh` streams weights on this GPU, in GB/s of pages read, as CSV. Random
//! codes and scales (synthetic), 4 GiB for each shape, 20 launches after 3 to warm up, exact
//! activations. Run: `cargo run --release -p cuda --example linear_bench`.

use std::process::ExitCode;
use std::time::Instant;

use cuda::CudaError;
use cuda::cubins::{compile, find_nvcc};
use cuda::gpu::Gpu;
use cuda::layout::{
    FP4_BLOCK_BYTES, FP4_BLOCKS_PER_PAGE, FP8_BLOCK_BYTES, FP8_BLOCKS_PER_PAGE, LINEAR_STAGES,
    LinearArgs,
};
use cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig};

const WEIGHT_BYTES: usize = 4 << 30;
const LAUNCHES: u32 = 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), CudaError> {
    let gpu = Gpu::open(0)?;
    let weights = gpu.upload(&noise())?;
    let image = compile(&find_nvcc()?, "linear.cu", &[])?.image;
    println!("kernel,columns,gb_s,ms");
    for (name, block_bytes, blocks) in [
        ("linear_fp4", FP4_BLOCK_BYTES, FP4_BLOCKS_PER_PAGE),
        ("linear_fp8", FP8_BLOCK_BYTES, FP8_BLOCKS_PER_PAGE),
    ] {
        for columns in [6144usize, 2048, 1536, 512] {
            let tile_bytes = columns / 128 * block_bytes;
            let tiles = WEIGHT_BYTES / tile_bytes;
            let shared = 2 * LINEAR_STAGES * block_bytes * blocks + 512 + columns * 16;
            let ms = time(&gpu, &image, name, &weights, tiles, columns, shared)?;
            let gb_s = (tiles * tile_bytes) as f64 / ms * 1e-6;
            println!("{name},{columns},{gb_s:.0},{ms:.4}");
        }
    }
    Ok(())
}

/// Codes and scale bytes with no NaN among them: 32 MiB of noise, repeated.
fn noise() -> Vec<u64> {
    let mut state = 88_172_645_463_325_252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state & 0x77FF_7777_77FF_7777
    };
    let piece: Vec<u64> = (0..32 << 20 >> 3).map(|_| next()).collect();
    piece
        .iter()
        .copied()
        .cycle()
        .take(WEIGHT_BYTES / 8)
        .collect()
}

/// Milliseconds a launch.
fn time(
    gpu: &Gpu,
    image: &[u8],
    name: &str,
    weights: &CudaSlice<u64>,
    tiles: usize,
    columns: usize,
    shared: usize,
) -> Result<f64, CudaError> {
    let function = gpu.function(image, name, shared as u32)?;
    let x: Vec<f32> = (0..8 * columns)
        .map(|i| (i % 97) as f32 / 97.0 - 0.5)
        .collect();
    let (x, out) = (gpu.upload(&x)?, gpu.upload(&vec![0.0f32; tiles * 512])?);
    let args = LinearArgs {
        weights: weights.device_ptr(&gpu.stream).0,
        x: x.device_ptr(&gpu.stream).0,
        out: out.device_ptr(&gpu.stream).0,
        tiles: tiles as i32,
        k: columns as i32,
    };
    let shape = LaunchConfig {
        grid_dim: (gpu.multiprocessors()?, 1, 1),
        block_dim: (288, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    let launch = |count: u32| {
        for _ in 0..count {
            // SAFETY: tiles x columns cover no more than the weights uploaded; x and out fit them.
            unsafe { gpu.launch(&function, shape, &args) }?;
        }
        gpu.wait()
    };
    launch(3)?;
    let start = Instant::now();
    launch(LAUNCHES)?;
    Ok(start.elapsed().as_secs_f64() * 1e3 / f64::from(LAUNCHES))
}
