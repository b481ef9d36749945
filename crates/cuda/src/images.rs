//! The image of a kernel for a model's exact shapes: from the cache, from a compiler, or from what was shipped.
//!
//! A file's name is a hash of everything that matters: all sources, kernel, shapes, architecture, then compiler
//! and its options. Tried in this order: `$KILOTOK_CUBIN`; the cache's file for a compiler that is here; whoever's file
//! for the same sources and shapes in `cubins/` beside the program; NVRTC in this process; nvcc; another compiler's
//! file in the cache. Files are written aside and renamed: a half-written one is never read.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::CudaError;
use crate::cubins::{FLAGS, SOURCES, compile, find_nvcc, ptxas_options, version};
use crate::nvrtc::Nvrtc;
use crate::program::Program;
use crate::shapes::header;

/// The architecture that the kernels are written for.
pub const ARCH: &str = "sm_90a";

/// What a model makes constant in the kernels; what is left out stays an argument.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The model's `shapes.h` ([`header`]); none: a kernel for every model.
    pub header: Option<String>,
    /// How it keeps numbers.
    pub numbers: Numbers,
}

/// How a kernel keeps what products take and what the caches hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Numbers {
    /// What products take of their activations.
    pub activations: Activations,
    /// What the target's caches hold.
    pub kv: Kv,
}

impl Numbers {
    /// The switches that [`Numbers::take`] knows, for a usage line.
    pub const SWITCHES: &str = "[--fp8 | --wide] [--kv-fp8 | --kv-wide]";

    /// Takes [`Numbers::SWITCHES`] out of the arguments of an example: `--fp8` and `--wide` are activations, those with `kv` keys and values.
    pub fn take(args: &mut Vec<String>) -> Self {
        let mut out = Self::default();
        if taken(args, "--fp8") {
            out.activations = Activations::E4m3;
        }
        if taken(args, "--wide") {
            out.activations = Activations::Wide;
        }
        if taken(args, "--kv-fp8") {
            out.kv = Kv::Fp8;
        }
        if taken(args, "--kv-wide") {
            out.kv = Kv::Wide;
        }
        out
    }

    /// Two of 16 bits each where the default has one.
    #[must_use]
    pub fn wide() -> Self {
        Self {
            activations: Activations::Wide,
            kv: Kv::Wide,
        }
    }
}

impl From<Kv> for Numbers {
    fn from(kv: Kv) -> Self {
        let activations = Activations::default();
        Self { activations, kv }
    }
}

impl From<Activations> for Numbers {
    fn from(activations: Activations) -> Self {
        let kv = Kv::default();
        Self { activations, kv }
    }
}

impl std::fmt::Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (activations, kv) = (self.activations.name(), self.kv.name());
        write!(f, "activations {activations}, keys and values {kv}")
    }
}

/// Whether `switch` was among the arguments, from which it is taken out.
fn taken(args: &mut Vec<String>, switch: &str) -> bool {
    let before = args.len();
    args.retain(|a| a != switch);
    args.len() < before
}

/// What the caches of the target's keys and values hold. A drafter's hold bf16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kv {
    /// bf16.
    #[default]
    Bf16,
    /// e4m3: nearest even, saturating at 448, scale 1, after rope or value scale. The rows of a step see each other so too.
    Fp8,
    /// Two bf16 that add up to 16 bits: first those of all columns of a row, then the second ones.
    Wide,
}

impl Kv {
    /// For reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8 (e4m3, scale 1)",
            Self::Wide => "wide (two bf16)",
        }
    }

    /// Bytes of a value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Fp8 => 1,
            Self::Bf16 => 2,
            Self::Wide => 4,
        }
    }
}

