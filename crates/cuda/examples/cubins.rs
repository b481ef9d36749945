//! Compiles every kernel for sm_90a without a GPU and prints what each function uses; fails on
//! spills or local memory. Installs the pinned compiler into `target/cuda-toolchain` when none is
//! found. CI runs it: `cargo run -p cuda --example cubins`.
//!
//! The kernels for the shapes of rank 0 of 8 of MiMo-V2.5-Pro and of the model that ships. Arguments: models on an H200 beside those,
//! each a checkpoint's folder (with the drafter in its `dflash`, where there is one), with `--fp8` for plain e4m3 activations, with `--kv-fp8` for
//! keys and values in e4m3; `--keep=DIR` writes the images
//! there, under the names by which a program finds them in `cubins/` beside itself.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cuda::CudaError;
use cuda::cubins::{TOOLCHAIN, check, compile, find_nvcc};
use cuda::images::{Activations, Kv, Request, Shape};
use cuda::load::{draft_formats, formats};
use cuda::program::{Bases, Caches, DraftFormats, Formats, Program};
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
    let (kv, activations) = (Kv::take(&mut args), Activations::take(&mut args));
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
            of_checkpoint(&model, kv)?.with(activations),
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

fn shape(config: &Config, formats: &Formats, shard: Shard, kv: Kv) -> Result<Shape, CudaError> {
    let drafter = formats.draft.as_ref().map(|d| &d.config);
    let schedule = Schedule::with_draft(config, drafter, shard)?;
    let context = 1024;
    let program = Program::new(
        config,
        &schedule,
        formats,
        Caches { context, kv },
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
    let mut draft = DraftConfig::from_json(&draft, &config, DraftOptions::default())?;
    draft.block_size = draft.block_size.min(8);
    let (rank, ranks, ctas) = (0, 8, CTAS);
    let shard = Shard { rank, ranks, ctas };
    let formats = Formats::release(&config, Format::Fp8);
    let alone = shape(&config, &formats, shard, Kv::Bf16)?;
    let kv_fp8 = shape(&config, &formats, shard, Kv::Fp8)?;
    let drafted = formats.with_draft(Some(DraftFormats::uniform(&draft, Format::Bf16)));
    let coarse = alone.clone().with(Activations::E4m3);
    let name = "rank 0 of 8 of MiMo-V2.5-Pro";
    Ok(vec![
        Wanted::resident(name, alone),
        Wanted::resident(format!("{name}, e4m3 activations"), coarse),
        Wanted::resident(format!("{name}, keys and values in FP8"), kv_fp8),
        Wanted::resident(
            format!("{name} with its drafter"),
            shape(&config, &drafted, shard, Kv::Bf16)?,
        ),
    ])
}

/// All of the checkpoint in `dir` on one GPU.
fn of_checkpoint(dir: &Path, kv: Kv) -> Result<Shape, Failure> {
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let drafter = dir.join("dflash");
    let draft = match drafter.is_dir() {
        true => Some(Draft::open(&drafter, &config, DraftOptions::default())?),
        false => None,
    };
    let weights = draft.as_ref().map(Draft::weights).transpose()?;
    let own = draft.as_ref().zip(weights.as_ref());
    let own = own.map(|(d, w)| draft_formats(&d.config, w, d.mask_embedding.is_some()));
    let formats = formats(&Weights::new(&config, &checkpoint)?).with_draft(own);
    let (rank, ranks, ctas) = (0, 1, CTAS);
    Ok(shape(&config, &formats, Shard { rank, ranks, ctas }, kv)?)
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
