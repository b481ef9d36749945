//! The small text files of a checkpoint (tokenizer, template, generation defaults): read with a
//! limit, and errors that name file and place in one line.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Largest JSON file of text settings. tokenizer.json of MiMo-V2 is 11 MB.
pub(crate) const JSON_BYTES_MAX: u64 = 256 << 20;

/// Why tokenizer, template or generation defaults cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file that is not what it should be.
    #[error("{path}: {message}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
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
}

impl TextError {
    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}

/// Reads a whole UTF-8 file of at most `bytes_max`; `None` when there is none.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Option<String>, TextError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TextError::file(path, format!("cannot open: {error}"))),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| TextError::file(path, format!("cannot read: {error}")))?;
    if bytes.len() as u64 > bytes_max {
        return Err(TextError::file(
            path,
            format!("larger than {bytes_max} bytes"),
        ));
    }
    let not_text = |error: std::string::FromUtf8Error| {
        let at = error.utf8_error().valid_up_to();
        TextError::file(
            path,
            format!(
                "expected UTF-8 text, found byte 0x{:02x} at {at}",
                error.as_bytes()[at]
            ),
        )
    };
    String::from_utf8(bytes).map(Some).map_err(not_text)
}

/// Parses a file's text as a JSON object.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>, TextError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(TextError::file(
            path,
            "expected a JSON object, found another value",
        )),
        Err(error) => Err(TextError::file(path, format!("not valid JSON: {error}"))),
    }
}
