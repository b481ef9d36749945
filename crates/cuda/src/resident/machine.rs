//! A GPU as the machine of the op by op comparison.
//!
//! Invariant: a run leaves the step count at 0, because the comparison clears the counters before each; ordinary
//! runs after it need them cleared once more.

use cudarc::driver::result;

use super::Resident;
use crate::CudaError;
use crate::gpu::driver;
use crate::parity::Machine;
use crate::program::Program;

impl Machine for Resident {
    fn program(&self, _rank: usize) -> &Program {
        &self.program
    }

    fn base(&self, _rank: usize) -> u64 {
        self.bases.state
    }

    fn run(&mut self, instructions: usize) -> Result<(), CudaError> {
        self.steps = 0;
        let done = self.run_first(instructions, 1, false);
        self.steps = 0;
        done
    }

    fn read(&mut self, _rank: usize, offset: usize, out: &mut [u8]) -> Result<(), CudaError> {
        self.gpu.bind()?;
        assert!(offset + out.len() <= self.program.state_bytes, "arena");
        // SAFETY: inside the state arena, as just checked.
        unsafe { result::memcpy_dtoh_sync(out, self.bases.state + offset as u64) }
            .map_err(driver("copy to host"))
    }

    fn write(&mut self, _rank: usize, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        assert!(offset + bytes.len() <= self.program.state_bytes, "arena");
        self.put(offset, bytes)
    }
}
