//! The CUDA kernels on a CPU. Owns the calls into the emulator; the emulator is `kernels/emu/emu.h`.
//!
//! One launch at a time: the emulated machine is one global, guarded by a lock. A launch ends with
//! the emulator's report: `Ok` when every thread returned, `Err` names what went wrong and where.

use std::ffi::{CStr, c_char};
use std::sync::Mutex;

static MACHINE: Mutex<()> = Mutex::new(());
const REPORT_BYTES: usize = 1024;

/// Bugs that can be planted in the kernels, to show that the emulator catches them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Bug {
    /// None: the kernels as they are.
    None,
    /// The loader does not wait for a stage to be emptied.
    NoSlotWait,
    /// Consumers do not give a stage back.
    NoArrive,
    /// A reader asks for the words of another epoch than was written.
    WrongEpoch,
    /// A reader takes words without looking at their tag.
    StaleWord,
}

/// Weight format of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Format {
    /// MXFP4.
    Fp4,
    /// FP8 E4M3.
    Fp8,
}

/// How an emulated grid is run.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// CTAs of a rank.
    pub ctas: i32,
    /// Draws the order of everything.
    pub seed: u64,
    /// A planted bug.
    pub bug: Bug,
}

unsafe extern "C" {
    fn emu_linear(
        format: i32,
        ctas: i32,
        seed: u64,
        bug: i32,
        weights: *const u8,
        x: *const f32,
        out: *mut f32,
        tiles: i32,
        k: i32,
        report: *mut c_char,
    ) -> bool;
}

/// Runs `launch` with the machine held and a buffer for its report.
fn with_report(launch: impl FnOnce(*mut c_char) -> bool) -> Result<(), String> {
    let _held = MACHINE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut report = [0 as c_char; REPORT_BYTES];
    if launch(report.as_mut_ptr()) {
        return Ok(());
    }
    // SAFETY: the emulator ends the report with a zero byte inside the buffer.
    Err(unsafe { CStr::from_ptr(report.as_ptr()) }
        .to_string_lossy()
        .into_owned())
}

/// `kernels/linear.cuh`: weights `[tiles][pages][page]`, `x` `[8, k]`, `out` `[tiles * 64, 8]`.
///
/// # Errors
/// The emulator's report.
///
/// # Panics
/// When `x` or `out` has another length than the shapes say.
pub fn linear(
    grid: Grid,
    format: Format,
    weights: &[u8],
    x: &[f32],
    out: &mut [f32],
) -> Result<(), String> {
    let (k, tiles) = (x.len() / 8, out.len() / 512);
    assert!(x.len() == k * 8 && out.len() == tiles * 512, "shapes");
    with_report(|report| {
        // SAFETY: the kernel reads `weights` and `x` and writes `out` within the shapes given; the
        // caller's tests size `weights` with the layout generator.
        unsafe {
            emu_linear(
                format as i32,
                grid.ctas,
                grid.seed,
                grid.bug as i32,
                weights.as_ptr(),
                x.as_ptr(),
                out.as_mut_ptr(),
                tiles as i32,
                k as i32,
                report,
            )
        }
    })
}
