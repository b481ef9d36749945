//! The header of a safetensors file, and what is wrong with one in our words.
//!
//! The `safetensors` crate decides whether a header is valid (lengths, overlaps, holes, shapes
//! against offsets); this file only finds out which tensor it means, so that the error can say what
//! was expected and found. Refuses nothing the crate accepts.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors, TensorInfo};
use serde_json::{Map, Value};

use crate::error::ModelError;

/// Bytes that hold the header's length.
const LENGTH_BYTES: usize = 8;

/// The header of `file`, the whole content of `path`: where the data begins, and the tensors.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<(usize, Metadata), ModelError> {
    match SafeTensors::read_metadata(file) {
        Ok((header, metadata)) => Ok((header + LENGTH_BYTES, metadata)),
        Err(error) => Err(explain(path, file, &error)),
    }
}

fn explain(path: &Path, file: &[u8], error: &SafeTensorError) -> ModelError {
    use SafeTensorError as E;
    let wrong = |message: String| ModelError::file(path, message);
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let found = file.len();
        return wrong(format!(
            "expected a safetensors file of at least 8 bytes, found {found}"
        ));
    };
    let length = u64::from_le_bytes(*length);
    match error {
        E::HeaderTooLarge => wrong(format!(
            "header: expected at most 100000000 bytes, found a length of {length}"
        )),
        E::InvalidHeaderLength => wrong(format!(
            "header: expected the {length} bytes that its length says, found {} to the end of the file",
            rest.len()
        )),
        E::InvalidHeader(e) => wrong(format!(
            "header: expected UTF-8 text, found another byte at {}",
            e.valid_up_to()
        )),
        other => {
            // In range, or one of the errors above would have come.
            let (header, data) = rest.split_at(rest.len().min(length as usize));
            match fault(header, data.len() as u64) {
                Some(Fault::Tensor(tensor, expected, found)) => ModelError::Tensor {
                    file: path.display().to_string(),
                    tensor,
                    expected,
                    found,
                },
                Some(Fault::File(message)) => wrong(message),
                None => wrong(format!("not a valid safetensors file: {other}")),
            }
        }
    }
}

enum Fault {
    /// Tensor, expected, found.
    Tensor(String, String, String),
    File(String),
}

impl Fault {
    fn tensor(name: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Tensor(name.to_owned(), expected.into(), found.into())
    }
}

/// The first thing wrong with a header that `data_bytes` of data follow.
fn fault(header: &[u8], data_bytes: u64) -> Option<Fault> {
    let entries: Map<String, Value> = match serde_json::from_slice(header) {
        Ok(entries) => entries,
        Err(e) => {
            let message = format!("header: expected a JSON object of tensors, found {e}");
            return Some(Fault::File(message));
        }
    };
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        if name == "__metadata__" {
            if serde_json::from_value::<HashMap<String, String>>(value).is_err() {
                let message = "header: expected texts in `__metadata__`, found something else";
                return Some(Fault::File(message.to_owned()));
            }
            continue;
        }
        match serde_json::from_value::<TensorInfo>(value) {
            Ok(info) => tensors.push((name, info)),
            Err(e) => {
                let expected = "a dtype, a shape and data_offsets";
                return Some(Fault::tensor(&name, expected, e.to_string()));
            }
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut start = 0;
    for (name, info) in &tensors {
        if let Some(fault) = misplaced(name, info, start) {
            return Some(fault);
        }
        start = info.data_offsets.1;
    }
    (start as u64 != data_bytes).then(|| {
        let found = format!("expected {start} bytes of tensor data after the header, found");
        Fault::File(format!("{found} {data_bytes}"))
    })
}

/// What is wrong with a tensor whose data should begin at `start`.
fn misplaced(name: &str, info: &TensorInfo, start: usize) -> Option<Fault> {
    let (begin, end) = info.data_offsets;
    if begin != start || end < begin {
        let expected =
            format!("data_offsets from {start} on, without overlap or gap to the tensor before");
        return Some(Fault::tensor(name, expected, format!("[{begin}, {end}]")));
    }
    let elements = info.shape.iter().copied().try_fold(1, usize::checked_mul);
    let described = format!("{:?} of shape {:?}", info.dtype, info.shape);
    match elements.and_then(|n| n.checked_mul(info.dtype.bitsize())) {
        None => Some(Fault::tensor(name, "a size below 2^64 bits", described)),
        Some(bits) if bits != 8 * (end - begin) => {
            let expected = format!("{} bytes for {described}", bits.div_ceil(8));
            Some(Fault::tensor(name, expected, (end - begin).to_string()))
        }
        Some(_) => None,
    }
}
