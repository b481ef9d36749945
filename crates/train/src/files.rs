//! Files of the trainer: JSON, safetensors to and from tensors, hashes; written aside and renamed.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::error::{Error, Result, io};

/// Writes `bytes` aside, then renames: a reader sees the old file or the new one, never a part.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io(parent))?;
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(".part");
    let aside = std::path::PathBuf::from(aside);
    std::fs::write(&aside, bytes).map_err(io(&aside))?;
    std::fs::rename(&aside, path).map_err(io(path))
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(io(path))
}

/// Parses a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_slice(&read(path)?).map_err(|e| Error::Config {
        path: path.to_owned(),
        what: e.to_string(),
    })
}

/// Writes indented JSON with a closing newline.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Config {
        path: path.to_owned(),
        what: e.to_string(),
    })?;
    write(path, (text + "\n").as_bytes())
}

/// SHA-256 in hex.
#[must_use]
pub fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Raw little-endian bytes of a tensor.
#[must_use]
pub fn tensor_bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.to_device(tch::Device::Cpu).contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    let count = tensor.numel();
    tensor.copy_data_u8(&mut bytes, count);
    bytes
}

/// f32 values of a tensor.
#[must_use]
pub fn tensor_values(tensor: &Tensor) -> Vec<f32> {
    tensor_bytes(&tensor.to_kind(Kind::Float))
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Writes named f32 and int64 tensors with string metadata as one safetensors file.
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let dtype = match tensor.kind() {
                Kind::Int64 => Dtype::I64,
                Kind::BFloat16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            let shape = tensor.size().iter().map(|&x| x as usize).collect();
            (name.clone(), dtype, shape, tensor_bytes(tensor))
        })
        .collect();
    write_stored(path, &stored, metadata)
}

/// Writes tensors given as bytes.
pub fn write_stored(
    path: &Path,
    stored: &[(String, Dtype, Vec<usize>, Vec<u8>)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let broken = |e: safetensors::SafeTensorError| Error::Config {
        path: path.to_owned(),
        what: e.to_string(),
    };
    let mut views = Vec::new();
    for (name, dtype, shape, bytes) in stored {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(broken)?;
        views.push((name.as_str(), view));
    }
    let metadata: HashMap<String, String> = metadata.clone().into_iter().collect();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(broken)?;
    write(path, &bytes)
}

/// Reads a safetensors file written by [`write_tensors`].
pub fn read_tensors(path: &Path) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let broken = |e: safetensors::SafeTensorError| Error::Config {
        path: path.to_owned(),
        what: e.to_string(),
    };
    let bytes = read(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let kind = match view.dtype() {
            Dtype::I64 => Kind::Int64,
            Dtype::BF16 => Kind::BFloat16,
            _ => Kind::Float,
        };
        let shape: Vec<i64> = view.shape().iter().map(|&x| x as i64).collect();
        tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok((tensors, metadata.into_iter().collect()))
}
