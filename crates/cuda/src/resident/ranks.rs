//! The ranks of a model on the GPUs of one host, each with the addresses of the others' arenas.
//!
//! Owns who is started first and waited for when: all are launched before one is waited for, because their kernels wait
//! for each other. Refuses GPUs that cannot write to each other's memory. Invariant: between two calls no kernel runs.

use cudarc::driver::result;

use super::{Part, Resident, Walk};
use crate::CudaError;
use crate::gpu::driver;
use crate::parity::Machine;
use crate::program::{Formats, Program};
use model::Config;

/// One [`Resident`] for each rank, rank `n` on GPU `n`.
pub struct Ranks(Vec<Resident>);

impl From<Resident> for Ranks {
    /// One rank; others, if it has any, are looped back.
    fn from(alone: Resident) -> Self {
        Self(vec![alone])
    }
}

impl Ranks {
    /// All ranks of `part` (whose own rank does not count), with weights that are undefined until they are loaded or filled.
    ///
    /// # Errors
    /// As [`Resident::new`], of any GPU; GPUs that do not reach each other.
    pub fn new(config: &Config, formats: &Formats, part: Part) -> Result<Self, CudaError> {
        if part.ranks == 0 {
            return Err(CudaError::Shape {
                what: "ranks",
                expected: "at least 1".into(),
                found: "0".into(),
            });
        }
        let on = |rank| Resident::on(rank, config, formats, Part { rank, ..part });
        let mut ranks = (0..part.ranks)
            .map(on)
            .collect::<Result<Vec<_>, CudaError>>()?;
        for (from, to) in (0..ranks.len()).flat_map(|a| (0..ranks.len()).map(move |b| (a, b))) {
            if from != to {
                ranks[from].gpu.reach(&ranks[to].gpu)?;
            }
        }
        let states: Vec<u64> = ranks.iter().map(|r| r.bases.state).collect();
        for rank in &mut ranks {
            rank.states.clone_from(&states);
        }
        Ok(Self(ranks))
    }

    /// The ranks.
    #[must_use]
    pub fn each(&mut self) -> &mut [Resident] {
        &mut self.0
    }

    /// The first one: who is asked what a step left behind.
    #[must_use]
    pub fn first(&mut self) -> &mut Resident {
        &mut self.0[0]
    }

    /// Runs `steps` steps in one launch a rank and waits for all. `stamps`: keep the last step's times.
    ///
    /// # Errors
    /// The driver's; after a wait that ran out of time, what it waited for, of the first rank that says so.
    pub fn run(&mut self, steps: u32, stamps: bool) -> Result<(), CudaError> {
        let all = self.first().program.instructions.len();
        self.run_first(all, steps, stamps)
    }

    fn run_first(
        &mut self,
        instructions: usize,
        steps: u32,
        stamps: bool,
    ) -> Result<(), CudaError> {
        for rank in &mut self.0 {
            let mut args = rank.args(steps, Walk::Whole);
            args.end = instructions as i32;
            args.stamps = if stamps { rank.stamps } else { 0 };
            rank.launch(&args)?;
        }
        let mut done = Ok(());
        for rank in &self.0 {
            let waited = rank.gpu.wait().map_err(|e| rank.explain(e));
            if done.is_ok() || matches!(waited, Err(CudaError::Fault { .. })) {
                done = done.and(waited);
            }
        }
        done
    }
}

/// The machine of the op by op comparison. A run leaves the step count at 0, because the comparison clears the counters
/// before each; ordinary runs after it need them cleared once more.
impl Machine for Ranks {
    fn program(&self, rank: usize) -> &Program {
        &self.0[rank].program
    }

    fn base(&self, rank: usize) -> u64 {
        self.0[rank].bases.state
    }

    fn run(&mut self, instructions: usize) -> Result<(), CudaError> {
        self.0.iter_mut().for_each(|rank| rank.steps = 0);
        let done = self.run_first(instructions, 1, false);
        self.0.iter_mut().for_each(|rank| rank.steps = 0);
        done
    }

    fn read(&mut self, rank: usize, offset: usize, out: &mut [u8]) -> Result<(), CudaError> {
        let rank = &self.0[rank];
        rank.gpu.bind()?;
        assert!(offset + out.len() <= rank.program.state_bytes, "arena");
        // SAFETY: inside the state arena, as just checked.
        unsafe { result::memcpy_dtoh_sync(out, rank.bases.state + offset as u64) }
            .map_err(driver("copy to host"))
    }

    fn write(&mut self, rank: usize, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        let rank = &self.0[rank];
        assert!(offset + bytes.len() <= rank.program.state_bytes, "arena");
        rank.put(offset, bytes)
    }
}
