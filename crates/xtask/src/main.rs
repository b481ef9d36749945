//! Project scripts: tidy, make-mini, golden regeneration, benchmark records.
#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    Ok(())
}
