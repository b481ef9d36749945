//! Two kinds of failure, two exit codes: 2 for input that cannot be used, 1 for everything else.
//!
//! Invariant: what reaches the user is one line on standard error.

use std::fmt;

/// Marks an error as the input's fault.
#[derive(Debug)]
pub(crate) struct BadInput(pub String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// `Err` with a [`BadInput`].
pub(crate) fn bad_input<T>(message: impl Into<String>) -> anyhow::Result<T> {
    Err(BadInput(message.into()).into())
}

/// The exit code an error asks for.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    let is_input = error.chain().any(|cause| {
        cause.is::<BadInput>()
            || cause.is::<model::error::ModelError>()
            || cause.is::<cpu::DamagedWeight>()
            || matches!(cause.downcast_ref(), Some(engine::Rejected::Invalid { .. }))
            || cause.downcast_ref().is_some_and(is_inputs_fault)
    });
    if is_input { 2 } else { 1 }
}

fn is_inputs_fault(error: &model::decoder::DecodeError) -> bool {
    use model::decoder::DecodeError as E;
    matches!(
        error,
        E::ContextFull { .. } | E::TokenRange { .. } | E::NotFinite { .. } | E::KvFull { .. }
    )
}

/// The error and its causes, in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string().replace(['\n', '\r'], " ");
        // Some errors already print their cause.
        if !parts.last().is_some_and(|before| before.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}
