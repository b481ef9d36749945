//! A program on one GPU: its two arenas, the cooperative launch, what comes back.
//!
//! Owns device memory and the fault record. Refuses a grid that would not be co-resident. After a
//! fault the context is lost: every later call fails with the record. Invariant: between two calls no
//! kernel runs. Any thread may call, one at a time.

mod generate;
mod image;
mod part;
mod ranks;

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, DeviceRepr, LaunchConfig, result};
use model::draft::Draft;
use model::{Config, Weights};

pub use generate::Walk;
pub use image::layout;
pub use part::Part;
pub use ranks::Ranks;

use crate::CudaError;
use crate::fault::{check_co_resident, describe};
use crate::gpu::{Gpu, driver};
use crate::layout::{FaultRecord, GROUPS, Instr, RESIDENT_HEADER_BYTES, StepArgs, StepState};
use crate::load::{DraftSource, Source, formats, program_bytes, turns};
use crate::program::{Bases, DraftWhat, Formats, Piece, Program, Settings, What};
use crate::schedule::{Schedule, Shard};
use crate::strips::Format;

// SAFETY: repr(C), integers only, no padding (layout.rs tests it).
unsafe impl DeviceRepr for StepArgs {}

/// Threads of a CTA: the consumer warpgroups and the loader's.
const THREADS: u32 = 128 * (GROUPS as u32 + 1);

/// A program, resident on a GPU.
pub struct Resident {
    gpu: Gpu,
    module: Arc<CudaModule>,
    function: CudaFunction,
    program: Program,
    bases: Bases,
    /// State arenas of all ranks; those equal to its own are looped back.
    states: Vec<u64>,
    fault: *mut FaultRecord,
    pinned: generate::Pinned,
    stamps: u64,
    ctas: u32,
    /// Steps since the counters were zero.
    steps: u32,
}

// SAFETY: the fault record is only read between launches, by whoever holds `&mut self`.
unsafe impl Send for Resident {}

fn alloc(bytes: usize) -> Result<u64, CudaError> {
    // SAFETY: plain allocation; the context is bound.
    unsafe { result::malloc_sync(bytes.max(128)) }.map_err(driver("allocate device memory"))
}

fn fault_record() -> Result<*mut FaultRecord, CudaError> {
    // SAFETY: 4096 bytes of pinned host memory, zeroed before use, freed in Drop.
    unsafe {
        let place = result::malloc_host(4096, 0).map_err(driver("allocate pinned memory"))?;
        std::ptr::write_bytes(place.cast::<u8>(), 0, 4096);
        Ok(place.cast())
    }
}

impl Resident {
    /// The whole model on one GPU, weights loaded, with its drafter if there is one.
    ///
    /// # Errors
    /// As [`Resident::new`] and [`Resident::load`].
    pub fn whole(
        config: &Config,
        weights: &Weights<'_>,
        draft: Option<&Draft>,
        settings: Settings,
    ) -> Result<Self, CudaError> {
        Self::of(config, weights, draft, settings.into())
    }

    /// A part of a model, weights loaded.
    ///
    /// # Errors
    /// As [`Resident::whole`].
    pub fn of(
        config: &Config,
        weights: &Weights<'_>,
        draft: Option<&Draft>,
        part: Part,
    ) -> Result<Self, CudaError> {
        let table = match draft {
            Some(draft) => Some(draft.weights().map_err(|e| CudaError::Shape {
                what: "the drafter",
                expected: "all of its tensors".into(),
                found: e.to_string(),
            })?),
            None => None,
        };
        let drafter = draft.zip(table.as_ref());
        let formats = formats(weights, drafter);
        let Part { rank, ranks, .. } = part;
        let resident = Self::new(config, &formats, part)?;
        let source = Source {
            config,
            weights,
            formats: &formats,
            rank,
            ranks,
        };
        let mut before = 0;
        resident.load(&source, |done| {
            weights.took(done - std::mem::replace(&mut before, done));
        })?;
        if let (Some(formats), Some((draft, weights))) = (&formats.draft, drafter) {
            resident.load_draft(&DraftSource {
                formats,
                weights,
                mask_embedding: draft.mask_embedding.as_deref(),
                rank,
                ranks,
            })?;
        }
        Ok(resident)
    }

