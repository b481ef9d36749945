//! Compiles every kernel for sm_90a without a GPU and prints what each function uses; fails on
//! spills or local memory. Installs the pinned compiler into `target/cuda-toolchain` when none is
//! found. CI runs it: `cargo run -p cuda --example cubins`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cuda::cubins::{KERNELS, TOOLCHAIN, compile, find_nvcc};
use cuda::images::{Kv, Shape};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let nvcc = find_nvcc().or_else(|_| install(Path::new("target/cuda-toolchain")))?;
    let plain = Shape::default();
    let all = KERNELS.iter().map(|kernel| (*kernel, plain));
    for (kernel, shape) in all.chain([("resident.cu", plain.with_kv(Kv::Fp8))]) {
        let defines = shape.defines();
        let cubin = compile(&nvcc, kernel, &defines).map_err(|e| e.to_string())?;
        println!(
            "{kernel} {}: {} bytes",
            defines.join(" "),
            cubin.image.len()
        );
        for r in cubin.resources {
            println!("  {}: {} registers, no spills", r.function, r.registers);
        }
    }
    Ok(())
}

/// A virtual environment with the pinned wheels; gives back its nvcc.
fn install(dir: &Path) -> Result<PathBuf, String> {
    let step = |program: &Path, args: &[&str]| {
        let status = Command::new(program).args(args).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{} {args:?}: {status}", program.display())),
            Err(e) => Err(format!("{}: {e}", program.display())),
        }
    };
    let text = dir.display().to_string();
    let pip = dir.join("bin/pip");
    if !pip.exists() {
        step(Path::new("python3"), &["-m", "venv", &text])?;
    }
    let mut args = vec!["install", "--quiet"];
    args.extend(TOOLCHAIN);
    step(&pip, &args)?;
    let lib = dir.join("lib");
    let entries = std::fs::read_dir(&lib).map_err(|e| format!("{}: {e}", lib.display()))?;
    entries
        .flatten()
        .map(|e| e.path().join("site-packages/nvidia/cu13/bin/nvcc"))
        .find_map(|nvcc| nvcc.canonicalize().ok()) // the compiler runs in another folder
        .ok_or_else(|| format!("{}: the wheels brought no nvcc", lib.display()))
}
