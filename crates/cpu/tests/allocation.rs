//! Nothing allocates in a step, plain or drafting, once every buffer has seen its largest size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use cpu::{CpuDecoder, CpuOptions};
use model::decoder::{Decoder, SequenceStep, StepOutput, StepPlan};
use model::draft::{Draft, DraftOptions};
use model::{Checkpoint, Config, Weights};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_allocates_nothing() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/dflash/pair-s1");
    let (config, checkpoint) = (Config::load(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let draft = Draft::open(&dir.join("dflash"), &config, DraftOptions::default()).unwrap();
    let draft_weights = draft.weights().unwrap();
    let options = CpuOptions {
        threads: Some(2),
        sequences: 4,
        ..CpuOptions::default()
    };
    let draft = Some((&draft, &draft_weights));
    let mut decoder = CpuDecoder::new(&config, &weights, draft, options).unwrap();
    let mut plan = StepPlan::default();
    for width in [1, 4, 8] {
        let sequence = decoder.open().unwrap();
        decoder.prefill(sequence, &[1, 2, 3, 4, 5, 6]).unwrap();
        plan.sequences.push(SequenceStep {
            sequence,
            width,
            chance_min: 0.0,
            simulate_accepted: None,
        });
    }
    let mut out = StepOutput::default();
    for _ in 0..12 {
        decoder.step(&plan, &mut out).unwrap();
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..6 {
        decoder.step(&plan, &mut out).unwrap();
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(allocations, 0, "allocations in 6 steps");
}
