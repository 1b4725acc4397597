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
from ftdist.spectrum import snr
from ftdist.spectrum.reader import Stored, read

if TYPE_CHECKING:
    import torch

# Elements of a piece in float64: 32 MiB beside the Gram matrix on a CPU, 512 MiB on a GPU.
_PIECE = {"cpu": 4 << 20, "cuda": 64 << 20}


def measure_all(tensors: list[Stored], results: Path, device: str) -> None:
    """Appends {"name": …, "matrices": [result, …]} to `results` for each tensor; a kill cuts the last line.

    UserError for a weight that is NaN or infinite.
    """
    with results.open("a") as stream:
        for tensor in tensors:
            stack = tensor.shape[0] if len(tensor.shape) == 3 else 1
            try:
                found = [_measure(tensor, index, device) for index in range(stack)]
            except snr.NotFinite:
                raise UserError(f"{tensor.file}: {tensor.name} has NaN or infinite values; get sound weights")
            stream.write(json.dumps({"name": tensor.name, "matrices": found}) + "\n")
            stream.flush()


def _measure(tensor: Stored, index: int, device: str) -> dict[str, Any]:
    return snr.measure(lambda: slices(tensor, index, device), tensor.matrix)


def slices(tensor: Stored, index: int, device: str) -> Iterator[torch.Tensor]:
    """Matrix `index` of a tensor in float64 pieces with the short side as columns.

    A tall matrix is read a few rows at a time. A wide one is read whole in its own type and converted in
    pieces.
    """
    import torch

    rows, columns = tensor.matrix
    start = index * rows * columns
    step = max(1, _PIECE[torch.device(device).type] // min(rows, columns))
    step = max(step, min(rows, columns) // 4)  # thin pieces would make many small products
    if rows >= columns:
        for first in range(0, rows, step):
            last = min(first + step, rows)
            piece = read(tensor, start + first * columns, start + last * columns)
            yield piece.view(last - first, columns).to(device).double()
    else:
        whole = read(tensor, start, start + rows * columns).view(rows, columns).to(device)
        for first in range(0, columns, step):
            yield whole[:, first : first + step].T.double()


def read_results(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Tensor name -> results of its matrices, from every worker that ever wrote here, without cut lines."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(directory.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["name"]] = entry["matrices"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def place(device: str, worker: int) -> str:
    """torch's name of the device for a worker of this machine: the GPUs in turn, else the CPU."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UserError("device=cuda: torch sees no GPU here; set device=cpu or auto")
    return f"cuda:{worker % gpus}" if gpus else "cpu"


def job(tensors: list[Stored], results: Path, device: str, worker: int, threads: int) -> str:
    """What a worker process reads from standard input."""
    rows = [asdict(tensor) | {"file": str(tensor.file)} for tensor in tensors]
    return json.dumps(
        {"tensors": rows, "results": str(results), "device": device, "worker": worker, "threads": threads}
    )


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: never outlive the scan
    given = json.loads(sys.stdin.read())
    import torch

    torch.set_num_threads(given["threads"])
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
