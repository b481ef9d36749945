//! Emulated ranks with their memory, and the comparison of their steps with the replay.
//!
//! Owns the arenas of every rank, laid out by `cuda::program` as on a GPU.

use std::path::PathBuf;

use cuda::CudaError;
use cuda::images::{Activations, Kv, Numbers};
use cuda::layout::{FaultRecord, Instr, OPS, StepArgs, StepState};
use cuda::load::{DraftSource, Source, formats, program_bytes, turns};
use cuda::parity::Machine;
use cuda::program::{Bases, Formats, Piece, Program, Settings};
use cuda::replay::{Replay, largest_difference};
use cuda::schedule::{Buffer, Schedule, Shard};
use cuda::strips::Format;
use cuda::synthetic;
use cuda_emulator::{Bug, Grid, Switch, resident, with};
use model::draft::{Draft, DraftOptions};
use model::{Checkpoint, Config, Weights};

pub(crate) const CTAS: usize = 3;
pub(crate) const CONTEXT: usize = 64;

/// A model on disk.
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) draft: Option<Draft>,
    /// How its kernel keeps numbers.
    pub(crate) numbers: Numbers,
    /// Their positions.
    pub(crate) context: usize,
    _dir: Option<tempfile::TempDir>,
}

impl Model {
    pub(crate) fn golden(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("../../goldens/mimo")
            .join(name);
        Self::of(Config::load(&dir).unwrap(), Checkpoint::open(&dir).unwrap())
    }

    pub(crate) fn of(config: Config, checkpoint: Checkpoint) -> Self {
        Self {
            config,
            checkpoint,
            draft: None,
            numbers: Numbers::default(),
            context: CONTEXT,
            _dir: None,
        }
    }

    /// With the drafter in `draft`, both below `goldens/`.
    pub(crate) fn drafted(target: &str, draft: &str) -> Self {
        let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
        Self::with_drafter(target, &goldens.join(draft))
    }

    /// With the drafter in `draft` as if it had been made for three layers of `target`.
    pub(crate) fn drafted_for_three_layers(target: &str, draft: &str) -> Self {
        let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
        let (from, to) = (goldens.join(draft), tempfile::tempdir().unwrap());
        let config = std::fs::read_to_string(from.join("config.json")).unwrap();
        let config = config.replace(r#""num_target_layers": 4"#, r#""num_target_layers": 3"#);
        // The last tap of a drafter for four layers.
        let config = config.replace("      3\n", "      2\n");
        std::fs::write(to.path().join("config.json"), config).unwrap();
        let name = "model.safetensors";
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
        let model = Self::with_drafter(target, to.path());
        Self {
            _dir: Some(to),
            ..model
        }
    }

    fn with_drafter(target: &str, draft: &std::path::Path) -> Self {
        let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
        let dir = goldens.join(target);
        let config = Config::load(&dir).unwrap();
        Self {
            draft: Some(Draft::open(draft, &config, DraftOptions::default()).unwrap()),
            checkpoint: Checkpoint::open(&dir).unwrap(),
            config,
            numbers: Numbers::default(),
            context: CONTEXT,
            _dir: None,
        }
    }

    /// Random weights.
    pub(crate) fn synthetic(config: Config, formats: &Formats) -> Self {
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), &config, formats, 7).unwrap();
        Self {
            config,
            checkpoint: Checkpoint::open(dir.path()).unwrap(),
            draft: None,
            numbers: Numbers::default(),
            context: CONTEXT,
            _dir: Some(dir),
        }
    }

    /// The synthetic model that divides into 8 ranks, with its drafter.
    pub(crate) fn synthetic_drafted() -> Self {
        let (config, shape) = (synthetic::eight_ranks(), synthetic::eight_rank_drafter());
        let formats = Formats::release(&config, Format::Fp8);
        let mut model = Self::synthetic(config, &formats);
        let dir = model._dir.as_ref().unwrap().path().join("dflash");
        std::fs::create_dir(&dir).unwrap();
        synthetic::write_drafter(&dir, &shape, Format::Bf16, 5).unwrap();
        model.draft = Some(Draft {
            checkpoint: Checkpoint::open(&dir).unwrap(),
            mask_embedding: None,
            config: shape,
        });
        model
    }

    /// With numbers kept like that.
    pub(crate) fn with(mut self, numbers: impl Into<Numbers>) -> Self {
        self.numbers = numbers.into();
        self
    }

    fn settings(&self) -> Settings {
        let (context, numbers) = (self.context, self.numbers);
        Settings { context, numbers }
    }

    pub(crate) fn weights(&self) -> Weights<'_> {
        Weights::new(&self.config, &self.checkpoint).unwrap()
    }

    /// `ranks` emulated GPUs that hold it.
    pub(crate) fn group(&self, ranks: usize) -> Group {
        self.some_ranks(0..ranks, ranks)
    }

    /// Some of the ranks alone.
    pub(crate) fn some_ranks(&self, which: std::ops::Range<usize>, ranks: usize) -> Group {
        self.some_pieces(which, ranks, &|_| true)
    }

    /// The same, with those weights alone that `keep` wants.
    pub(crate) fn some_pieces(
        &self,
        which: std::ops::Range<usize>,
        ranks: usize,
        keep: &dyn Fn(&Piece) -> bool,
    ) -> Group {
        let weights = self.weights();
        let draft = self.draft.as_ref();
        let rank = |r| {
            Rank::new(
                &self.config,
                &weights,
                draft,
                self.settings(),
                (r, ranks),
                keep,
            )
        };
        Group {
            ranks: which.map(rank).collect(),
            steps: 0,
        }
    }
}

