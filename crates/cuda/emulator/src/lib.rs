//! The CUDA kernels on a CPU. Owns the calls into the emulator; the emulator is `kernels/emu/emu.h`.
//!
//! One launch at a time: the emulated machine is one global, guarded by a lock. A launch ends with
//! the emulator's report: `Ok` when every thread returned, `Err` names what went wrong and where.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

thread_local! {
    static SWITCHES: Cell<i32> = const { Cell::new(0) };
}

/// What a compiler of the resident kernel may be told (`cuda::images`), by the bit that `kernels/emu/entry.cpp` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Switch {
    /// Plain e4m3 activations.
    OneTerm = 1 << 16,
    /// Keys and values of the target in e4m3.
    KvFp8 = 1 << 17,
    /// The kernel that was compiled for the shapes of `kernels/emu/shapes_known.h`.
    KnownShapes = 1 << 18,
    /// Activations as two f16.
    Wide = 1 << 19,
    /// Keys and values of the target as two bf16.
    KvWide = 1 << 20,
}

/// Launches of the resident kernel in `body`, on this thread, with `switches`.
pub fn with<R>(switches: &[Switch], body: impl FnOnce() -> R) -> R {
    let before = SWITCHES.get();
    let all = switches.iter().fold(before, |all, &s| all | s as i32);
    SWITCHES.set(all);
    let out = body();
    SWITCHES.set(before);
    out
}

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
    /// A CTA does not say that it has finished an instruction.
    NoSignal,
    /// An instruction waits for all CTAs but one.
    OneTooFew,
    /// An instruction waits for the count of the step before.
    StepBefore,
    /// A product does not wait for its activations in shared memory.
    NoStageWait,
    /// The loader does not wait for the router's choice.
    NoListWait,
    /// A CTA keeps the sums that the next one should go on with.
    NoBaton,
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
    fn emu_ops(args: *const c_void, seed: u64, report: *mut c_char) -> bool;
    fn emu_resident(
        ranks: i32,
        ctas: i32,
        seed: u64,
        bug: i32,
        args: *const c_void,
        host: Option<extern "C" fn(*mut c_void)>,
        context: *mut c_void,
        report: *mut c_char,
    ) -> bool;
    fn emu_all_reduce(
        ranks: i32,
        words: i32,
        epochs: i32,
        seed: u64,
        bug: i32,
        input: *const f32,
        out: *mut f32,
        inbox: *mut u8,
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

/// `kernels/ops.cuh` with the struct `OpArgs` of `cuda::layout`.
///
/// # Safety
/// `args` is an `OpArgs` whose buffers have the sizes that its op reads and writes.
///
/// # Errors
/// The emulator's report.
pub unsafe fn ops<Args>(args: &Args, seed: u64) -> Result<(), String> {
    with_report(|report| {
        // SAFETY: the caller's promise.
        unsafe { emu_ops(std::ptr::from_ref(args).cast(), seed, report) }
    })
}

/// `kernels/all_reduce.cuh` on `ranks` emulated ranks: `epochs` rounds, round `e` sums `input * e`.
/// `input`, result: `[ranks, values]`, values a multiple of 3.
///
/// # Errors
/// The emulator's report.
///
/// # Panics
/// When the values do not divide into ranks and words.
pub fn all_reduce(
    ranks: usize,
    epochs: usize,
    seed: u64,
    bug: Bug,
    input: &[f32],
) -> Result<Vec<f32>, String> {
    assert!(input.len().is_multiple_of(ranks * 3), "[ranks, 3 * words]");
    let words = input.len() / ranks / 3;
    let mut out = vec![f32::NAN; input.len()];
    let mut inbox = vec![0u128; ranks * 2 * ranks * words];
    with_report(|report| {
        // SAFETY: the inbox has 16 bytes a word for [ranks][2][ranks][words]; input and out are
        // [ranks, words * 3].
        unsafe {
            emu_all_reduce(
                ranks as i32,
                words as i32,
                epochs as i32,
                seed,
                bug as i32,
                input.as_ptr(),
                out.as_mut_ptr(),
                inbox.as_mut_ptr().cast(),
                report,
            )
        }
    })?;
    Ok(out)
}

/// `kernels/resident.cuh` on one rank for each of `args`, the `StepArgs` of `cuda::layout`.
///
/// # Safety
/// The addresses in `args` are those of host buffers as `cuda::program` sizes them.
///
/// # Errors
/// The emulator's report.
pub unsafe fn resident<Args>(args: &[Args], grid: Grid) -> Result<(), String> {
    // SAFETY: the caller's promise.
    unsafe { resident_with_host(args, grid, &mut || ()) }
}

extern "C" fn call_host(context: *mut c_void) {
    // SAFETY: `resident_with_host` gives a pointer to its reference, which outlives the launch.
    let host = unsafe { &mut *context.cast::<&mut dyn FnMut()>() };
    host();
}

/// The same; `host` is what the host does now and then while the kernel runs.
///
/// # Safety
/// As [`resident`].
///
/// # Errors
/// The emulator's report.
pub unsafe fn resident_with_host<Args>(
    args: &[Args],
    grid: Grid,
    host: &mut dyn FnMut(),
) -> Result<(), String> {
    let mut host = host;
    with_report(|report| {
        // SAFETY: the caller's promise; `host` outlives the call.
        unsafe {
            emu_resident(
                args.len() as i32,
                grid.ctas,
                grid.seed,
                grid.bug as i32 | SWITCHES.get(),
                args.as_ptr().cast(),
                Some(call_host),
                (&raw mut host).cast(),
                report,
            )
        }
    })
}
