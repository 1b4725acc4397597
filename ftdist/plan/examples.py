"""How many rows the data files hold, before cleaning: a look that costs a second, for the plan's advice."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftdist.plan.batch import Filling

BYTES_PER_TOKEN = 4  # of English JSON with today's vocabularies; a rule of thumb, marked so wherever it is shown
READ_WHOLE = 200 << 20  # bytes; a larger .json file is not parsed for a plan


def count(path: Any) -> int | None:
    """Rows in all files that `data.path` names; None if one of them cannot be counted by a look (a hub id, say)."""
    total = 0
    for part in path if isinstance(path, list) else [path]:
        files = list(_files(part["path"] if isinstance(part, dict) else str(part)))
        try:
            counts = [_rows(file) for file in files]
        except (OSError, EOFError, ValueError, zlib.error):  # the preparation will say what is wrong with it
            return None
        if not counts or None in counts:
            return None
        total += sum(c for c in counts if c is not None)
    return total


def estimated(path: Any, examples: int | None, max_length: int, packing: bool, held_out: float) -> int | None:
    """Rows that the trainer would see, before anything is prepared; None where only reading the data would tell.

    held_out: the share of rows that is kept from training.
    """
    if examples is None:
        return None
    rows = float(examples)
    if packing:
        tokens = _tokens(path)
        if tokens is None:
            return None
        rows = tokens / max_length
    return max(round(rows * (1 - held_out)), 1)


def filling(path: Any, examples: int | None, max_length: int, sequences_per_row: int) -> Filling | None:
    """Of rows that are not packed, all taken for equally long; a pair's text is a prompt and two answers, alike."""
    tokens = _tokens(path)
    if not examples or tokens is None:
        return None
    mean = min(tokens / examples * (1 if sequences_per_row == 1 else 2 / 3), max_length)
    return Filling(mean, ((0.0, mean),))


def _tokens(path: Any) -> float | None:
    """About so many in plain files; None for others, whose size says little."""
    parts = path if isinstance(path, list) else [path]
    files = [file for part in parts for file in _files(part["path"] if isinstance(part, dict) else str(part))]
    if any(file.suffix.lower() not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for file in files):
        return None
    return sum(file.stat().st_size for file in files) / BYTES_PER_TOKEN


def _files(named: str) -> Iterable[Path]:
    path = Path(named).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _rows(file: Path) -> int | None:
    endings = [ending.lower() for ending in file.suffixes]
    packed = endings[-1:] == [".gz"]
    kind = (endings[:-1] if packed else endings)[-1:] or [""]
    opener: Any = gzip.open if packed else open
    if kind[0] in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with opener(file, "rb") as lines:
            filled = sum(1 for line in lines if line.strip())
        return filled - (kind[0] in (".csv", ".tsv") and filled > 0)
    if kind[0] == ".json" and file.stat().st_size < READ_WHOLE:
        with opener(file, "rb") as handle:
            try:
                rows = json.loads(handle.read())
            except ValueError:  # the preparation will say what is wrong with it
                return None
        return len(rows) if isinstance(rows, list) else None
    if kind[0] == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    return None
