//! Why a launch is refused and why a running kernel stopped, in one line each.
//!
//! Owns the words for a fault record: op, layer, CTA, what was waited for, wanted and seen. The emulator writes the same
//! records in a deadlock. Invariant: nothing here needs a GPU.

use crate::CudaError;
use crate::layout::{BATON_WORDS, FaultRecord, OPS, PASSES, TOKENS};
use crate::program::{Program, WORD_BYTES};

/// Refuses a grid whose CTAs do not all run at once: they wait for each other. `each`: CTAs that a
/// multiprocessor holds with `shared_bytes` of shared memory for each.
///
/// # Errors
/// [`CudaError::Grid`] when fewer fit than the grid has.
pub fn check_co_resident(
    ctas: u32,
    each: u32,
    multiprocessors: u32,
    shared_bytes: usize,
) -> Result<(), CudaError> {
    if u64::from(each) * u64::from(multiprocessors) >= u64::from(ctas) {
        return Ok(());
    }
    Err(CudaError::Grid {
        ctas,
        each,
        multiprocessors,
        shared_bytes,
    })
}

/// The words for a record that is set. `state`: the address of the rank's state arena.
#[must_use]
pub fn describe(record: &FaultRecord, program: &Program, state: u64) -> CudaError {
    let seen = format!("wanted {:#x}, seen {:#x}", record.wanted, record.seen);
    let place = instruction(program, record.instruction as usize);
    CudaError::Fault {
        place: format!(
            "step {} {place} CTA {} thread {}",
            record.step, record.cta, record.thread
        ),
        reason: format!(
            "{} did not come: {seen}",
            waited_for(record, program, state)
        ),
    }
}

/// `instruction 7 (DOWN of layer 1)`, `instruction 7 (DRAFT DOWN of layer 1)`.
fn instruction(program: &Program, at: usize) -> String {
    let op = program.instructions.get(at);
    let pass = op.map_or(0, |i| i.pass as usize);
    let pass = if pass == 0 { "" } else { PASSES[pass] };
    let op = op.map_or("?", |i| OPS[i.op as usize]);
    let layer = program.layer_of(at);
    let layer = layer.map_or(String::new(), |l| format!(" of layer {l}"));
    format!(
        "instruction {at} ({})",
        format!("{pass} {op}{layer}").trim_start()
    )
}

fn waited_for(record: &FaultRecord, program: &Program, state: u64) -> String {
    let away = |place: usize| record.at.wrapping_sub(state + place as u64) as usize;
    let places = &program.places;
    match record.what {
        1 => format!("the barrier at {} of shared memory", record.at),
        2 => {
            let (inbox, choice) = (away(places.inbox), away(places.choice));
            let baton = away(places.batons);
            if baton < program.baton_bytes() {
                let cta = baton / (BATON_WORDS * WORD_BYTES);
                return format!("the sums that CTA {cta} hands on");
            }
            let from = |offset: usize, words: usize| offset / WORD_BYTES / words % program.ranks;
            let inbox_bytes = 2 * program.ranks * program.words * WORD_BYTES;
            match inbox < inbox_bytes {
                true => format!("a word of rank {}'s sum", from(inbox, program.words)),
                false => format!("the choice of rank {}", from(choice, TOKENS)),
            }
        }
        3 => {
            let counter = away(places.counters) / 4;
            format!("the counter of {}", instruction(program, counter))
        }
        4 => "the host, which takes tokens out of its ring,".to_owned(),
        other => format!("a wait of unknown kind {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_that_does_not_fit_is_refused_in_one_line() {
        assert!(check_co_resident(132, 1, 132, 200_000).is_ok());
        assert!(check_co_resident(264, 2, 132, 100_000).is_ok());
        for (each, multiprocessors) in [(0, 132), (1, 131)] {
            let refused = check_co_resident(132, each, multiprocessors, 232_448).unwrap_err();
            assert_eq!(
                refused.to_string(),
                format!(
                    "launch refused: 132 CTAs wait for each other, but {} fit at once ({each} on each of \
                     {multiprocessors} multiprocessors with 232448 bytes of shared memory a CTA)",
                    each * multiprocessors
                )
            );
        }
    }
}
