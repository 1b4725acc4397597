"""Numbers of rows in files instead of in memory: appended block by block, mapped when they are complete.

Mapped pages belong to the file, the kernel drops them when memory is short; what is computed from a column should
still go `in_parts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PART = 1 << 17  # rows that are computed with at once


class Columns:
    """Columns of one length, in files `NAME.STEM.column` of a folder."""

    def __init__(self, folder: Path, stem: str, **types: Any) -> None:
        self._types = {name: np.dtype(of) for name, of in types.items()}
        self._paths = {name: folder / f"{name}.{stem}.column" for name in types}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._types

    def append(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array, self._types[name].base).tobytes())

    def mapped(self) -> dict[str, np.ndarray]:
        """Every column whole; nothing can be appended any more."""
        for file in self._files.values():
            file.close()
        return {name: _map(path, self._types[name]) for name, path in self._paths.items()}


def _map(path: Path, of: np.dtype[Any]) -> np.ndarray:
    if not path.stat().st_size:  # an empty file can't be mapped
        return np.zeros((0, *of.shape), of.base)
    return np.memmap(path, of, "r").view(np.ndarray)


def scratch(folder: Path, name: str, of: Any, count: int) -> np.ndarray:
    """A column to write to, zeros at first."""
    if not count:
        return np.zeros(0, of)
    return np.memmap(folder / f"{name}.scratch", of, "w+", shape=(count,)).view(np.ndarray)


def in_parts(count: int) -> Iterator[slice]:
    """0 … count, a part at a time."""
    for start in range(0, count, PART):
        yield slice(start, min(start + PART, count))


def pieces(count: int) -> int:
    """Into how many pieces, a power of two, `count` values are divided by their top bits to be sorted; at most 256."""
    return 1 << min(8, max(0, count // PART).bit_length())
