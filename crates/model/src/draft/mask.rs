//! `mask_embedding.pt`: a torch file, read as the zip of raw tensors that it is. The pickle inside
//! is never executed: the embedding's bytes are the entry `*/data/0`, and their length tells BF16
//! from F32.

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

/// `[hidden]`, or `None` when there is no such file.
pub(super) fn load(path: &Path, config: &DraftConfig) -> Result<Option<Vec<f32>>, ModelError> {
    if !path.exists() {
        return Ok(None);
    }
    let broken = |message: String| ModelError::file(path, message);
    let file = File::open(path).map_err(|e| broken(format!("cannot open: {e}")))?;
    let mut zip = ZipArchive::new(file)
        .map_err(|e| broken(format!("expected a zip archive (torch.save), found: {e}")))?;
    if zip.len() > ENTRIES_MAX {
        let found = zip.len();
        return Err(broken(format!(
            "expected at most {ENTRIES_MAX} entries, found {found}"
        )));
    }
    let name = zip
        .file_names()
        .filter_map(Result::ok)
        .find(|name| name.ends_with("/data/0"))
        .map(|name| name.into_owned())
        .ok_or_else(|| broken("expected an entry `*/data/0`, found none".to_owned()))?;
    let entry = zip
        .by_name(&name)
        .map_err(|e| broken(format!("entry `{name}`: {e}")))?;
    let longest = config.hidden as u64 * 4;
    let mut bytes = Vec::new();
    entry
        .take(longest + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| broken(format!("entry `{name}`: {e}")))?;
    let mut out = vec![0.0; config.hidden];
    match bytes.len() {
        n if n == config.hidden * 2 => Row::Bf16(&bytes).decode(&mut out),
        n if n == config.hidden * 4 => Row::F32(&bytes).decode(&mut out),
        n => {
            let (bf16, f32) = (config.hidden * 2, config.hidden * 4);
            let expected = format!("{bf16} (BF16) or {f32} (F32) bytes");
            return Err(broken(format!(
                "entry `{name}`: expected {expected}, found {n}{}",
                if n as u64 > longest { " or more" } else { "" }
            )));
        }
    }
    Ok(Some(out))
}