/// What a product with weights of 4 or 8 bits takes of its activations. Weights of 16 bits and more (router,
/// lm_head) always take all of a bf16 value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// bf16 values, as f16 times a power of two for 64 columns.
    #[default]
    Exact,
    /// The nearest e4m3 value: one power of two for each 64 columns of a row, 32 of inner columns (finer
    /// than the 128 of the checkpoints' scheme, whose scale is no power of two).
    E4m3,
    /// Two f16 that add up to 22 bits, times one power of two for 64 columns: what is left of f32 values where
    /// twice the shared memory is to be had. Weights of 16 bits and more take 19 of them.
    Wide,
}

impl Activations {
    /// Bytes of `columns` of K of `rows` rows, with their powers of two: one f32 for 32 columns of a row.
    #[must_use]
    pub fn bytes(self, columns: usize, rows: usize) -> usize {
        let each = if self == Self::Wide { 4 } else { 2 };
        columns * rows * each + columns / 32 * rows * 4
    }

    /// For reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact (bf16 in f16)",
            Self::E4m3 => "fp8 (e4m3, a power of two for 64 columns, 32 of inner ones)",
            Self::Wide => "wide (two f16)",
        }
    }
}

impl Shape {
    /// Of a model's part.
    #[must_use]
    pub fn of(program: &Program) -> Self {
        Self {
            header: Some(header(program)),
            numbers: program.numbers,
        }
    }

    /// With numbers kept like that.
    #[must_use]
    pub fn with(mut self, numbers: impl Into<Numbers>) -> Self {
        self.numbers = numbers.into();
        self
    }

    /// `-D` options.
    #[must_use]
    pub fn defines(&self) -> Vec<String> {
        let Numbers { activations, kv } = self.numbers;
        let all = [
            ("ONE_TERM", activations == Activations::E4m3),
            ("WIDE", activations == Activations::Wide),
            ("KV_FP8", kv == Kv::Fp8),
            ("KV_WIDE", kv == Kv::Wide),
        ];
        let set = all.into_iter().filter(|(_, set)| *set);
        set.map(|(name, _)| format!("-DSHAPE_{name}=1")).collect()
    }
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// `resident.cu`, or `ops.cu`, the thin kernel of the tests.
    pub kernel: &'a str,
    /// Architecture.
    pub arch: &'a str,
    /// Constants.
    pub shape: Shape,
    /// Every source and header: name and text.
    pub sources: &'a [(&'a str, &'a str)],
}

impl<'a> Request<'a> {
    /// Of the sources in this program, for [`ARCH`].
    #[must_use]
    pub fn new(kernel: &'a str, shape: Shape) -> Self {
        Self {
            kernel,
            arch: ARCH,
            shape,
            sources: SOURCES,
        }
    }

    /// What a compiler is given: the sources, with the model's shapes.
    #[must_use]
    pub fn texts(&self) -> Vec<(&str, &str)> {
        let header = self.shape.header.as_deref();
        let of = |&(name, text): &(&'a str, &'a str)| match header.filter(|_| name == "shapes.h") {
            Some(header) => (name, header),
            None => (name, text),
        };
        self.sources.iter().map(of).collect()
    }

    /// `kernel.HASH`, the same whoever compiles it.
    #[must_use]
    pub fn stem(&self) -> String {
        let ptxas = ptxas_options(self.kernel);
        let what = (self.sources, self.kernel, self.arch, &self.shape, ptxas);
        format!("{}.{:016x}", self.kernel, hash(&what))
    }

    /// The file of an image made by `compiler`.
    #[must_use]
    pub fn file(&self, compiler: &str) -> String {
        format!("{}.{:016x}.cubin", self.stem(), hash(&compiler))
    }
}

fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// Something that makes cubins.
pub trait Compiler {
    /// Name, version and options.
    fn identity(&self) -> String;
    /// A cubin.
    ///
    /// # Errors
    /// The compiler's words.
    fn compile(&self, request: &Request<'_>) -> Result<Vec<u8>, CudaError>;
}

/// The offline compiler.
struct Nvcc {
    path: PathBuf,
    version: String,
}

impl Compiler for Nvcc {
    fn identity(&self) -> String {
        format!("{} {FLAGS:?}", self.version)
    }