/// What the emulator is told of numbers that are kept like that.
fn switches(numbers: Numbers) -> Vec<Switch> {
    let activations = match numbers.activations {
        Activations::Exact => None,
        Activations::E4m3 => Some(Switch::OneTerm),
        Activations::Wide => Some(Switch::Wide),
    };
    let kv = match numbers.kv {
        Kv::Bf16 => None,
        Kv::Fp8 => Some(Switch::KvFp8),
        Kv::Wide => Some(Switch::KvWide),
    };
    activations.into_iter().chain(kv).collect()
}

/// One emulated rank: its memory and its program.
pub(crate) struct Rank {
    pub(crate) program: Program,
    _weights: Vec<u128>,
    state: Vec<u128>,
}

fn bytes(memory: &mut [u128]) -> &mut [u8] {
    let size = size_of_val(memory);
    // SAFETY: any bytes are a u128.
    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), size) }
}

/// Memory aligned to 128 bytes: its first such offset.
fn aligned(memory: &[u128]) -> usize {
    let at = memory.as_ptr() as usize;
    at.next_multiple_of(128) - at
}

impl Rank {
    fn new(
        config: &Config,
        weights: &Weights<'_>,
        draft: Option<&Draft>,
        settings: Settings,
        (rank, ranks): (usize, usize),
        keep: &dyn Fn(&Piece) -> bool,
    ) -> Self {
        let shard = Shard {
            rank,
            ranks,
            ctas: CTAS,
        };
        let drafter = draft.map(|d| d.weights().unwrap());
        let formats = formats(weights, draft.zip(drafter.as_ref()));
        let own = formats.draft.as_ref();
        let shape = own.map(|d| &d.config);
        let schedule = Schedule::with_draft(config, shape, shard).unwrap();
        cuda::check::check(&schedule).unwrap();
        let sizes = Program::new(config, &schedule, &formats, settings, Bases::NOWHERE).unwrap();
        let mut weight_memory = vec![0u128; sizes.weight_bytes / 16 + 9];
        let mut state = vec![0u128; sizes.state_bytes / 16 + 9];
        let (w, s) = (aligned(&weight_memory), aligned(&state));
        let bases = Bases {
            weights: weight_memory.as_ptr() as u64 + w as u64,
            state: state.as_ptr() as u64 + s as u64,
        };
        let program = Program::new(config, &schedule, &formats, settings, bases).unwrap();
        let source = Source {
            config,
            weights,
            formats: &formats,
            rank,
            ranks,
        };
        for piece in program.pieces.iter().filter(|p| keep(p)) {
            let drafter = own.zip(drafter.as_ref()).map(|(formats, weights)| {
                let mask_embedding = draft.and_then(|d| d.mask_embedding.as_deref());
                let (rank, ranks) = (rank, ranks);
                DraftSource {
                    formats,
                    weights,
                    mask_embedding,
                    rank,
                    ranks,
                }
            });
            let made = drafter.and_then(|d| d.piece(piece).unwrap());
            let made = made.unwrap_or_else(|| source.piece(piece).unwrap());
            bytes(&mut weight_memory)[w + piece.offset..][..made.len()].copy_from_slice(&made);
        }
        for t in &program.turns {
            let made = turns(t, settings.context);
            bytes(&mut state)[s + t.offset..][..made.len()].copy_from_slice(&made);
        }
        let mut rank = Self {
            program,
            _weights: weight_memory,
            state,
        };
        rank.put_program();
        rank
    }