    /// Allocates and prepares everything but the weights, which are undefined until
    /// [`Resident::load`] or [`Resident::fill`].
    ///
    /// # Errors
    /// No GPU, too little memory, shapes that the kernel does not take, no image for them, a grid that does not fit.
    pub fn new(config: &Config, formats: &Formats, part: Part) -> Result<Self, CudaError> {
        Self::on(0, config, formats, part)
    }

    /// The same on GPU `ordinal`.
    fn on(
        ordinal: usize,
        config: &Config,
        formats: &Formats,
        part: Part,
    ) -> Result<Self, CudaError> {
        let gpu = Gpu::open(ordinal)?;
        let ctas = gpu.multiprocessors()?;
        let shard = Shard {
            rank: part.rank,
            ranks: part.ranks,
            ctas: ctas as usize,
        };
        let drafter = formats.draft.as_ref().map(|d| &d.config);
        let schedule = Schedule::with_draft(config, drafter, shard)?;
        let settings = part.settings;
        let sizes = Program::new(config, &schedule, formats, settings, Bases::NOWHERE)?;
        let module = image::module(&gpu, &sizes)?;
        let bases = Bases {
            weights: alloc(sizes.weight_bytes)?,
            state: alloc(sizes.state_bytes)?,
        };
        let program = Program::new(config, &schedule, formats, settings, bases)?;
        let stamps = alloc(ctas as usize * program.instructions.len() * 24)?;
        let shared = (RESIDENT_HEADER_BYTES + program.x_bytes) as u32;
        let function = Gpu::function_of(&module, "resident", shared)?;
        let resident = Self {
            fault: fault_record()?,
            pinned: generate::Pinned::new()?,
            gpu,
            module,
            function,
            states: vec![bases.state; program.ranks],
            program,
            bases,
            stamps,
            ctas,
            steps: 0,
        };
        resident.check_grid()?;
        resident.prepare()?;
        Ok(resident)
    }

    /// The kernel spins on what other CTAs write: all of them have to run at once.
    fn check_grid(&self) -> Result<(), CudaError> {
        let shared = RESIDENT_HEADER_BYTES + self.program.x_bytes;
        let each = self
            .function
            .occupancy_max_active_blocks_per_multiprocessor(THREADS, shared, None)
            .map_err(driver("occupancy"))?;
        let multiprocessors = self.gpu.multiprocessors()?;
        check_co_resident(self.ctas, each, multiprocessors, shared)
    }

    fn prepare(&self) -> Result<(), CudaError> {
        // SAFETY: the arena has that many bytes.
        unsafe { result::memset_d8_sync(self.bases.state, 0, self.program.state_bytes) }
            .map_err(driver("clear state"))?;
        for t in &self.program.turns {
            self.put(t.offset, &turns(t, self.program.context))?;
        }
        self.put(self.program.places.program, program_bytes(&self.program))
    }

    fn put(&self, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the program placed those bytes inside the arena.
        unsafe { result::memcpy_htod_sync(self.bases.state + offset as u64, bytes) }
            .map_err(driver("copy to device"))
    }

    /// Packs and copies a checkpoint's weights; `each` is told bytes done.
    ///
    /// # Errors
    /// Weights that the strips cannot hold; the driver's.
    pub fn load(&self, source: &Source<'_>, each: impl FnMut(u64)) -> Result<(), CudaError> {
        self.load_some(source, |_| true, each)
    }

