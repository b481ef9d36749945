//! Ctrl-C as a flag, so that it stops an answer and not the program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::Result;

static PRESSED: AtomicU32 = AtomicU32::new(0);
static ANSWERING: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<()> = OnceLock::new();

/// From now on Ctrl-C is counted. Between answers, the second one in a row ends the program.
pub(crate) fn install() -> Result<()> {
    if INSTALLED.set(()).is_ok() {
        ctrlc::set_handler(|| {
            let before = PRESSED.fetch_add(1, Ordering::SeqCst);
            if !ANSWERING.load(Ordering::SeqCst) {
                if before > 0 {
                    std::process::exit(0);
                }
                eprintln!("\n(Ctrl-C again or /quit to leave)");
            }
        })?;
    }
    Ok(())
}

/// Marks the time in which Ctrl-C stops an answer.
pub(crate) fn answering(on: bool) {
    PRESSED.store(0, Ordering::SeqCst);
    ANSWERING.store(on, Ordering::SeqCst);
}

/// Whether Ctrl-C was pressed since [`answering`] was called.
pub(crate) fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst) > 0
}
