//! Kernel sources to cubins with nvcc: the compile step and its limits.
//!
//! Sources are embedded in the binary; what is kept between runs is in `images.rs`. Tells kernels that
//! spill registers or use local memory. The compiler is nvcc 13.0 (newer PTX does not load on driver
//! 580), found as [`find_nvcc`] says or installed from PyPI by `cargo run -p cuda --example cubins`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::CudaError;
use crate::images::Request;

/// The pinned toolchain, as PyPI names it. nvcc needs the first five; no GPU and no root.
pub const TOOLCHAIN: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// What ptxas is asked for, by whatever compiler calls it. The resident kernel spills at its default level of register
/// usage.
pub(crate) fn ptxas_options(kernel: &str) -> &'static [&'static str] {
    match kernel {
        "resident.cu" => &["-v", "--register-usage-level=0"],
        _ => &["-v"],
    }
}

/// What nvcc is asked for besides kernel, shapes and [`ptxas_options`].
pub(crate) const FLAGS: [&str; 5] = [
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-cubin",
];

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        /// Every kernel source and header, by name.
        pub const SOURCES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../kernels/", $name)))),*];
    };
}
sources!(
    "accept.cuh",
    "all_reduce.cuh",
    "attention.cuh",
    "dev.cuh",
    "layout.h",
    "ops.cu",
    "ops.cuh",
    "resident.cu",
    "resident.cuh",
    "resident_attention.cuh",
    "resident_draft.cuh",
    "resident_linear.cuh",
    "resident_ops.cuh",
    "resident_run.cuh",
    "ring.cuh",
    "rms_norm.cuh",
    "rope.cuh",
    "rounding.cuh",
    "router.cuh",
    "shapes.h",
    "strips.cuh",
    "swiglu.cuh",
);

/// What one kernel function uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Function name.
    pub function: String,
    /// Registers a thread.
    pub registers: u64,
    /// Bytes of stack frame, spill stores and spill loads a thread.
    pub stack: [u64; 3],
}

/// A compiled source.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// The ELF image that the driver loads.
    pub image: Vec<u8>,
    /// One entry a function.
    pub resources: Vec<Resources>,
}

/// nvcc: `$KILOTOK_NVCC`, `$CUDA_HOME/bin/nvcc`, `/usr/local/cuda/bin/nvcc`, then the search path.
///
/// # Errors
/// When none of them runs.
pub fn find_nvcc() -> Result<PathBuf, CudaError> {
    let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let candidates = [
        env("KILOTOK_NVCC"),
        env("CUDA_HOME").map(|home| home.join("bin/nvcc")),
        Some(PathBuf::from("/usr/local/cuda/bin/nvcc")),
        Some(PathBuf::from("nvcc")),
    ];
    candidates
        .into_iter()
        .flatten()
        .find(|nvcc| version(nvcc).is_ok())
        .ok_or_else(|| CudaError::Compile {
            kernel: "any kernel".into(),
            reason: "no nvcc in $KILOTOK_NVCC, $CUDA_HOME, /usr/local/cuda or the search path; \
                     `cargo run -p cuda --example cubins` installs one"
                .into(),
        })
}

/// What `nvcc --version` says.
pub(crate) fn version(nvcc: &Path) -> std::io::Result<String> {
    let out = Command::new(nvcc).arg("--version").output()?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Compiles what is asked for with `nvcc`, each time anew: what is kept from one run to the next is in `images.rs`.
///
/// # Errors
/// When the compiler refuses the source, or a file cannot be written.
pub fn compile(nvcc: &Path, request: &Request<'_>) -> Result<Cubin, CudaError> {
    static BUILDS: AtomicU64 = AtomicU64::new(0); // tests of one process build side by side
    let build_number = BUILDS.fetch_add(1, Ordering::Relaxed);
    let name = format!("kilotok-nvcc-{}-{build_number}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    let built = build(nvcc, request, &dir).map_err(|e| match e {
        BuildError::Io(path, source) => CudaError::Io { path, source },
        BuildError::Refused(reason) => CudaError::Compile {
            kernel: request.kernel.into(),
            reason,
        },
    });
    let _ = std::fs::remove_dir_all(&dir); // a left-over build folder costs nothing but space
    built
}

