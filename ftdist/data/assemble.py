"""Rows with a side → sequences of tokens → packed rows → Arrow files."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data import arrow, pack
from ftdist.data.clean import json_line
from ftdist.data.column import Columns, in_parts, scratch
from ftdist.data.decide import Found, Rows
from ftdist.data.encode import (
    DPO_COLUMNS,
    SFT_COLUMNS,
    TRAIN,
    VALIDATION,
    Encoded,
    Laying,
    Shard,
    encode_block,
    write,
)
from ftdist.data.pool import Pool, Progress


class Sequences:
    """All encoded sequences in the order of the rows, as columns in files."""

    def __init__(self, work: Path, is_dpo: bool) -> None:
        parts = {"parts": (np.int32, 3)} if is_dpo else {}
        self._columns = Columns(
            work, "sequences", lengths=np.int32, side=np.uint8, trained=np.int32, row=np.int64, **parts
        )
        self._work = work
        self.overlong: Counter[str] = Counter()
        self.dropped = np.zeros(0, np.int64)

    def add(self, encoded: Encoded, base: int) -> None:
        """The sequences of a block whose first row is number `base`."""
        numbers = {"lengths": encoded.lengths, "side": encoded.side, "trained": encoded.trained}
        numbers["row"] = encoded.rows.astype(np.int64) + base
        self._columns.append(**numbers, **({"parts": encoded.parts} if "parts" in self._columns else {}))
        self.overlong.update(encoded.overlong)
        self.dropped = np.concatenate([self.dropped, encoded.dropped.astype(np.int64) + base])

    def complete(self) -> None:
        found = self._columns.mapped()
        self.lengths, self.side, self.trained, self.row = (found[n] for n in ("lengths", "side", "trained", "row"))
        self.parts = found.get("parts", np.broadcast_to(np.int32(0), (len(self.row), 3)))
        self.offsets = scratch(self._work, "offsets", np.int64, len(self.row))  # where each begins, in tokens
        total = 0
        for part in in_parts(len(self.row)):
            ends = np.cumsum(self.lengths[part], dtype=np.int64) + total
            self.offsets[part] = ends - self.lengths[part]
            total = int(ends[-1])

    def rows_of(self, side: int, rows: int) -> np.ndarray:
        """Which of so many rows have a sequence on this side."""
        result = np.zeros(rows, bool)
        for part in in_parts(len(self.row)):
            result[self.row[part][self.side[part] == side]] = True
        return result


def encode(rows: Rows, found: Found, laying: Laying, work: Path, made: Path, processes: Pool) -> Sequences:
    progress = Progress("tokenise", "rows")
    sources = [c.source for c in rows.cleaned]
    tasks = (
        (
            work,
            laying,
            rows.sources[sources[i]],
            rows.cleaned[i].file,
            block,
            found.side[rows.bases[i] : rows.bases[i + 1]],
        )
        for i, block in enumerate(rows.blocks)
    )
    sequences = Sequences(work, laying.task == "dpo")
    with (
        (made / "rejects.jsonl").open("a", encoding="utf-8") as rejects,
        (made / "validation_rows.jsonl").open("w", encoding="utf-8") as validation,
        (work / "ids.bin").open("wb") as ids,
        (work / "marks.bin").open("wb") as marks,
    ):
        for i, encoded in enumerate(processes.map(encode_block, tasks)):
            for reject in encoded.rejects:
                rejects.write(json_line(reject))
                rows.rejected[reject["reason"]] += 1
            validation.write(encoded.validation)
            for name, file in (("ids", ids), ("marks", marks)):
                piece = work / f"{name}-{encoded.block}.bin"
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
                piece.unlink()
            sequences.add(encoded, int(rows.bases[i]))
            progress.add(int(rows.bases[i + 1] - rows.bases[i]))
    progress.done()
    sequences.complete()
    return sequences


def trained_on(times: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Numbers of the training sequences, each as often as an epoch holds it."""
    chosen = np.flatnonzero(sequences.side == TRAIN)
    return chosen if times.strides == (0,) else np.repeat(chosen, times[sequences.row[chosen]])


