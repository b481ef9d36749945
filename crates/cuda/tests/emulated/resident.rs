//! The resident kernel on the emulator: whole steps of the tiny checkpoints on 1, 2 and 4 ranks
//! against the reference network, and what its planted bugs do.

use std::path::PathBuf;

use cuda::layout::{StepArgs, StepState};
use cuda::load::{Source, formats, program_bytes, turns};
use cuda::program::{Bases, Program};
use cuda::replay::largest_difference;
use cuda::schedule::{Schedule, Shard};
use cuda_emulator::{Bug, Grid, resident};
use model::reference::network::Network;
use model::{Checkpoint, Config, Weights};

const CTAS: usize = 3;
const CONTEXT: usize = 64;

/// One emulated rank: its memory and its program.
struct Rank {
    program: Program,
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
    fn new(config: &Config, weights: &Weights<'_>, rank: usize, ranks: usize) -> Self {
        let shard = Shard {
            rank,
            ranks,
            ctas: CTAS,
        };
        let schedule = Schedule::new(config, shard).unwrap();
        let formats = formats(weights);
        let sizes = Program::new(config, &schedule, &formats, CONTEXT, Bases::default()).unwrap();
        let mut weight_memory = vec![0u128; sizes.weight_bytes / 16 + 9];
        let mut state = vec![0u128; sizes.state_bytes / 16 + 9];
        let (w, s) = (aligned(&weight_memory), aligned(&state));
        let bases = Bases {
            weights: weight_memory.as_ptr() as u64 + w as u64,
            state: state.as_ptr() as u64 + s as u64,
        };
        let program = Program::new(config, &schedule, &formats, CONTEXT, bases).unwrap();
        let source = Source {
            config,
            weights,
            formats: &formats,
            rank,
            ranks,
        };
        for piece in &program.pieces {
            let made = source.piece(piece).unwrap();
            bytes(&mut weight_memory)[w + piece.offset..][..made.len()].copy_from_slice(&made);
        }
        for t in &program.turns {
            let made = turns(t, CONTEXT);
            bytes(&mut state)[s + t.offset..][..made.len()].copy_from_slice(&made);
        }
        let made = program_bytes(&program);
        bytes(&mut state)[s + program.places.program..][..made.len()].copy_from_slice(made);
        Self {
            program,
            _weights: weight_memory,
            state,
        }
    }

    fn base(&self) -> u64 {
        self.state.as_ptr() as u64 + aligned(&self.state) as u64
    }

    fn step_state(&mut self) -> &mut StepState {
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
struct Group {
    ranks: Vec<Rank>,
    steps: u32,
}

impl Group {
    fn new(config: &Config, weights: &Weights<'_>, ranks: usize) -> Self {
        let rank = |r| Rank::new(config, weights, r, ranks);
        Self {
            ranks: (0..ranks).map(rank).collect(),
            steps: 0,
        }
    }

    fn set(&mut self, tokens: &[u32], position: usize, chain: i32) {
        for rank in &mut self.ranks {
            let state = rank.step_state();
            (state.rows, state.position, state.chain) = (tokens.len() as i32, position as i32, chain);
            for (to, token) in state.tokens.iter_mut().zip(tokens) {
                *to = *token as i32;
            }
        }
    }

    fn run(&mut self, steps: u32, seed: u64, bug: Bug) -> Result<(), String> {
        let bases: Vec<u64> = self.ranks.iter().map(Rank::base).collect();
        let of = |r: &Rank| r.program.args(&bases, self.steps, steps);
        let args: Vec<StepArgs> = self.ranks.iter().map(of).collect();
        self.steps += steps;
        let grid = Grid {
            ctas: CTAS as i32,
            seed,
            bug,
        };
        // SAFETY: the addresses are those of the ranks' arenas, sized by the program.
        unsafe { resident(&args, grid) }
    }

    /// Logits of a row over all ranks.
    fn logits(&mut self, row: usize, vocab: usize) -> Vec<f32> {
        let each = vocab / self.ranks.len();
        let ranks = self.ranks.iter_mut();
        ranks.flat_map(|r| r.logits(row, each)).collect()
    }
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../goldens/mimo")
        .join(name)
}

/// Steps of 3, 1 and 8 rows; largest difference of logits over the largest logit, by steps.
fn differences(name: &str, ranks: usize) -> Vec<f32> {
    let dir = golden(name);
    let config = Config::load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let network = Network::new(&config, &weights);
    let mut cache = network.empty_cache();
    let mut group = Group::new(&config, &weights, ranks);
    let mut position = 0;
    let mut out = Vec::new();
    for (step, rows) in [3u32, 1, 8].into_iter().enumerate() {
        let tokens: Vec<u32> = (0..rows).map(|r| (step as u32 * 31 + r * 17 + 5) % 97).collect();
        group.set(&tokens, position, 0);
        group.run(1, step as u64 + 1, Bug::None).unwrap();
        let mut expected = Vec::new();
        for (row, &token) in tokens.iter().enumerate() {
            let at = (position + row) as u32;
            let hidden = network.forward(token, at, &mut cache, |_, _| {});
            expected.push(network.logits(&hidden));
        }
        let found: Vec<Vec<f32>> = (0..tokens.len())
            .map(|row| group.logits(row, config.vocab_size))
            .collect();
        for (row, logits) in found.iter().enumerate() {
            let best = model::reference::sample::first_largest(logits).unwrap();
            for rank in &mut group.ranks {
                assert_eq!(rank.step_state().best[row], best as i32, "row {row}");
            }
        }
        out.push(largest_difference(&found, &expected));
        position += tokens.len();
    }
    out
}

#[test]
fn steps_of_the_fused_mxfp4_checkpoint_match_the_network() {
    for ranks in [1, 2] {
        let found = differences("fused-mxfp4-bf16-router-s1", ranks);
        println!("{ranks} ranks: {found:?}");
        assert!(found.iter().all(|d| *d < 2e-2), "{ranks} ranks: {found:?}");
    }
}
