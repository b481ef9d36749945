//! Reads GGUF files (versions 2 and 3): metadata, and tensors as f32.
//!
//! Owns the decoding of F32, F16, Q4_1 and Q8_0. Refuses other types, and any count, length or
//! offset that the size of the file does not justify, before memory is taken for it.
//! Layout: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::f16;

/// Strings in a header are names, tokens and templates: 1 MiB is far above all of them.
const STRING_BYTES_MAX: u64 = 1 << 20;
/// Metadata arrays of arrays do not occur in practice; this bounds the recursion.
const ARRAY_DEPTH_MAX: u32 = 4;
/// Dimensions of one tensor, as in ggml.
const DIMENSIONS_MAX: u32 = 4;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Any integer type, and bool as 0 or 1.
    Integer(i128),
    /// f32 or f64.
    Float(f64),
    /// UTF-8 text.
    Text(String),
    /// Values of one type.
    List(Vec<Value>),
}

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Little-endian f32.
    F32,
    /// Little-endian f16.
    F16,
    /// 32 elements: f16 scale, f16 minimum, 16 bytes of codes; low nibbles first.
    Q4_1,
    /// 32 elements: f16 scale, 32 signed bytes.
    Q8_0,
}

impl Encoding {
    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            _ => return None,
        })
    }

    /// (elements, bytes) of one block.
    fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
        }
    }

    fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        let half_at = |b: &[u8], i: usize| f16::from_le_bytes([b[i], b[i + 1]]).to_f32();
        for block in bytes.chunks_exact(self.block().1 as usize) {
            match self {
                Self::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                Self::F16 => out.push(half_at(block, 0)),
                Self::Q4_1 => {
                    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
                    let value = |code: u8| f32::from(code) * scale + minimum;
                    out.extend(block[4..].iter().map(|b| value(b & 15)));
                    out.extend(block[4..].iter().map(|b| value(b >> 4)));
                }
                Self::Q8_0 => {
                    let scale = half_at(block, 0);
                    out.extend(block[2..].iter().map(|&b| f32::from(b as i8) * scale));
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    /// Slowest dimension first: `[rows, columns]` for a matrix (GGUF lists the fastest first).
    shape: Vec<usize>,
    encoding: Encoding,
    /// From the start of the file.
    offset: u64,
    bytes: u64,
}

/// A tensor, decoded.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<f32>,
}

/// An open file.
pub(crate) struct Gguf {
    file: File,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

impl Gguf {
    /// Opens a file and checks its whole header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let file = File::open(path).with_context(|| format!("{name}: cannot open"))?;
        let file_bytes = file.metadata()?.len();
        let mut header = Header {
            reader: BufReader::new(file.try_clone()?),
            at: 0,
            file_bytes,
        };
        let (metadata, tensors) = header
            .read()
            .with_context(|| format!("{name}: not a usable GGUF file"))?;
        Ok(Self {
            file,
            metadata,
            tensors,
        })
    }

    /// A metadata value that must be there.
    pub(crate) fn value(&self, key: &str) -> Result<&Value> {
        self.metadata
            .get(key)
            .with_context(|| format!("GGUF metadata has no `{key}`"))
    }

    /// An unsigned metadata value.
    pub(crate) fn integer(&self, key: &str) -> Result<usize> {
        match self.value(key)? {
            Value::Integer(n) if *n >= 0 => Ok(usize::try_from(*n)?),
            other => bail!("GGUF metadata `{key}`: expected an unsigned integer, found {other:?}"),
        }
    }

    /// A float metadata value.
    pub(crate) fn float(&self, key: &str) -> Result<f64> {
        match self.value(key)? {
            Value::Float(x) => Ok(*x),
            other => bail!("GGUF metadata `{key}`: expected a float, found {other:?}"),
        }
    }

    /// A text metadata value.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        match self.value(key)? {
            Value::Text(text) => Ok(text),
            other => bail!("GGUF metadata `{key}`: expected text, found {other:?}"),
        }
    }

    /// A list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let Value::List(list) = self.value(key)? else {
            bail!("GGUF metadata `{key}`: expected a list");
        };
        list.iter()
            .map(|value| match value {
                Value::Text(text) => Ok(text.as_str()),
                other => bail!("GGUF metadata `{key}`: expected texts, found {other:?}"),
            })
            .collect()
    }

    /// Reads and decodes one tensor, which must have this shape (slowest dimension first).
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let entry = self
            .tensors
            .get(name)
            .with_context(|| format!("GGUF has no tensor `{name}`"))?
            .clone();
        ensure!(
            entry.shape == shape,
            "GGUF tensor `{name}`: expected shape {shape:?}, found {:?}",
            entry.shape
        );
        let mut bytes = vec![0; usize::try_from(entry.bytes)?];
        self.file.seek(SeekFrom::Start(entry.offset))?;
        self.file
            .read_exact(&mut bytes)
            .with_context(|| format!("GGUF tensor `{name}`: read"))?;
        let mut data = Vec::with_capacity(shape.iter().product());
        entry.encoding.decode(&bytes, &mut data);
        Ok(Tensor {
            shape: entry.shape,
            data,
        })
    }
}