    fn compile(&self, request: &Request<'_>) -> Result<Vec<u8>, CudaError> {
        Ok(compile(&self.path, request)?.image)
    }
}

/// The image of `kernel` with `shape` as constants.
///
/// # Errors
/// When there is neither a compiler nor an image made before, or the compiler refuses the source.
pub fn kernel_image(kernel: &str, shape: Shape) -> Result<Vec<u8>, CudaError> {
    if let Some(path) = std::env::var_os("KILOTOK_CUBIN").map(PathBuf::from) {
        return std::fs::read(&path).map_err(|source| CudaError::Io { path, source });
    }
    let mut compilers: Vec<Box<dyn Compiler>> = Vec::new();
    let mut missing = Vec::new();
    match Nvrtc::open() {
        Ok(nvrtc) => compilers.push(Box::new(nvrtc)),
        Err(e) => missing.push(e.to_string()),
    }
    match find_nvcc() {
        Ok(path) => compilers.push(Box::new(Nvcc {
            version: version(&path).unwrap_or_default(),
            path,
        })),
        Err(e) => missing.push(e.to_string()),
    }
    let compilers: Vec<&dyn Compiler> = compilers.iter().map(AsRef::as_ref).collect();
    let shipped = std::env::current_exe().ok();
    let shipped = shipped.and_then(|exe| Some(exe.parent()?.join("cubins")));
    let places = Places {
        cache: cache_dir(),
        shipped,
    };
    places.image(&Request::new(kernel, shape), &compilers, &missing)
}

/// `$XDG_CACHE_HOME/kilotok`, `~/.cache/kilotok` or one in the temporary directory.
fn cache_dir() -> PathBuf {
    let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let home = || env("HOME").map(|home| home.join(".cache"));
    let cache = env("XDG_CACHE_HOME").or_else(home);
    cache.unwrap_or_else(std::env::temp_dir).join("kilotok")
}

/// Where images lie.
pub struct Places {
    /// Read and written.
    pub cache: PathBuf,
    /// Read only.
    pub shipped: Option<PathBuf>,
}

impl Places {
    /// The image that is wanted: see the top of this file. `missing`: why there are no more compilers.
    ///
    /// # Errors
    /// The last compiler's, when there is no image made before either.
    pub fn image(
        &self,
        request: &Request<'_>,
        compilers: &[&dyn Compiler],
        missing: &[String],
    ) -> Result<Vec<u8>, CudaError> {
        let mut reasons = missing.to_vec();
        let file = |c: &&dyn Compiler| self.cache.join(request.file(&c.identity()));
        let cached = compilers.iter().find_map(|c| std::fs::read(file(c)).ok());
        let shipped = || any_of(self.shipped.as_ref()?, request);
        if let Some(image) = cached.or_else(shipped) {
            return Ok(image);
        }
        for compiler in compilers {
            match compiler.compile(request) {
                Ok(image) => {
                    // Without a cache the next start compiles again, no more.
                    let _ = self.keep(&file(compiler), &image);
                    return Ok(image);
                }
                Err(e) => reasons.push(e.to_string()),
            }
        }
        any_of(&self.cache, request).ok_or_else(|| CudaError::NoImage {
            kernel: request.kernel.into(),
            arch: request.arch.into(),
            reason: format!("{}; none made before", reasons.join("; ")),
        })
    }

    fn keep(&self, path: &Path, image: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.cache)?;
        let aside = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&aside, image)?;
        std::fs::rename(&aside, path)
    }
}

/// An image of the same sources and shapes by any compiler; the first by name.
fn any_of(folder: &Path, request: &Request<'_>) -> Option<Vec<u8>> {
    let stem = format!("{}.", request.stem());
    let wanted = |name: &String| name.starts_with(&stem) && name.ends_with(".cubin");
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let name = names.filter(wanted).min()?;
    std::fs::read(folder.join(name)).ok()
}
