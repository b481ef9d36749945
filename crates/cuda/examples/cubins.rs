//! Compiles every kernel for sm_90a without a GPU and prints what each function uses; fails on
//! spills or local memory. Installs the pinned compiler into `target/cuda-toolchain` when none is
//! found. CI runs it: `cargo run -p cuda --example cubins`.
//!
//! The kernels for the shapes of rank 0 of 8 of MiMo-V2.5-Pro and of the model that ships. Arguments: models on an H200 beside those,
//! each a checkpoint's folder (with the drafter in its `dflash`, where there is one), with `--fp8` for plain e4m3 activations or `--wide` for two f16
//! each, with `--kv-fp8` for keys and values in e4m3 or `--kv-wide` for two bf16 each; `--keep=DIR` writes the images
//! there, under the names by which a program finds them in `cubins/` beside itself.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cuda::CudaError;
use cuda::cubins::{TOOLCHAIN, check, compile, find_nvcc};
use cuda::images::{Activations, Kv, Numbers, Request, Shape};
use cuda::load::formats;
use cuda::program::{Bases, DraftFormats, Formats, Program, Settings};
use cuda::schedule::{Schedule, Shard};
use cuda::strips::Format;
use model::draft::{Draft, DraftConfig, DraftOptions};
use model::{Checkpoint, Config, Weights};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// A kernel and what it is compiled for.
struct Wanted {
    kernel: &'static str,
    of: String,
    shape: Shape,
}

impl Wanted {
    fn resident(of: impl Into<String>, shape: Shape) -> Self {
        Self {
            kernel: "resident.cu",
            of: of.into(),
            shape,
        }
    }
}

fn run() -> Result<(), Failure> {
    let nvcc = find_nvcc().or_else(|_| install(Path::new("target/cuda-toolchain")))?;
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let numbers = Numbers::take(&mut args);
    let (switches, models): (Vec<String>, Vec<String>) =
        args.into_iter().partition(|a| a.starts_with("--"));
    let keep = switches.iter().find_map(|s| s.strip_prefix("--keep="));
    let mut all = pro()?;
    let shipped = root().join("models/kilotok-mini");
    for model in [shipped]
        .into_iter()
        .chain(models.into_iter().map(PathBuf::from))
    {
        all.push(Wanted::resident(
            model.display().to_string(),
            of_checkpoint(&model, numbers)?,
        ));
    }
    all.push(Wanted {
        kernel: "ops.cu",
        of: "tests".into(),
        shape: Shape::default(),
    });
    let mut spills = Vec::new();
    for Wanted { kernel, of, shape } in all {
        let request = Request::new(kernel, shape);
        let cubin = compile(&nvcc, &request)?;
        println!("{kernel} for {of}: {} bytes", cubin.image.len());
        if let Some(dir) = keep {
            let path = Path::new(dir).join(request.file("cubins"));
            std::fs::write(&path, &cubin.image).map_err(|e| format!("{}: {e}", path.display()))?;
            println!("  {}", path.display());
        }
        for r in &cubin.resources {
            let [stack, stores, loads] = r.stack;
            println!(
                "  {}: {} registers, bytes of stack {stack}, spilled {stores}, read back {loads}",
                r.function, r.registers
            );
        }
        spills.extend(check(&cubin.resources).err().map(|e| format!("{of}: {e}")));
    }
    match spills.is_empty() {
        true => Ok(()),
        false => Err(spills.join("\n").into()),
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// CTAs of an H200.
const CTAS: usize = 132;

fn shape(
    config: &Config,
    formats: &Formats,
    shard: Shard,
    numbers: Numbers,
) -> Result<Shape, CudaError> {
    let drafter = formats.draft.as_ref().map(|d| &d.config);
    let schedule = Schedule::with_draft(config, drafter, shard)?;
    let context = 1024;
    let program = Program::new(
        config,
        &schedule,
        formats,
        Settings { context, numbers },
        Bases::NOWHERE,
    )?;
    Ok(Shape::of(&program))
}

/// Rank 0 of 8 of MiMo-V2.5-Pro, without and with a drafter.
fn pro() -> Result<Vec<Wanted>, Failure> {
    let root = root();
    let text =
        |path: &str| std::fs::read_to_string(root.join(path)).map_err(|e| format!("{path}: {e}"));
    let config = Config::from_json(&text("bench/configs/mimo-v2.5-pro.json")?)?;
    let draft = text("crates/model/tests/released/draft_mimo_v2_5_pro.json")?;
    let draft = DraftConfig::from_json(&draft, &config, DraftOptions::default())?;
    let draft = DraftFormats::uniform(&draft, Format::Bf16);
    let (rank, ranks, ctas) = (0, 8, CTAS);
    let shard = Shard { rank, ranks, ctas };
    let formats = Formats::release(&config, Format::Fp8);
    let drafted = formats.clone().with_draft(Some(draft));
    let exact = Numbers::default();
    let [coarse, kv_fp8] = [Activations::E4m3.into(), Kv::Fp8.into()];
    let name = "rank 0 of 8 of MiMo-V2.5-Pro";
    let of = |what: &str, formats: &Formats, numbers| -> Result<Wanted, CudaError> {
        let shape = shape(&config, formats, shard, numbers)?;
        Ok(Wanted::resident(format!("{name}{what}"), shape))
    };
    Ok(vec![
        of("", &formats, exact)?,
        of(", e4m3 activations", &formats, coarse)?,
        of(", keys and values in FP8", &formats, kv_fp8)?,
        of(" with its drafter", &drafted, exact)?,
    ])
}

/// All of the checkpoint in `dir` on one GPU.
fn of_checkpoint(dir: &Path, numbers: Numbers) -> Result<Shape, Failure> {
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let drafter = dir.join("dflash");
    let draft = match drafter.is_dir() {
        true => Some(Draft::open(&drafter, &config, DraftOptions::default())?),
        false => None,
    };
    let weights = draft.as_ref().map(Draft::weights).transpose()?;
    let formats = formats(
        &Weights::new(&config, &checkpoint)?,
        draft.as_ref().zip(weights.as_ref()),
    );
    let (rank, ranks, ctas) = (0, 1, CTAS);
    Ok(shape(
        &config,
        &formats,
        Shard { rank, ranks, ctas },
        numbers,
    )?)
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
