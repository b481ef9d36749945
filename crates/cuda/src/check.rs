//! What is proved of a schedule on the host, before a launch: every wait can be satisfied, nothing
//! waits in a circle, no buffer is overwritten while a slower CTA may still read it, no page is
//! asked for before its address is known, and the ring fits in shared memory.
//!
//! Model of the machine: every CTA walks the instructions in order, at its own speed. The only order
//! between CTAs is a read that gathers ([`Op::gathers`]): it waits until every CTA has written its part.

use crate::schedule::{Instruction, Op, Schedule, Version};

/// Why a schedule must not be launched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Nobody writes what is waited for.
    #[error("instruction {at} ({op:?}) waits for {wanted:?}, which nothing writes")]
    NeverWritten {
        /// Instruction.
        at: usize,
        /// Its op.
        op: Op,
        /// What it waits for.
        wanted: Version,
    },
    /// A wait for the instruction itself or a later one: a deadlock.
    #[error(
        "instruction {at} ({op:?}) waits for {wanted:?}, which instruction {writer} writes: a circle"
    )]
    Circle {
        /// Instruction.
        at: usize,
        /// Its op.
        op: Op,
        /// What it waits for.
        wanted: Version,
        /// Who writes it.
        writer: usize,
    },
    /// Two instructions write one version.
    #[error("instructions {first} and {second} both write {version:?}")]
    WrittenTwice {
        /// The first.
        first: usize,
        /// The second.
        second: usize,
        /// What.
        version: Version,
    },
    /// A write may reach a slot that another CTA still reads.
    #[error(
        "instruction {writer} writes {version:?} over the epoch that a slower CTA may still read in instruction {reader}"
    )]
    Overwrites {
        /// Who writes.
        writer: usize,
        /// What.
        version: Version,
        /// Who may still read.
        reader: usize,
    },
    /// Page addresses are used before they are known.
    #[error("instruction {at} ({op:?}) asks for pages after {after:?} but does not wait for it")]
    UnknownPages {
        /// Instruction.
        at: usize,
        /// Its op.
        op: Op,
        /// What makes the addresses known.
        after: Version,
    },
    /// Shared memory does not hold the plan.
    #[error("shared memory: {needed} bytes needed, {limit} allowed ({stages} stages)")]
    SharedMemory {
        /// Ring and activations.
        needed: usize,
        /// Device limit.
        limit: usize,
        /// Ring stages.
        stages: usize,
    },
}

fn writer_of(instructions: &[Instruction], version: Version) -> Option<usize> {
    instructions
        .iter()
        .position(|i| i.writes.contains(&version))
}

/// Every read is written by an earlier instruction; nothing is written twice.
fn check_waits(instructions: &[Instruction]) -> Result<(), Fault> {
    for (at, i) in instructions.iter().enumerate() {
        for &wanted in &i.reads {
            let op = i.op;
            let Some(writer) = writer_of(instructions, wanted) else {
                return Err(Fault::NeverWritten { at, op, wanted });
            };
            if writer >= at {
                return Err(Fault::Circle {
                    at,
                    op,
                    wanted,
                    writer,
                });
            }
        }
        for &version in &i.writes {
            let first = writer_of(instructions, version).unwrap_or(at);
            if first != at {
                return Err(Fault::WrittenTwice {
                    first,
                    second: at,
                    version,
                });
            }
        }
        if let Some(after) = i.pages_after
            && !i.reads.contains(&after)
        {
            return Err(Fault::UnknownPages {
                at,
                op: i.op,
                after,
            });
        }
    }
    Ok(())
}

/// Does every CTA finish reading in `reader` before any CTA starts to write in `writer`? So it is when
/// something written by a CTA after that read is waited for, from all CTAs, before that write.
fn separated(instructions: &[Instruction], reader: usize, writer: usize) -> bool {
    instructions[reader..=writer].iter().any(|later| {
        later.op.gathers()
            && later.reads.iter().any(|&v| {
                let made = writer_of(instructions, v);
                made.is_some_and(|made| made >= reader)
            })
    })
}

/// No write of epoch `e` reaches slot `e % slots` while epoch `e - slots` may be read.
fn check_slots(schedule: &Schedule) -> Result<(), Fault> {
    let instructions = &schedule.instructions;
    for (writer, i) in instructions.iter().enumerate() {
        for &(buffer, epoch) in &i.writes {
            let Some(old) = epoch.checked_sub(schedule.slots) else {
                continue;
            };
            let readers = instructions[..=writer].iter().enumerate();
            for (reader, _) in readers.filter(|(_, r)| r.reads.contains(&(buffer, old))) {
                if !separated(instructions, reader, writer) {
                    let version = (buffer, epoch);
                    return Err(Fault::Overwrites {
                        writer,
                        version,
                        reader,
                    });
                }
            }
        }
    }
    Ok(())
}

/// Proves a schedule or says what is wrong with it first.
///
/// # Errors
/// The first fault.
pub fn check(schedule: &Schedule) -> Result<(), Fault> {
    check_waits(&schedule.instructions)?;
    check_slots(schedule)?;
    let plan = schedule.shared;
    let needed = plan.stage * plan.stages + plan.activations;
    if needed > plan.limit || plan.stages < 2 {
        return Err(Fault::SharedMemory {
            needed,
            limit: plan.limit,
            stages: plan.stages,
        });
    }
    Ok(())
}