    /// As [`Resident::load`], only the pieces that `keep` wants; the others stay as they are.
    ///
    /// # Errors
    /// As [`Resident::load`].
    pub fn load_some(
        &self,
        source: &Source<'_>,
        keep: impl Fn(&Piece) -> bool,
        mut each: impl FnMut(u64),
    ) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let own = |p: &&Piece| !matches!(p.what, What::Draft(_)) && keep(p);
        for piece in self.program.pieces.iter().filter(own) {
            self.put_piece(piece, &source.piece(piece)?)?;
            each((piece.offset + piece.bytes) as u64);
        }
        Ok(())
    }

    /// The same for the drafter's.
    ///
    /// # Errors
    /// As [`Resident::load`].
    pub fn load_draft(&self, source: &DraftSource<'_>) -> Result<(), CudaError> {
        self.gpu.bind()?;
        for piece in &self.program.pieces {
            if let Some(bytes) = source.piece(piece)? {
                self.put_piece(piece, &bytes)?;
            }
        }
        Ok(())
    }

    fn put_piece(&self, piece: &Piece, bytes: &[u8]) -> Result<(), CudaError> {
        let at = self.bases.weights + piece.offset as u64;
        // SAFETY: the program placed the piece inside the arena.
        unsafe { result::memcpy_htod_sync(at, bytes) }.map_err(driver("copy to device"))
    }

    /// Valid random weights: for speed alone.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let function = Gpu::function_of(&self.module, "resident_fill", 0)?;
        for (seed, piece) in self.program.pieces.iter().enumerate() {
            let at = self.bases.weights + piece.offset as u64;
            let format = match (piece.tiles, piece.what) {
                (Some(tiles), _) => tiles.format,
                (None, What::Embed) => Format::Bf16,
                _ => {
                    self.fill_vector(piece, at)?;
                    continue;
                }
            };
            let shape = LaunchConfig {
                grid_dim: (if piece.bytes > 1 << 24 { 1056 } else { 132 }, 1, 1),
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            };
            let mut launch = self.gpu.stream.launch_builder(&function);
            let (words, code, seed) = (piece.bytes as u64 / 4, format.code(), seed as u32);
            use cudarc::driver::PushKernelArg;
            launch.arg(&at).arg(&words).arg(&code).arg(&seed);
            // SAFETY: the piece has that many words.
            unsafe { launch.launch(shape) }.map_err(driver("fill"))?;
        }
        self.gpu.wait()
    }

    /// Norms of 1, everything else 0.
    fn fill_vector(&self, piece: &Piece, at: u64) -> Result<(), CudaError> {
        use DraftWhat as D;
        let norm = match piece.what {
            What::InputNorm | What::PostNorm | What::FinalNorm => true,
            What::Draft(what) => matches!(
                what,
                D::InputNorm | D::PostNorm | D::FinalNorm | D::HiddenNorm | D::QNorm | D::KNorms
            ),
            _ => false,
        };
        let value = if norm { 1.0f32 } else { 0.0 };
        let values = vec![value; piece.bytes / 4];
        // SAFETY: the piece has that many values.
        unsafe { result::memcpy_htod_sync(at, &values) }.map_err(driver("copy to device"))
    }

    /// Leaves instructions out, for measurements of the rest ([`Program::keep`]).
    ///
    /// # Errors
    /// The driver's.
    pub fn keep(&mut self, keep: impl Fn(&Instr) -> bool) -> Result<(), CudaError> {
        self.program.keep(keep);
        self.put(self.program.places.program, program_bytes(&self.program))
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// CTAs of the grid.
    #[must_use]
    pub fn ctas(&self) -> usize {
        self.ctas as usize
    }

    /// Says what the next step works on.
    ///
    /// # Errors
    /// The driver's.
    pub fn set_state(&mut self, state: &StepState) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let at = self.bases.state + self.program.places.state as u64;
        // SAFETY: the arena holds one StepState there.
        unsafe { result::memcpy_htod_sync(at, std::slice::from_ref(state)) }
            .map_err(driver("copy to device"))
    }

    /// What the last step left.
    ///
    /// # Errors
    /// The driver's.
    pub fn state(&mut self) -> Result<StepState, CudaError> {
        self.gpu.bind()?;
        let mut state = [StepState::default()];
        let at = self.bases.state + self.program.places.state as u64;
        // SAFETY: the arena holds one StepState there.
        unsafe { result::memcpy_dtoh_sync(&mut state, at) }.map_err(driver("copy to host"))?;
        Ok(state[0])
    }

    /// This rank's logits after `row`: `out` has its part of the vocabulary.
    ///
    /// # Errors
    /// The driver's.
    pub fn logits(&mut self, row: usize, out: &mut [f32]) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let places = self.program.places;
        let at = self.bases.state + (places.logits + row * places.logit_rows * 4) as u64;
        // SAFETY: `out` is no longer than a row, which the caller knows from the program.
        unsafe { result::memcpy_dtoh_sync(out, at) }.map_err(driver("copy to host"))
    }

    /// Runs `steps` steps in one launch and waits for them. `stamps`: keep the last step's times.
    ///
    /// # Errors
    /// The driver's; after a wait that ran out of time, what it waited for.
    pub fn run(&mut self, steps: u32, stamps: bool) -> Result<(), CudaError> {
        self.walk(Walk::Whole, steps, stamps)
    }

    /// Some passes of `steps` steps in one launch, without a limit on tokens; waits for them.
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn walk(&mut self, walk: Walk, steps: u32, stamps: bool) -> Result<(), CudaError> {
        let mut args = self.args(steps, walk);
        args.stamps = if stamps { self.stamps } else { 0 };
        self.launch(&args)?;
        self.gpu.wait().map_err(|e| self.explain(e))
    }

    fn args(&self, steps: u32, walk: Walk) -> StepArgs {
        let mut args = self.program.args(&self.states, self.steps, steps);
        args.fault = self.fault as u64;
        let range = self.range(walk);
        (args.begin, args.end) = (range.start, range.end);
        args
    }

    fn launch(&mut self, args: &StepArgs) -> Result<(), CudaError> {
        let shape = LaunchConfig {
            grid_dim: (self.ctas, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: (RESIDENT_HEADER_BYTES + self.program.x_bytes) as u32,
        };
        self.steps = self.steps.wrapping_add(args.steps as u32);
        // SAFETY: the program's addresses are those of this GPU's arenas.
        let launched = unsafe { self.gpu.launch_cooperative(&self.function, shape, args) };
        launched.map_err(|e| self.explain(e))
    }

    /// A driver error with the fault record, when there is one.
    fn explain(&self, error: CudaError) -> CudaError {
        // SAFETY: pinned host memory; the kernel is over.
        let record = unsafe { self.fault.read_volatile() };
        if record.set == 0 {
            return error;
        }
        describe(&record, &self.program, self.bases.state)
    }

    /// Cycle stamps of the last step that kept them: `[CTAs][instructions][start, ready, end]`.
    ///
    /// # Errors
    /// The driver's.
    pub fn stamps(&mut self) -> Result<Vec<i64>, CudaError> {
        self.gpu.bind()?;
        let mut out = vec![0i64; self.ctas as usize * self.program.instructions.len() * 3];
        // SAFETY: allocated with that many values.
        unsafe { result::memcpy_dtoh_sync(&mut out, self.stamps) }
            .map_err(driver("copy to host"))?;
        Ok(out)
    }

    /// GB/s of reading the weight arena once with bulk copies and dropping it: the memory's limit.
    ///
    /// # Errors
    /// The driver's.
    pub fn read_limit(&self) -> Result<f64, CudaError> {
        use cudarc::driver::PushKernelArg;
        const SHARED: u32 = 8 * 16384 + 256;
        let function = Gpu::function_of(&self.module, "resident_stream", SHARED)?;
        let pages = (self.program.weight_bytes as u64).min(8 << 30) / 16384;
        let shape = LaunchConfig {
            grid_dim: (self.ctas, 1, 1),
            block_dim: (32, 1, 1),
            shared_mem_bytes: SHARED,
        };
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            let start = std::time::Instant::now();
            let mut launch = self.gpu.stream.launch_builder(&function);
            launch.arg(&self.bases.weights).arg(&pages);
            // SAFETY: reads inside the weight arena only.
            unsafe { launch.launch(shape) }.map_err(driver("launch"))?;
            self.gpu.wait()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(pages as f64 * 16384.0 / best * 1e-9)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        // SAFETY: allocated in `new`, not used after; a lost context makes these fail, which changes
        // nothing.
        unsafe {
            let _ = result::free_sync(self.bases.weights);
            let _ = result::free_sync(self.bases.state);
            let _ = result::free_sync(self.stamps);
            let _ = result::free_host(self.fault.cast());
            self.pinned.free();
        }
    }
}
