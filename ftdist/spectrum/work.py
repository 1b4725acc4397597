"""Measures a list of tensors, one at a time, and writes each result as a line of its own.

`python -m ftdist.spectrum.work` is a worker process of a scan; it reads its share as JSON from standard
input.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdist.errors import USAGE, UserError
from ftdist.launcher import devices
from ftdist.spectrum.reader import Stored, read

if TYPE_CHECKING:
    import numpy as np

    from ftdist.spectrum.snr import Precision

# Bytes of a piece: 32 MiB beside the Gram matrix on a CPU, 512 MiB on a GPU.
_PIECE = {"cpu": 32 << 20, "cuda": 512 << 20}


def measure_all(tensors: list[Stored], results: Path, device: str) -> None:
    """Appends {"name": …, "matrices": [result, …]} to `results` for each tensor; a kill cuts the last line.

    UserError for a weight that is NaN or infinite.
    """
    from ftdist.spectrum import snr

    with results.open("a") as stream:
        for tensor in tensors:
            stack = tensor.shape[0] if len(tensor.shape) == 3 else 1
            try:
                found = [_measure(tensor, index, device) for index in range(stack)]
            except snr.NotFinite:
                stream.write(json.dumps({"name": tensor.name, "finite": False}) + "\n")  # other ranks wait in vain
                raise refusal(tensor)
            stream.write(json.dumps({"name": tensor.name, "matrices": found}) + "\n")
            stream.flush()


def refusal(tensor: Stored) -> UserError:
    return UserError(f"{tensor.file}: {tensor.name} has NaN or infinite values; get sound weights")


def _measure(tensor: Stored, index: int, device: str) -> dict[str, Any]:
    from ftdist.spectrum import snr

    return snr.measure(lambda precision: slices(tensor, index, device, precision), tensor.matrix)


def slices(tensor: Stored, index: int, device: str, precision: Precision) -> Iterator[Any]:
    """Matrix `index` of a tensor in pieces with the short side as columns: numpy arrays, torch tensors on a GPU."""
    (rows, columns), everything = tensor.matrix, slice(None)
    short, long = min(rows, columns), max(rows, columns)
    width = 8 if precision == "float64" or tensor.dtype == "F64" else 4
    step = max(1, _PIECE[device.partition(":")[0]] // (width * short))
    step = max(step, short // 4)  # thin pieces would make many small products
    for first in range(0, long, step):
        part = slice(first, min(first + step, long))
        if rows >= columns:
            yield _exact(read(tensor, index, part, everything), tensor.dtype, device, width)
        else:
            yield _exact(read(tensor, index, everything, part), tensor.dtype, device, width).T


def _exact(block: np.ndarray, dtype: str, device: str, width: int) -> Any:
    """Stored values as float32 or float64 (`width` bytes), on the device."""
    if device != "cpu":
        import torch

        moved = torch.from_numpy(block).to(device)
        moved = moved.view(torch.bfloat16) if dtype == "BF16" else moved
        return moved.to(torch.float64 if width == 8 else torch.float32)
    if dtype == "BF16":
        import numpy as np

        bits = block.astype(np.uint32)
        bits <<= 16
        block = bits.view(np.float32)
    return block.astype(f"f{width}", copy=False)


def read_results(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Tensor name -> results of its matrices, from every worker that ever wrote here, without cut lines."""
    return {entry["name"]: entry["matrices"] for entry in _entries(directory) if "matrices" in entry}


def not_finite(directory: Path) -> set[str]:
    """Tensors that some worker found to be NaN or infinite: a fact of these weights, whoever scans them."""
    return {entry["name"] for entry in _entries(directory) if entry.get("finite") is False}


def _entries(directory: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(directory.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "name" in entry:
                yield entry


def place(device: str, worker: int) -> str:
    """torch's name of the device for a worker of this machine: the GPUs in turn, else the CPU."""
    if device == "cpu" or (device == "auto" and devices()[1] != "GPU"):
        return "cpu"  # without torch: two seconds and 200 MB less
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise UserError("device=cuda: torch sees no GPU here; set device=cpu or auto")
    return f"cuda:{worker % gpus}" if gpus else "cpu"


def job(tensors: list[Stored], results: Path, device: str, worker: int) -> str:
    """What a worker process reads from standard input."""
    rows = [asdict(tensor) | {"file": str(tensor.file)} for tensor in tensors]
    return json.dumps({"tensors": rows, "results": str(results), "device": device, "worker": worker})


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: never outlive the scan
    given = json.loads(sys.stdin.read())
    rows = [{**row, "shape": tuple(row["shape"]), "file": Path(row["file"])} for row in given["tensors"]]
    try:
        device = place(given["device"], given["worker"])
        measure_all([Stored(**row) for row in rows], Path(given["results"]), device)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
