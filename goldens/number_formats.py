"""Number formats of the released checkpoints in plain numpy, and a safetensors writer.

Owns: BF16, FP8 E4M3 with block scales, MXFP4 (E2M1 codes, E8M0 scales), `write_shards`.
Written for the goldens only and from the formats' descriptions: it shares no code with the crates,
so that a mistake in one is not hidden by the same mistake in the other.
"""

import json
import pathlib
import struct
import zlib

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3_table() -> np.ndarray:
    """256 values of FP8 E4M3 (bias 7, no infinity, 0x7F and 0xFF are NaN)."""
    table = np.zeros(256, np.float32)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            table[code] = np.nan
        elif exponent == 0:
            table[code] = sign * mantissa * 2.0**-9
        else:
            table[code] = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return table


E4M3 = _e4m3_table()


def bf16_encode(x: np.ndarray) -> np.ndarray:
    """f32 -> u16, round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_decode(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the value nearest to x; `values` ascending."""
    right = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    return np.where(x - values[right - 1] <= values[right] - x, right - 1, right)


def fp8_encode(x: np.ndarray) -> np.ndarray:
    """f32 -> E4M3 codes, saturating at 448."""
    positive = E4M3[:127]
    code = _nearest(np.minimum(np.abs(x), 448.0), positive).astype(np.uint8)
    return code | np.where(np.signbit(x), 0x80, 0).astype(np.uint8)


def grid_rows(rows: int, shard_rows: int, block: int = 128) -> np.ndarray:
    """Scale row of every weight row when the grid restarts every `shard_rows` rows."""
    assert rows % shard_rows == 0
    blocks_per_shard = -(-shard_rows // block)
    g = np.arange(rows)
    return (g // shard_rows) * blocks_per_shard + (g % shard_rows) // block


def fp8_block_encode(x: np.ndarray, shard_rows: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] f32 -> codes u8 [n, k], scale_inv f32 [scale rows, ceil(k / 128)].

    Neighbouring blocks get visibly different scales: reading a wrong one must show in the logits.
    """
    n, k = x.shape
    row_of = grid_rows(n, shard_rows)
    col_of = np.arange(k) // 128
    scales = np.zeros((row_of[-1] + 1, col_of[-1] + 1), np.float32)
    gains = np.exp2(rng.uniform(-1.0, 1.0, scales.shape)).astype(np.float32)
    amax = np.zeros_like(scales)
    np.maximum.at(amax, (row_of[:, None], col_of[None, :]), np.abs(x))
    scales = (amax * gains / np.float32(448.0)).astype(np.float32)
    scaled = x * gains[row_of[:, None], col_of[None, :]] / scales[row_of[:, None], col_of[None, :]]
    return fp8_encode(scaled.astype(np.float32)), scales


def fp8_block_decode(codes: np.ndarray, scales: np.ndarray, shard_rows: int) -> np.ndarray:
    row_of = grid_rows(codes.shape[0], shard_rows)
    assert scales.shape == (row_of[-1] + 1, -(-codes.shape[1] // 128)), (scales.shape, codes.shape)
    col_of = np.arange(codes.shape[1]) // 128
    return E4M3[codes] * scales[row_of[:, None], col_of[None, :]]


def mxfp4_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] f32 -> packed u8 [n, k/2] (low nibble = even column), E8M0 u8 [n, k/32]."""
    n, k = x.shape
    blocks = x.reshape(n, k // 32, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.floor(np.log2(np.maximum(amax, 1e-30))).astype(np.int32) - 2
    scale = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    unit = np.exp2(scale.astype(np.float32) - 127)[..., None]
    code = _nearest(np.minimum(np.abs(blocks / unit), 6.0), E2M1[:8]).astype(np.uint8)
    code = (code | np.where(blocks < 0, 8, 0).astype(np.uint8)).reshape(n, k)
    return (code[:, 0::2] | (code[:, 1::2] << 4)).astype(np.uint8), scale


def mxfp4_decode(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    n, half = packed.shape
    code = np.empty((n, half * 2), np.uint8)
    code[:, 0::2] = packed & 15
    code[:, 1::2] = packed >> 4
    return E2M1[code] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)


class Stored:
    """One tensor as a file holds it: safetensors dtype name and raw little-endian array."""

    def __init__(self, dtype: str, raw: np.ndarray):
        width = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}[dtype]
        assert raw.dtype.itemsize == width, (dtype, raw.dtype)
        self.dtype, self.raw = dtype, np.ascontiguousarray(raw)

    @staticmethod
    def bf16(x: np.ndarray) -> "Stored":
        return Stored("BF16", bf16_encode(x))

    @staticmethod
    def f32(x: np.ndarray) -> "Stored":
        return Stored("F32", x.astype(np.float32))

    def value(self) -> np.ndarray:
        """Decoded BF16 or F32; quantised formats need their scale and are decoded by the caller."""
        if self.dtype == "BF16":
            return bf16_decode(self.raw)
        assert self.dtype == "F32", self.dtype
        return self.raw.copy()


def write_safetensors(path: pathlib.Path, tensors: dict[str, Stored], padded: bool = True) -> None:
    """Writes tensors in the order given. `padded=False` leaves the data section unaligned, as the
    format allows: the header is then made to end on an odd byte."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.raw.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.raw.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    pad = -len(text) % 8 if padded else (len(text) + 1) % 2
    text += b" " * pad
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.raw.tobytes())


def write_checkpoint(folder: pathlib.Path, files: dict[str, dict[str, Stored]], metadata: dict, unpadded=()) -> None:
    """Writes every file and `model.safetensors.index.json`."""
    weight_map, total = {}, 0
    for file, tensors in files.items():
        write_safetensors(folder / file, tensors, padded=file not in unpadded)
        for name, tensor in tensors.items():
            weight_map[name] = file
            total += tensor.raw.nbytes
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def rng_for(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for every tensor, so that adding one does not change the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def normal(seed: int, name: str, shape, std: float, mean: float = 0.0) -> np.ndarray:
    return (mean + std * rng_for(seed, name).standard_normal(shape)).astype(np.float32)