def write_parts(
    rows: Rows,
    training: np.ndarray,
    sequences: Sequences,
    laying: Laying,
    packing: bool,
    seed: int,
    key: str,
    work: Path,
    made: Path,
    processes: Pool,
) -> dict[str, Any]:
    """Packs and writes both parts; returns their sizes. training: numbers of sequences."""
    progress = Progress("pack and write", "rows")
    sizes: dict[str, Any] = {}
    columns = DPO_COLUMNS if laying.task == "dpo" else SFT_COLUMNS
    for name, side in (("train", TRAIN), ("validation", VALIDATION)):
        chosen = training if side == TRAIN else np.flatnonzero(sequences.side == side)
        lengths = sequences.lengths[chosen]
        if packing and laying.task == "sft":
            bin_of, count = pack.best_fit_decreasing(lengths, laying.max_length)
            # bins come out longest sequence first; the order of rows must not depend on length
            shuffled = np.random.Generator(np.random.PCG64([seed, side])).permutation(count)
            bin_of = shuffled[bin_of]
            order = np.argsort(bin_of, kind="stable")
            per_row = np.bincount(bin_of, minlength=count)
        else:
            order, per_row = np.arange(len(chosen)), np.ones(len(chosen), np.int64)
        chosen = chosen[order]
        folder = made / name
        folder.mkdir()
        cuts = _cuts(sequences, chosen, per_row)
        paths = [folder / f"data-{number:05d}-of-{len(cuts) - 1:05d}.arrow" for number in range(len(cuts) - 1)]
        shards = _shards(paths, cuts, laying.task, sequences, rows, chosen, per_row)
        for written in processes.map(write, ((work, shard) for shard in shards)):
            progress.add(written)
        arrow.finish(folder, columns, [path.name for path in paths], fingerprint=f"{key[:30]}{name}")
        sizes[name] = {
            "rows": len(per_row),
            "sequences": len(chosen),
            "tokens": int(lengths.sum()),
            "supervised": int(sequences.trained[chosen].sum()),
            "lengths": lengths,
            "by_source": _by_source(rows, sequences, chosen),
        }
    progress.done()
    return sizes


def _by_source(rows: Rows, sequences: Sequences, chosen: np.ndarray) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of each source."""
    of, count = rows.source[sequences.row[chosen]], len(rows.sources)
    counted = [np.bincount(of, numbers[chosen], count) for numbers in (sequences.lengths, sequences.trained)]
    return [(int(tokens), int(supervised)) for tokens, supervised in zip(*counted, strict=True)]


def _cuts(sequences: Sequences, chosen: np.ndarray, per_row: np.ndarray) -> list[int]:
    """Rows where files of limited size begin and end."""
    ends = np.cumsum(sequences.lengths[chosen], dtype=np.int64)
    tokens = np.zeros(len(per_row) + 1, np.int64)
    tokens[1:] = ends[np.cumsum(per_row) - 1]
    cuts = [0]
    while cuts[-1] < len(per_row):
        limit = tokens[cuts[-1]] + arrow.SHARD_TOKENS
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(tokens, limit, "right")) - 1))
    if len(cuts) == 1:
        cuts.append(0)  # an empty part is one empty file
    return cuts


def _shards(
    paths: list[Path],
    cuts: list[int],
    task: str,
    sequences: Sequences,
    rows: Rows,
    chosen: np.ndarray,
    per_row: np.ndarray,
) -> Iterator[Shard]:
    """The files, made one after another: their numbers are copies."""
    first = np.concatenate([[0], np.cumsum(per_row)])
    for path, start, stop in zip(paths, cuts, cuts[1:], strict=False):
        which = chosen[first[start] : first[stop]]
        yield Shard(
            path,
            task,
            sequences.offsets[which],
            sequences.lengths[which],
            rows.source[sequences.row[which]].astype(np.int32),
            sequences.parts[which],
            per_row[start:stop],
        )