enum BuildError {
    Io(PathBuf, std::io::Error),
    Refused(String),
}

fn build(nvcc: &Path, request: &Request<'_>, dir: &Path) -> Result<Cubin, BuildError> {
    let kernel = request.kernel;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| BuildError::Io(path, e)
    };
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    for (name, text) in request.texts() {
        let file = dir.join(name);
        std::fs::write(&file, text).map_err(io(&file))?;
    }
    let out = Command::new(nvcc)
        .args(FLAGS)
        .args(ptxas_options(kernel).iter().map(|o| format!("-Xptxas={o}")))
        .args(request.shape.defines())
        .args([kernel, "-o", "out.cubin"])
        .current_dir(dir)
        .output()
        .map_err(io(nvcc))?;
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    if !out.status.success() {
        return Err(BuildError::Refused(log));
    }
    let resources = parse_resources(&log);
    let made = dir.join("out.cubin");
    let image = std::fs::read(&made).map_err(io(&made))?;
    Ok(Cubin { image, resources })
}

/// Reads what `ptxas -v` prints about each function.
#[must_use]
pub fn parse_resources(log: &str) -> Vec<Resources> {
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    };
    let mut out: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Function properties for ") {
            out.push(Resources {
                function: rest.trim().into(),
                ..Resources::default()
            });
        } else if let (Some(last), Some(at)) = (out.last_mut(), line.find(" bytes stack frame")) {
            // NVRTC puts words before the first number.
            let first = line[..at].rfind(|c: char| !c.is_ascii_digit());
            let numbers = &line[first.map_or(0, |f| f + 1)..];
            for (slot, part) in last.stack.iter_mut().zip(numbers.split(", ")) {
                *slot = number(part);
            }
        } else if let (Some(last), Some((_, rest))) = (out.last_mut(), line.split_once("Used ")) {
            last.registers = number(rest);
        }
    }
    out
}

/// Refuses functions that spill or have a stack frame: what CI asks of the shapes that it knows. Another model's kernel runs with a few bytes
/// of them too, only slower.
///
/// # Errors
/// The first one that does.
pub fn check(resources: &[Resources]) -> Result<(), CudaError> {
    let names = ["stack frame", "spill stores", "spill loads"];
    for r in resources {
        for (bytes, what) in r.stack.iter().zip(names) {
            if *bytes > 0 {
                return Err(CudaError::Spill {
                    kernel: r.function.clone(),
                    what,
                    bytes: *bytes,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 2 barriers
ptxas info    : Function properties for g
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers";

    #[test]
    fn reads_the_compilers_report_and_refuses_spills() {
        let resources = parse_resources(LOG);
        assert_eq!(resources.len(), 2);
        assert_eq!((resources[0].registers, resources[0].stack), (96, [0; 3]));
        assert_eq!(resources[1].stack, [16, 8, 12]);
        assert!(check(&resources[..1]).is_ok());
        let message = check(&resources).unwrap_err().to_string();
        assert!(
            message.contains("g: 16 bytes of stack frame"),
            "unexpected: {message}"
        );
    }

    #[test]
    fn every_include_is_embedded() {
        for (name, text) in SOURCES {
            for line in text.lines() {
                let Some(rest) = line.strip_prefix("#include \"") else {
                    continue;
                };
                let file = rest.trim_end_matches('"');
                let known = SOURCES.iter().any(|(n, _)| *n == file) || file == "emu/emu.h";
                assert!(known, "{name} includes {file}, which is not in SOURCES");
            }
        }
    }
}
