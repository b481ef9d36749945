//! A directory of safetensors files, opened lazily: headers are read, data is mapped.
//!
//! Owns which bytes belong to which tensor. A checkpoint larger than memory opens at once, because
//! nothing is read but the headers. Refuses files whose header lies (the `safetensors` crate checks
//! lengths, overlaps and shapes against dtypes), an index that names what is not there, and names
//! that lead out of the directory. Offsets are 64 bits; data may start at any byte.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use formats::mxfp4;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::error::{ModelError, parse_object, read_text};
use crate::mapped::Mapped;
use crate::{fields, header};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The index of the 1T release is 14 MB.
const INDEX_BYTES_MAX: u64 = 512 << 20;

/// An open checkpoint directory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<(PathBuf, Mapped)>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor as stored.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// The file it lies in.
    pub file: &'a Path,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Little-endian, row-major, of any alignment.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens `dir` through `model.safetensors.index.json`, or the one file `model.safetensors`.
    ///
    /// # Errors
    /// [`ModelError`] naming the file, and the tensor where there is one.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        let index = dir.join(INDEX);
        if !index.exists() {
            let path = dir.join(SINGLE);
            if !path.exists() {
                let message = format!("expected {INDEX} or {SINGLE}, found neither");
                return Err(ModelError::file(dir, message));
            }
            checkpoint.add_file(&path)?;
            return Ok(checkpoint);
        }
        let map = read_index(&index)?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            checkpoint.add_file(&dir.join(name))?;
        }
        checkpoint.check_index(&index, &map)?;
        Ok(checkpoint)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let place = self.tensors.get(name)?;
        let (path, mapped) = &self.files[place.file];
        Some(Tensor {
            file: path,
            dtype: place.dtype,
            shape: &place.shape,
            bytes: &mapped.bytes()[place.start..place.end],
        })
    }

    /// Names of all tensors, unordered.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of files with tensors.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors
            .values()
            .map(|p| (p.end - p.start) as u64)
            .sum()
    }

    /// Tells the kernel that the mapped data has been copied and need not stay in memory. Reading
    /// it again stays correct and costs a page fault.
    pub fn release(&self) {
        for (_, mapped) in &self.files {
            mapped.release();
        }
    }

    /// Looks through the scales of all quantised weights for the ones that stand for no number
    /// (E8M0 0xFF, f32 NaN or infinite). Reads them all, so it is for backends that are about to read
    /// the weights anyway, and not part of opening.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] naming the first one.
    pub fn check_scales(&self) -> Result<(), ModelError> {
        // In the order of the files: a disk reads ahead.
        let mut places: Vec<_> = self.tensors.iter().collect();
        places.sort_unstable_by_key(|(_, place)| (place.file, place.start));
        for (name, place) in places {
            let (path, mapped) = &self.files[place.file];
            let bytes = &mapped.bytes()[place.start..place.end];
            let bad = match (name.rsplit_once('.').map(|(_, last)| last), place.dtype) {
                (Some("weight_scale"), Dtype::U8 | Dtype::F8_E8M0) => bytes
                    .iter()
                    .position(|byte| *byte == mxfp4::SCALE_NAN)
                    .map(|at| (at, "0xFF (NaN in E8M0)".to_owned())),
                (Some("weight_scale_inv"), Dtype::F32) => bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|bytes| f32::from_le_bytes(*bytes))
                    .enumerate()
                    .find(|(_, scale)| !scale.is_finite())
                    .map(|(at, scale)| (at, scale.to_string())),
                _ => None,
            };
            if let Some((at, found)) = bad {
                return Err(ModelError::Tensor {
                    file: path.display().to_string(),
                    tensor: name.clone(),
                    expected: "scales that are finite numbers".to_owned(),
                    found: format!("{found} at element {at}"),
                });
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<(), ModelError> {
        let mapped = Mapped::open(path)?;
        let (data, metadata) = header::read(path, mapped.bytes())?;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let place = Place {
                file,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(ModelError::Tensor {
                    file: path.display().to_string(),
                    tensor: name,
                    expected: "one tensor of this name".to_owned(),
                    found: "another in an earlier file".to_owned(),
                });
            }
        }
        self.files.push((path.to_owned(), mapped));
        Ok(())
    }

    fn check_index(&self, index: &Path, map: &HashMap<String, String>) -> Result<(), ModelError> {
        for (tensor, file) in map {
            let found = match self.tensors.get(tensor) {
                Some(place) if self.files[place.file].0.ends_with(file) => continue,
                Some(place) => format!("it in {}", self.files[place.file].0.display()),
                None => "no tensor of this name in any file".to_owned(),
            };
            return Err(ModelError::Tensor {
                file: index.display().to_string(),
                tensor: tensor.clone(),
                expected: format!("it in {file}"),
                found,
            });
        }
        Ok(())
    }
}

fn read_index(path: &Path) -> Result<HashMap<String, String>, ModelError> {
    let text = read_text(path, INDEX_BYTES_MAX)?;
    let object = parse_object(path, &text)?;
    let Some(map) = object.get("weight_map").and_then(Value::as_object) else {
        let found = object.get("weight_map").map_or("nothing", fields::kind);
        return Err(ModelError::Field {
            file: path.display().to_string(),
            field: "weight_map".to_owned(),
            expected: "an object".to_owned(),
            found: found.to_owned(),
        });
    };
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            Some(name) if is_plain(name) => Ok((tensor.clone(), name.to_owned())),
            _ => Err(ModelError::Tensor {
                file: path.display().to_string(),
                tensor: tensor.clone(),
                expected: "the name of a file in the same directory".to_owned(),
                found: file.to_string(),
            }),
        })
        .collect()
}

/// A file name with no directory in it.
fn is_plain(name: &str) -> bool {
    let path = Path::new(name);
    path.file_name().is_some_and(|n| n == path.as_os_str())
}
