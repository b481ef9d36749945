//! `mask_embedding.pt`: a torch file, read as the zip of raw tensors that it is.
//!
//! The pickle inside is never executed. It is searched for two facts as text: the storage's type
//! (BF16 or F32), and the mask token that the row belongs to. The embedding's bytes are the entry
//! `*/data/0`. Refuses files, entries and counts above their limits, and other element types.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use zip::ZipArchive;

use super::config::DraftConfig;
use crate::error::ModelError;
use crate::weights::Row;

pub(super) const FILE: &str = "mask_embedding.pt";
/// A torch file of one small dictionary has about ten entries.
const ENTRIES_MAX: usize = 256;
/// Everything but the embedding: a pickle of a few hundred bytes, names, padding.
const OTHER_BYTES_MAX: u64 = 1 << 20;

/// `[hidden]`, or `None` when there is no such file.
pub(super) fn load(path: &Path, config: &DraftConfig) -> Result<Option<Vec<f32>>, ModelError> {
    if !path.exists() {
        return Ok(None);
    }
    read(path, config)
        .map(Some)
        .map_err(|message| ModelError::file(path, message))
}

fn read(path: &Path, config: &DraftConfig) -> Result<Vec<f32>, String> {
    let file = File::open(path).map_err(|e| format!("cannot open: {e}"))?;
    let bytes = file.metadata().map_err(|e| e.to_string())?.len();
    let bytes_max = config.hidden as u64 * 4 + OTHER_BYTES_MAX;
    if bytes > bytes_max {
        return Err(format!("expected at most {bytes_max} bytes, found {bytes}"));
    }
    let mut zip = ZipArchive::new(file)
        .map_err(|e| format!("expected a zip archive (torch.save), found: {e}"))?;
    if zip.len() > ENTRIES_MAX {
        let found = zip.len();
        return Err(format!(
            "expected at most {ENTRIES_MAX} entries, found {found}"
        ));
    }
    if let Some(order) = entry(&mut zip, "/byteorder", 16)?
        && order != b"little"
    {
        let found = String::from_utf8_lossy(&order).into_owned();
        return Err(format!(
            "entry `*/byteorder`: expected little, found {found:?}"
        ));
    }
    let pickle = required(&mut zip, "/data.pkl", OTHER_BYTES_MAX)?;
    check_token(&pickle, config)?;
    let row = required(&mut zip, "/data/0", config.hidden as u64 * 4)?;
    decode(&pickle, &row, config.hidden)
}

/// The one entry whose name ends in `suffix`, of at most `bytes_max`.
fn entry(
    zip: &mut ZipArchive<File>,
    suffix: &str,
    bytes_max: u64,
) -> Result<Option<Vec<u8>>, String> {
    let names: Vec<String> = zip
        .file_names()
        .filter_map(Result::ok)
        .filter(|name| name.ends_with(suffix))
        .map(|name| name.into_owned())
        .collect();
    let [name] = names.as_slice() else {
        return match names.len() {
            0 => Ok(None),
            n => Err(format!("expected one entry `*{suffix}`, found {n}")),
        };
    };
    let broken = |e: &dyn std::fmt::Display| format!("entry `{name}`: {e}");
    let mut bytes = Vec::new();
    zip.by_name(name)
        .map_err(|e| broken(&e))?
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| broken(&e))?;
    if bytes.len() as u64 > bytes_max {
        let what = format!("expected at most {bytes_max} bytes, found more");
        return Err(broken(&what));
    }
    Ok(Some(bytes))
}

fn required(zip: &mut ZipArchive<File>, suffix: &str, bytes_max: u64) -> Result<Vec<u8>, String> {
    entry(zip, suffix, bytes_max)?
        .ok_or_else(|| format!("expected an entry `*{suffix}`, found none"))
}

/// The type of the storage, as torch names its class in the pickle.
fn decode(pickle: &[u8], row: &[u8], hidden: usize) -> Result<Vec<f32>, String> {
    let (kind, bytes) = match storage(pickle) {
        Some("BFloat16Storage") => (Row::Bf16(row), hidden * 2),
        Some("FloatStorage") => (Row::F32(row), hidden * 4),
        found => {
            let found = found.unwrap_or("no storage");
            return Err(format!(
                "expected a BFloat16Storage or FloatStorage, found {found}"
            ));
        }
    };
    if row.len() != bytes {
        let found = row.len();
        return Err(format!(
            "entry `*/data/0`: expected {bytes} bytes for {hidden} numbers, found {found}"
        ));
    }
    let mut out = vec![0.0; hidden];
    kind.decode(&mut out);
    match out.iter().all(|x| x.is_finite()) {
        true => Ok(out),
        false => Err("entry `*/data/0`: expected finite numbers, found NaN or infinity".to_owned()),
    }
}

/// The first name in the pickle that ends in `Storage`: it stands as a line after `ctorch`.
fn storage(pickle: &[u8]) -> Option<&str> {
    pickle
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .find(|line| line.ends_with("Storage") && line.len() < 64)
}

/// Compares the mask token that the file names, where it names one in the form torch writes.
fn check_token(pickle: &[u8], config: &DraftConfig) -> Result<(), String> {
    match mask_token(pickle) {
        Some(token) if token != config.mask_token => Err(format!(
            "mask_token_id: expected {}, as in config.json, found {token}",
            config.mask_token
        )),
        _ => Ok(()),
    }
}

/// The integer after the key `mask_token_id`: opcodes K, M and J carry 1, 2 and 4 bytes; a memo
/// (q and 1 byte, r and 4 bytes, or 0x94) may stand in between.
fn mask_token(pickle: &[u8]) -> Option<u32> {
    let key = b"mask_token_id";
    let at = pickle.windows(key.len()).position(|part| part == key)?;
    let rest = &pickle[at + key.len()..];
    let rest = match rest.first()? {
        b'q' => rest.get(2..)?,
        b'r' => rest.get(5..)?,
        0x94 => rest.get(1..)?,
        _ => rest,
    };
    let number = |bytes: &[u8]| {
        let digits = bytes.iter().rev();
        digits.fold(0u32, |n, byte| n << 8 | u32::from(*byte))
    };
    match rest.first()? {
        b'K' => rest.get(1..2).map(number),
        b'M' => rest.get(1..3).map(number),
        b'J' => rest.get(1..5).map(number),
        _ => None,
    }
}
