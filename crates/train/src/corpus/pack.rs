//! Pieces for a machine without a network: files, compressed, cut, hashed; and back.
//!
//! Invariant: unpacking checks every piece and every file before anything is renamed into place.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::files;

/// Packs `names` of `directory` into `out/piece-NNN` of at most `bytes_max`, and `out/pieces.json`.
pub fn pack(directory: &Path, names: &[String], out: &Path, bytes_max: usize) -> Result<()> {
    let mut stream = Vec::new();
    let mut list = Vec::new();
    for name in names {
        let bytes = files::read(&directory.join(name))?;
        list.push(json!({"name": name, "bytes": bytes.len(), "sha256": files::hash(&bytes)}));
        stream.extend(bytes);
    }
    let packed = zstd::encode_all(stream.as_slice(), 12).map_err(crate::error::io(out))?;
    let mut pieces = Vec::new();
    for (i, piece) in packed.chunks(bytes_max).enumerate() {
        let name = format!("piece-{i:03}");
        files::write(&out.join(&name), piece)?;
        pieces.push(json!({"name": name, "sha256": files::hash(piece)}));
    }
    files::write_json(
        &out.join("pieces.json"),
        &json!({"files": list, "pieces": pieces}),
    )
}

/// Undoes [`pack`].
pub fn unpack(pieces: &Path, out: &Path) -> Result<()> {
    let index = files::read_json(&pieces.join("pieces.json"))?;
    let mut packed = Vec::new();
    for piece in list(&index, "pieces") {
        let path = pieces.join(text(piece, "name"));
        let bytes = files::read(&path)?;
        check(&path, &bytes, piece)?;
        packed.extend(bytes);
    }
    let stream = zstd::decode_all(packed.as_slice()).map_err(crate::error::io(pieces))?;
    let mut at = 0;
    for file in list(&index, "files") {
        let size = file["bytes"].as_u64().unwrap_or(0) as usize;
        let path = out.join(text(file, "name"));
        let bytes = stream.get(at..at + size).unwrap_or(&[]);
        check(&path, bytes, file)?;
        files::write(&path, bytes)?;
        at += size;
    }
    Ok(())
}

fn list<'a>(index: &'a Value, key: &str) -> &'a [Value] {
    index[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(item: &'a Value, key: &str) -> &'a str {
    item[key].as_str().unwrap_or("")
}

fn check(path: &Path, bytes: &[u8], item: &Value) -> Result<()> {
    let (expected, found) = (text(item, "sha256"), files::hash(bytes));
    if expected == found {
        return Ok(());
    }
    Err(Error::Config {
        path: path.to_owned(),
        what: format!("expected SHA-256 {expected}, found {found}"),
    })
}
