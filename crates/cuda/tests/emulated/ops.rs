//! The small ops on the emulator.

use cuda::layout::OpArgs;
use cuda_emulator::ops;

use crate::op_cases as cases;

fn emulate(mut args: OpArgs, buffers: &mut [Vec<u32>]) {
    for (slot, buffer) in args.p.iter_mut().zip(buffers) {
        *slot = buffer.as_mut_ptr() as u64;
    }
    // SAFETY: the cases size their buffers as ops.cuh says.
    unsafe { ops(&args, 21) }.unwrap();
}

#[test]
fn rms_norm_matches() {
    cases::rms_norm_rows(&emulate);
}

#[test]
fn rope_matches() {
    cases::rope_heads(&emulate);
}

#[test]
fn swiglu_matches() {
    cases::swiglu_values(&emulate);
}

#[test]
fn router_chooses_the_same_experts() {
    cases::router_choices(&emulate);
}

#[test]
fn attention_matches_whole_and_split() {
    cases::attention_heads(&emulate);
}

#[test]
fn argmax_takes_the_first_of_the_largest() {
    cases::argmax_rows(&emulate);
}

#[test]
fn accept_counts_the_common_prefix() {
    cases::accepted_prefix(&emulate);
}
