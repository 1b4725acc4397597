"""Weights on disk, a piece at a time: bytes of safetensors, `.bin` by torch's weights-only loading.

Never builds a model and never maps a safetensors file: what is not asked for is not in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import secrets
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdist.errors import UserError
from ftdist.rundir import cache_root

if TYPE_CHECKING:
    import numpy as np
    import torch

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes an element
_QUANTISED = re.compile(r"\.(qweight|weight_packed|absmax|SCB|weight_scale(_inv)?)$|_(blocks|scales)$")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    file: Path
    offset: int | None  # of the first byte; None in a .bin file

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns, of each matrix of a stack too; a vector is one row."""
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[-2], self.shape[-1])


def find(model_path: str, revision: str | None) -> Path:
    """The directory of the weights: `model_path`, or the snapshot of a hub id, downloaded if needed."""
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path):
        raise UserError(f"model.path={model_path}: no such directory; give that of a Hugging Face model")
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["*.json", weights]
            found = Path(snapshot_download(model_path, revision=revision, allow_patterns=patterns))
            if any(found.glob(weights)):
                break
    except Exception as failure:  # one of many classes of the hub's client; the reason is in the name
        reason = type(failure).__name__
        raise UserError(
            f"model.path={model_path}: no directory here, and the hub gave no weights ({reason}); "
            f"run `hf download {model_path}` where there is a network, or give a local directory"
        )
    return found


def tensors(model_dir: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name. UserError: missing, cut short, damaged or quantised weights."""
    if config(model_dir).get("quantization_config"):
        raise _quantised(model_dir, "config.json has a quantization_config")
    found: dict[str, Stored] = {}
    for shard in shards(model_dir):
        found |= _header(shard) if shard.suffix == ".safetensors" else _bin_header(shard)
    for name, tensor in found.items():
        if _QUANTISED.search(name) or (name.endswith(".weight") and tensor.dtype not in FLOATS):
            raise _quantised(model_dir, f"{name} is stored as {tensor.dtype}")
    return found


def _quantised(model_dir: Path, why: str) -> UserError:
    return UserError(f"model.path={model_dir}: quantised ({why}); scan the unquantised model that it was made of")


def shards(model_dir: Path) -> list[Path]:
    """The files that transformers would load, safetensors before `.bin`."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = model_dir / f"{stem}.{suffix}", model_dir / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _indexed(index)
    raise UserError(
        f"model.path={model_dir}: no weights there (looked for model.safetensors, pytorch_model.bin and the "
        "index "
        "of each); download the whole model"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = [index.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as failure:
        raise UserError(f"{index}: not an index of shards ({failure}); download it again")
    for file in files:
        if not file.is_file():
            raise UserError(f"{index}: names {file.name}, which is not there; download it")
    if index.name.startswith("model."):
        present = {name for file in files for name in _header(file)}
        lost = sorted(set(weight_map) - present)
        if lost:
            raise UserError(f"{index}: puts {lost[0]} into {weight_map[lost[0]]}, which lacks it; download it again")
    return files


def config(model_dir: Path) -> dict[str, Any]:
    """config.json; empty where there is none."""
    file = model_dir / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as failure:
        raise UserError(f"{file}: cannot be read as JSON ({failure}); download it again")
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no configuration; download it again")
    return content


def _header(file: Path) -> dict[str, Stored]:
    """A safetensors file: 8 bytes length of the header (little endian), the header as JSON, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{file}: cut short or no safetensors file ({size:,} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {
                name: Stored(name, tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as failure:
            raise UserError(f"{file}: its header is damaged ({failure}); download it again")
    if size < end:
        raise UserError(f"{file}: cut short, {size:,} bytes of {end:,}; download it again")
    return found


def _bin_header(file: Path) -> dict[str, Stored]:
    import torch

    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
             torch.bool: "BOOL"}  # fmt: skip
    return {
        name: Stored(name, tuple(tensor.shape), codes.get(tensor.dtype, str(tensor.dtype)), file, None)
        for name, tensor in _bin(file, file.stat().st_mtime_ns).items()
        if isinstance(tensor, torch.Tensor)
    }


@functools.lru_cache(maxsize=1)
def _bin(file: Path, changed: int) -> dict[str, Any]:  # noqa: ARG001  a part of the cache's key
    """One shard, mapped: a tensor comes into memory when it is read. torch refuses pickled code."""
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as failure:  # torch raises RuntimeError, UnpicklingError, EOFError … for a damaged file
        reason = " ".join(str(failure).split())[:120] or type(failure).__name__
        raise UserError(f"{file}: not a whole file of plain weights ({reason}); convert it to safetensors")
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__}, not named weights; convert the model to safetensors")
    return loaded


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits


def read(tensor: Stored, index: int, rows: slice, columns: slice) -> np.ndarray:
    """A block of matrix `index` of a tensor, in the type that it has on disk; bfloat16 as its bits in uint16.

    Whole rows are one read, parts of rows one read each.
    """
    import numpy as np

    height, width = tensor.matrix
    if tensor.offset is None:
        return _from_torch(_bin(tensor.file, tensor.file.stat().st_mtime_ns)[tensor.name]).reshape(-1, height, width)[
            index, rows, columns
        ]
    first, stop, _ = rows.indices(height)
    left, right, _ = columns.indices(width)
    block = np.empty((stop - first, right - left), _NUMPY[tensor.dtype])
    with tensor.file.open("rb", buffering=0) as stream:
        start = tensor.offset + index * height * width * block.itemsize
        if right - left == width:
            _fill(stream, block, start + first * width * block.itemsize, tensor)
        else:
            for row in range(first, stop):
                _fill(stream, block[row - first], start + (row * width + left) * block.itemsize, tensor)
    return block


def elements(tensor: Stored, start: int, stop: int) -> np.ndarray:
    """Elements start … stop - 1 of a tensor, row after row, in the type that it has on disk, as `read` gives it."""
    import numpy as np

    if tensor.offset is None:
        return _from_torch(_bin(tensor.file, tensor.file.stat().st_mtime_ns)[tensor.name]).reshape(-1)[start:stop]
    block = np.empty(stop - start, _NUMPY[tensor.dtype])
    with tensor.file.open("rb", buffering=0) as stream:
        _fill(stream, block, tensor.offset + start * block.itemsize, tensor)
    return block


def _fill(stream: FileIO, block: np.ndarray, start: int, tensor: Stored) -> None:
    view, got = block.data.cast("B"), 0
    while got < len(view):
        count = os.preadv(stream.fileno(), [view[got:]], start + got)
        if not count:
            raise UserError(f"{tensor.file}: cut short inside {tensor.name}; download it again")
        got += count


def _from_torch(tensor: torch.Tensor) -> np.ndarray:
    import torch

    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.detach().numpy()


# The content of the weights


def content_key(files: list[Path], *, rank: int, world: int) -> str:
    """SHA-256 over the files' SHA-256. A file is read once: its digest is kept with its size and time stamp.

    Ranks that share the cache begin at different files and use each other's digests.
    """
    first = rank * len(files) // world
    turned = files[first:] + files[:first]
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        digests = dict(zip(turned, pool.map(digest, turned), strict=True))
    return hashlib.sha256(" ".join(digests[file] for file in sorted(files)).encode()).hexdigest()[:32]


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    memo = cache_root() / "spectrum" / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        known = memo.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    summed = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(4 << 20)
        while count := stream.readinto(buffer):
            summed.update(memoryview(buffer)[:count])
    write_atomically(memo, summed.hexdigest())
    return summed.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