    fn put_program(&mut self) {
        let at = aligned(&self.state) + self.program.places.program;
        let made = program_bytes(&self.program).to_vec();
        bytes(&mut self.state)[at..at + made.len()].copy_from_slice(&made);
    }

    /// Tiles of `positions` and `parts` CTAs a unit in layers of full attention.
    pub(crate) fn split_attention(&mut self, (parts, positions): (i32, i32)) {
        let attention = |i: &&mut Instr| OPS[i.op as usize] == "ATTENTION";
        for i in self.program.instructions.iter_mut().filter(attention) {
            i.parts = if i.window < 0 { parts } else { 1 };
            i.rows = positions;
        }
        self.put_program();
    }

    pub(crate) fn base(&self) -> u64 {
        self.state.as_ptr() as u64 + aligned(&self.state) as u64
    }

    pub(crate) fn step_state(&mut self) -> &mut StepState {
        let at = aligned(&self.state) + self.program.places.state;
        // SAFETY: the arena holds a StepState there, aligned to 128 bytes.
        unsafe { &mut *bytes(&mut self.state)[at..].as_mut_ptr().cast() }
    }

    fn logits(&mut self, row: usize, vocab: usize) -> Vec<f32> {
        let places = self.program.places;
        let at = aligned(&self.state) + places.logits + row * places.logit_rows * 4;
        let row = &bytes(&mut self.state)[at..at + vocab * 4];
        row.chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

/// A group of ranks that has run some steps.
pub(crate) struct Group {
    pub(crate) ranks: Vec<Rank>,
    pub(crate) steps: u32,
}

impl Group {
    pub(crate) fn set(&mut self, tokens: &[u32], position: usize, chain: i32) {
        for rank in &mut self.ranks {
            let state = rank.step_state();
            (state.rows, state.position, state.chain) =
                (tokens.len() as i32, position as i32, chain);
            for (to, token) in state.tokens.iter_mut().zip(tokens) {
                *to = *token as i32;
            }
        }
    }

    /// Arguments of every rank for the next `steps` steps.
    pub(crate) fn args(&mut self, steps: u32) -> Vec<StepArgs> {
        let bases: Vec<u64> = self.ranks.iter().map(Rank::base).collect();
        let of = |r: &Rank| r.program.args(&bases, self.steps, steps);
        let args = self.ranks.iter().map(of).collect();
        self.steps += steps;
        args
    }

    pub(crate) fn run(&mut self, steps: u32, seed: u64, bug: Bug) -> Result<(), String> {
        let args = self.args(steps);
        self.launch(&args, seed, bug)
    }

    /// A run whose waits that never end leave a record, of rank 0 in the first place.
    pub(crate) fn run_to_fault(&mut self, seed: u64, bug: Bug) -> Vec<FaultRecord> {
        let mut records = vec![FaultRecord::default(); self.ranks.len()];
        let mut args = self.args(1);
        for (args, record) in args.iter_mut().zip(&mut records) {
            args.fault = std::ptr::from_mut(record) as u64;
        }
        assert!(self.launch(&args, seed, bug).is_err(), "{bug:?}");
        records
    }

    /// What the emulator is told of its kernel.
    pub(crate) fn switches(&self) -> Vec<Switch> {
        switches(self.ranks[0].program.numbers)
    }

    fn launch(&self, args: &[StepArgs], seed: u64, bug: Bug) -> Result<(), String> {
        let grid = Grid {
            ctas: CTAS as i32,
            seed,
            bug,
        };
        // SAFETY: the addresses are those of the ranks' arenas, sized by the program.
        let launch = || unsafe { resident(args, grid) };
        with(&self.switches(), launch)
    }

    /// Logits of a row over all ranks.
    pub(crate) fn logits(&mut self, row: usize, vocab: usize) -> Vec<f32> {
        let each = vocab / self.ranks.len();
        let ranks = self.ranks.iter_mut();
        ranks.flat_map(|r| r.logits(row, each)).collect()
    }
}

/// Steps of `rows` rows each on `ranks` ranks, against the replay with the device's roundings; full attention
/// in `split` parts of so many positions where it says so. Largest difference of logits over the
/// largest logit, by steps; choices are those of the logits on every rank.
pub(crate) fn differences(
    model: &Model,
    ranks: usize,
    rows: &[u32],
    split: Option<(i32, i32)>,
) -> Vec<f32> {
    let (config, weights) = (&model.config, model.weights());
    let shard = Shard {
        rank: 0,
        ranks: 1,
        ctas: CTAS,
    };
    let schedule = Schedule::new(config, shard).unwrap();
    let mut replay = Replay::new(config, &weights, &schedule).as_device(model.numbers);
    let mut group = model.group(ranks);
    for rank in &mut group.ranks {
        split.into_iter().for_each(|s| rank.split_attention(s));
    }
    let (mut position, mut out) = (0, Vec::new());
    for (step, &rows) in rows.iter().enumerate() {
        let token = |r: u32| (step as u32 * 31 + r * 17 + 5) % 97;
        let tokens: Vec<u32> = (0..rows).map(token).collect();
        group.set(&tokens, position, 0);
        group.run(1, step as u64 + 1, Bug::None).unwrap();
        replay.run(&tokens, position, usize::MAX);
        let row = |row: usize| group.logits(row, config.vocab_size);
        let found: Vec<Vec<f32>> = (0..tokens.len()).map(row).collect();
        for (row, logits) in found.iter().enumerate() {
            let best = model::reference::sample::first_largest(logits).unwrap();
            for rank in &mut group.ranks {
                assert_eq!(rank.step_state().best[row], best as i32, "row {row}");
            }
        }
        out.push(largest_difference(&found, replay.buffer(0, Buffer::Logits)));
        position += tokens.len();
    }
    out
}

impl Machine for Group {
    fn program(&self, rank: usize) -> &Program {
        &self.ranks[rank].program
    }

    fn base(&self, rank: usize) -> u64 {
        self.ranks[rank].base()
    }

    fn run(&mut self, instructions: usize) -> Result<(), CudaError> {
        self.steps = 0;
        let mut args = self.args(1);
        for args in &mut args {
            args.end = instructions as i32;
        }
        let fault = |report: String| CudaError::Fault {
            place: "the emulator".into(),
            reason: report,
        };
        self.launch(&args, instructions as u64, Bug::None)
            .map_err(fault)
    }

    fn read(&mut self, rank: usize, offset: usize, out: &mut [u8]) -> Result<(), CudaError> {
        let state = &mut self.ranks[rank].state;
        let at = aligned(state) + offset;
        out.copy_from_slice(&bytes(state)[at..at + out.len()]);
        Ok(())
    }

    fn write(&mut self, rank: usize, offset: usize, made: &[u8]) -> Result<(), CudaError> {
        let state = &mut self.ranks[rank].state;
        let at = aligned(state) + offset;
        bytes(state)[at..at + made.len()].copy_from_slice(made);
        Ok(())
    }
}
