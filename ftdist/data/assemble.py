"""Rows with a side → sequences of tokens → packed rows → Arrow files."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data import arrow, pack
from ftdist.data.clean import json_line
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
    """All encoded sequences in the order of the rows, as arrays."""

    def __init__(self, encoded: list[Encoded], bases: np.ndarray) -> None:
        empty = np.zeros(0, np.int32)
        self.lengths = np.concatenate([e.lengths for e in encoded] or [empty])
        self.side = np.concatenate([e.side for e in encoded] or [empty])
        self.trained = np.concatenate([e.trained for e in encoded] or [empty])
        self.parts = np.concatenate([e.parts for e in encoded] or [empty.reshape(0, 3)])
        self.row = np.concatenate([e.rows + bases[i] for i, e in enumerate(encoded)] or [empty]).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]
        self.overlong: Counter[str] = Counter()
        for e in encoded:
            self.overlong.update(e.overlong)
        self.dropped = np.concatenate([e.dropped + bases[i] for i, e in enumerate(encoded)] or [empty]).astype(np.int64)


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
    done = []
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
            done.append(replace(encoded, rejects=[], validation=""))
            progress.add(int(rows.bases[i + 1] - rows.bases[i]))
    progress.done()
    return Sequences(done, rows.bases)


def write_parts(
    rows: Rows,
    times: np.ndarray,
    sequences: Sequences,
    laying: Laying,
    packing: bool,
    seed: int,
    key: str,
    work: Path,
    made: Path,
    processes: Pool,
) -> dict[str, Any]:
    """Packs and writes both parts; returns their sizes."""
    progress = Progress("pack and write", "rows")
    sizes: dict[str, Any] = {}
    columns = DPO_COLUMNS if laying.task == "dpo" else SFT_COLUMNS
    for name, side in (("train", TRAIN), ("validation", VALIDATION)):
        chosen = np.flatnonzero(sequences.side == side)
        if side == TRAIN:
            chosen = np.repeat(chosen, times[sequences.row[chosen]])
        lengths = sequences.lengths[chosen]
        if packing and laying.task == "sft":
            bin_of, count = pack.best_fit_decreasing(lengths, laying.max_length)
            # bins come out longest sequence first; the order of rows must not depend on length
            shuffled = np.random.Generator(np.random.PCG64([seed, side])).permutation(count)
            bin_of = shuffled[bin_of]
            order = np.lexsort((np.arange(len(bin_of)), bin_of))
            per_row = np.bincount(bin_of, minlength=count)
        else:
            order, per_row = np.arange(len(chosen)), np.ones(len(chosen), np.int64)
        chosen = chosen[order]
        folder = made / name
        folder.mkdir()
        shards = _shards(folder, laying.task, sequences, rows, chosen, per_row)
        for written in processes.map(write, ((work, shard) for shard in shards)):
            progress.add(written)
        arrow.finish(folder, columns, [s.path.name for s in shards], fingerprint=f"{key[:30]}{name}")
        sizes[name] = {
            "rows": len(per_row),
            "sequences": len(chosen),
            "tokens": int(lengths.sum()),
            "supervised": int(sequences.trained[chosen].sum()),
            "lengths": lengths,
        }
    progress.done()
    return sizes


def _shards(
    folder: Path, task: str, sequences: Sequences, rows: Rows, chosen: np.ndarray, per_row: np.ndarray
) -> list[Shard]:
    """Cuts the rows into files of limited size."""
    first = np.concatenate([[0], np.cumsum(per_row)])
    tokens = np.concatenate([[0], np.cumsum(sequences.lengths[chosen], dtype=np.int64)])[first]
    cuts = [0]
    while cuts[-1] < len(per_row):
        limit = tokens[cuts[-1]] + arrow.SHARD_TOKENS
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(tokens, limit, "right")) - 1))
    if len(cuts) == 1:
        cuts.append(0)  # an empty part is one empty file
    result = []
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        which = chosen[first[start] : first[stop]]
        result.append(
            Shard(
                folder / f"data-{number:05d}-of-{len(cuts) - 1:05d}.arrow",
                task,
                sequences.offsets[which],
                sequences.lengths[which],
                rows.source[sequences.row[which]].astype(np.int32),
                sequences.parts[which],
                per_row[start:stop],
            )
        )
    return result
