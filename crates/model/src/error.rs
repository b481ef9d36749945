//! Why a checkpoint cannot be used: one line that names file and field or tensor, what was expected
//! and what was found.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Errors of configuration and checkpoint loading.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file that is not there or cannot be read.
    #[error("{path}: {message}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// A field of a JSON file.
    #[error("{file}: field `{field}`: expected {expected}, found {found}")]
    Field {
        /// The file.
        file: String,
        /// The field.
        field: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A chat template that does not compile, or that refused the conversation.
    #[error("chat template: {message}")]
    Template {
        /// What happened and where.
        message: String,
    },
    /// Text that the tokenizer cannot encode.
    #[error("tokenizer: {message}")]
    Encode {
        /// What happened.
        message: String,
    },
    /// A tensor.
    #[error("{file}: tensor `{}`: expected {expected}, found {found}", .tensor.escape_debug())]
    Tensor {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
}

impl ModelError {
    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}

/// Reads a whole UTF-8 file of at most `bytes_max`.
pub(crate) fn read_text(path: &Path, bytes_max: u64) -> Result<String, ModelError> {
    let found = read_text_if_there(path, bytes_max)?;
    found.ok_or_else(|| ModelError::file(path, "cannot open: no such file"))
}

/// Reads a whole UTF-8 file of at most `bytes_max`; `None` when there is none.
pub(crate) fn read_text_if_there(
    path: &Path,
    bytes_max: u64,
) -> Result<Option<String>, ModelError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ModelError::file(path, format!("cannot open: {error}"))),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| ModelError::file(path, format!("cannot read: {e}")))?;
    if bytes.len() as u64 > bytes_max {
        let message = format!("expected at most {bytes_max} bytes, found more");
        return Err(ModelError::file(path, message));
    }
    String::from_utf8(bytes).map(Some).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let byte = e.as_bytes()[at];
        ModelError::file(
            path,
            format!("expected UTF-8 text, found byte 0x{byte:02x} at {at}"),
        )
    })
}

/// Largest JSON file of text settings; tokenizer.json of MiMo-V2 is 11 MB.
pub(crate) const TEXT_JSON_BYTES_MAX: u64 = 256 << 20;

/// Parses a file's text as a JSON object.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>, ModelError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            let found = crate::fields::kind(&other);
            let message = format!("expected a JSON object, found {found}");
            Err(ModelError::file(path, message))
        }
        Err(error) => {
            let message = format!("expected a JSON object, found text that is not JSON: {error}");
            Err(ModelError::file(path, message))
        }
    }
}