/// The header while it is read: every length is checked against what is left of the file.
struct Header {
    reader: BufReader<File>,
    at: u64,
    file_bytes: u64,
}

type Tables = (BTreeMap<String, Value>, BTreeMap<String, Entry>);

impl Header {
    fn read(&mut self) -> Result<Tables> {
        let magic = self.array::<4>()?;
        ensure!(
            &magic == b"GGUF",
            "expected the magic `GGUF`, found {magic:?}"
        );
        let version = self.u32()?;
        ensure!(
            (2..=3).contains(&version),
            "expected version 2 or 3, found {version}"
        );
        let tensor_count = self.count(24)?;
        let metadata_count = self.count(12)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self
                .value(kind, 0)
                .with_context(|| format!("metadata `{key}`"))?;
            ensure!(
                metadata.insert(key.clone(), value).is_none(),
                "metadata `{key}` twice"
            );
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = self.text()?;
            let entry = self.entry().with_context(|| format!("tensor `{name}`"))?;
            ensure!(
                tensors.insert(name.clone(), entry).is_none(),
                "tensor `{name}` twice"
            );
        }
        self.place(&metadata, &mut tensors)?;
        Ok((metadata, tensors))
    }

    /// Turns offsets from the data section into offsets from the start, and checks them.
    fn place(
        &self,
        metadata: &BTreeMap<String, Value>,
        tensors: &mut BTreeMap<String, Entry>,
    ) -> Result<()> {
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Integer(n)) if (1..=1 << 20).contains(n) => *n as u64,
            Some(other) => bail!("metadata `general.alignment`: {other:?} is not 1 to 2^20"),
            None => 32,
        };
        let data = self.at.next_multiple_of(alignment);
        for (name, entry) in tensors {
            let start = data.checked_add(entry.offset);
            let end = start.and_then(|s| s.checked_add(entry.bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= self.file_bytes => entry.offset = start,
                _ => bail!(
                    "tensor `{name}`: its {} bytes end after the file's {}",
                    entry.bytes,
                    self.file_bytes
                ),
            }
        }
        Ok(())
    }

    fn entry(&mut self) -> Result<Entry> {
        let rank = self.u32()?;
        ensure!(
            rank <= DIMENSIONS_MAX,
            "{rank} dimensions, at most {DIMENSIONS_MAX}"
        );
        let mut shape = Vec::new();
        let mut elements = 1u64;
        for _ in 0..rank {
            let size = self.u64()?;
            elements = elements
                .checked_mul(size)
                .context("element count overflows")?;
            shape.push(usize::try_from(size)?);
        }
        let id = self.u32()?;
        let encoding = Encoding::from_id(id).with_context(|| {
            format!("type {id} is not one of F32 (0), F16 (1), Q4_1 (3), Q8_0 (8)")
        })?;
        let (per_block, block_bytes) = encoding.block();
        let columns = shape.first().copied().unwrap_or(1) as u64;
        ensure!(
            columns.is_multiple_of(per_block),
            "rows of {columns} elements are not whole blocks of {per_block}"
        );
        let bytes = (elements / per_block)
            .checked_mul(block_bytes)
            .context("size overflows")?;
        shape.reverse();
        let offset = self.u64()?;
        Ok(Entry {
            shape,
            encoding,
            offset,
            bytes,
        })
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Integer(self.array::<1>()?[0].into()),
            8 => Value::Text(self.text()?),
            9 => self.list(depth)?,
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => bail!("unknown value type {kind}"),
        })
    }

    fn list(&mut self, depth: u32) -> Result<Value> {
        ensure!(
            depth < ARRAY_DEPTH_MAX,
            "arrays nested deeper than {ARRAY_DEPTH_MAX}"
        );
        let kind = self.u32()?;
        let count = self.count(if kind == 8 { 8 } else { 1 })?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.value(kind, depth + 1)?);
        }
        Ok(Value::List(list))
    }

    /// A count of things that take at least `each` bytes: more than the file can hold is an error.
    fn count(&mut self, each: u64) -> Result<u64> {
        let count = self.u64()?;
        let left = self.file_bytes.saturating_sub(self.at);
        ensure!(
            count <= left / each,
            "a count of {count} does not fit the {left} bytes left"
        );
        Ok(count)
    }

    fn text(&mut self) -> Result<String> {
        let length = self.count(1)?;
        ensure!(
            length <= STRING_BYTES_MAX,
            "a string of {length} bytes, at most {STRING_BYTES_MAX}"
        );
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).context("a string is not UTF-8")
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let at = self.at;
        self.reader
            .read_exact(bytes)
            .with_context(|| format!("the file ends inside the header, at byte {at}"))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}
