//! A run of many steps without the host: one launch, tokens out of a ring while it goes on.
//!
//! Owns the pinned memory of the ring and the polling. Invariant: when [`Resident::generate`] returns, no kernel runs
//! and every token that it gave has been handed out.

use cudarc::driver::result;

use super::Resident;
use crate::CudaError;
use crate::gpu::driver;
use crate::layout::{HostWords, StepState};
use crate::ring::{Given, Ring, RingWord};

/// Words of the ring: seconds of text, so that a host that is busy elsewhere does not stop the device.
const RING_WORDS: usize = 4096;

/// Which passes of a step a launch executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// All: draft, verify, context.
    Whole,
    /// The drafter's block alone.
    Draft,
    /// The target and the drafter's context: prompts, and steps without drafts.
    Verify,
}

/// The ring's pinned memory; freed by [`Resident`].
pub(super) struct Pinned {
    pub(super) ring: Ring,
    memory: *mut std::ffi::c_void,
}

impl Pinned {
    pub(super) fn new() -> Result<Self, CudaError> {
        let bytes = RING_WORDS * size_of::<RingWord>();
        // SAFETY: pinned memory of that size and 64 bytes more, zeroed before use, freed in `free`;
        // pinned memory is aligned to a page.
        unsafe {
            let memory = result::malloc_host(bytes + 64, 0).map_err(driver("allocate the ring"))?;
            std::ptr::write_bytes(memory.cast::<u8>(), 0, bytes + 64);
            let host = memory.cast::<u8>().add(bytes).cast::<HostWords>();
            let ring = Ring::new(memory.cast(), RING_WORDS, host);
            Ok(Self { ring, memory })
        }
    }

    /// # Safety
    /// No kernel that writes the ring runs, and none will.
    pub(super) unsafe fn free(&mut self) {
        // SAFETY: allocated in `new`; the caller's promise. A lost context makes it fail, which changes nothing.
        let _ = unsafe { result::free_host(self.memory) };
    }
}

impl Resident {
    /// First and last instruction of `walk`.
    pub(super) fn range(&self, walk: Walk) -> std::ops::Range<i32> {
        let (verify, end) = (self.program.verify_begin, self.program.instructions.len());
        match walk {
            Walk::Whole => 0..end as i32,
            Walk::Draft => 0..verify as i32,
            Walk::Verify => verify as i32..end as i32,
        }
    }

    /// One step like [`Resident::walk`], with `meanwhile` called between the launch and the wait.
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn walk_while(&mut self, walk: Walk, meanwhile: &mut dyn FnMut()) -> Result<(), CudaError> {
        let args = self.args(1, walk);
        self.launch(&args)?;
        meanwhile();
        self.gpu.wait().map_err(|e| self.explain(e))
    }

    /// Runs up to `steps` steps from `state` in one launch, with a chain and a limit; hands every token to `each`
    /// as it comes, which ends the run by saying false. Gives what the last step left.
    ///
    /// # Errors
    /// The driver's; after a wait that ran out of time, what it waited for.
    pub fn generate(
        &mut self,
        state: &StepState,
        walk: Walk,
        steps: u32,
        mut each: impl FnMut(Given) -> bool,
    ) -> Result<StepState, CudaError> {
        let produced = self.pinned.ring.taken();
        self.set_state(&StepState { produced, ..*state })?;
        let mut args = self.args(steps, walk);
        (args.ring, args.host) = self.pinned.ring.addresses();
        args.ring_words = self.pinned.ring.words() as i32;
        self.pinned.ring.stop(false);
        let before = self.steps;
        self.launch(&args)?;
        let done = self.gpu.mark()?;
        loop {
            // Asked before the ring is emptied: what a finished kernel has put there is seen.
            let over = self.gpu.reached(&done).map_err(|e| self.explain(e))?;
            while let Some(given) = self.pinned.ring.take() {
                if !each(given) {
                    self.pinned.ring.stop(true);
                }
            }
            if over {
                break;
            }
            std::hint::spin_loop();
        }
        let left = self.state()?;
        self.steps = before.wrapping_add(left.steps as u32);
        Ok(left)
    }
}
