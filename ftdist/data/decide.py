"""Out, training or validation: what is decided of every row, from what the first pass noted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ftdist.data import duplicates
from ftdist.data.clean import FILTERS, KEPT, Cleaned, Rules, kind_of
from ftdist.data.column import in_parts, scratch
from ftdist.data.encode import REPLAY, TRAIN, VALIDATION
from ftdist.data.pool import Pool, Progress
from ftdist.data.sources import Source
from ftdist.errors import UserError

U64 = np.uint64


class Rows:
    """All rows that could be read, as columns in files; a row is a number. Their texts stay on disk too."""

    def __init__(self, cleaned: list[Cleaned], numbers: dict[str, np.ndarray], sources: list[Source]) -> None:
        self.cleaned = cleaned
        self.sources = sources
        self.blocks = [c.block for c in cleaned]
        counts = [c.count for c in cleaned]
        self.bases = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.source = np.repeat(np.array([c.source for c in cleaned], np.int16), counts)
        kinds = np.array([kind_of(s) for s in sources], np.int8)
        self.kind = kinds[self.source]
        self.keys, self.status, self.ids, self.lines = (numbers[n] for n in ("keys", "status", "ids", "lines"))
        ours = [c for c in cleaned if sources[c.source].kind != "against"]
        self.seen = sum(c.seen for c in ours)
        self.rejected: Counter[str] = Counter(r for c in ours for r in c.reject_reasons)

    def __len__(self) -> int:
        return len(self.status)

    def place(self, row: int) -> tuple[int, int]:
        """(number of the block in `blocks`, row in it)."""
        number = int(np.searchsorted(self.bases, row, "right")) - 1
        return number, row - int(self.bases[number])


class Found:
    """What was decided of each row: `side` is 0 (out), TRAIN, VALIDATION or REPLAY; with the evidence for the
    report."""

    def __init__(self, rows: int) -> None:
        nothing = duplicates.Twins(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        self.side = np.zeros(rows, np.uint8)
        self.exact = nothing
        self.near = nothing
        self.near_removed = False
        self.contaminated = nothing
        self.filtered: dict[str, int] = {}
        self.times = np.broadcast_to(np.int16(1), rows)
        self.notes: list[str] = []


def decide(
    rows: Rows,
    rules: Rules,
    work: Path,
    processes: Pool,
    *,
    exact_duplicates: str,
    near_duplicates: str,
    near_threshold: float,
    validation_share: float,
    explicit: bool,
    stratify: bool,
    boilerplate: int,
) -> Found:
    found = Found(len(rows))
    alive = rows.status == KEPT
    train, general = rows.kind == 2, rows.kind == 3
    removable = train | general
    found.filtered = {name: int((rows.status == 1 + i).sum()) for i, name in enumerate(FILTERS)}
    twice: list[duplicates.Twins] = []

    progress = Progress("duplicates", "rows")
    if exact_duplicates == "remove":
        twins = duplicates.exact(rows.keys, alive, work)
        twins = _pick(twins, removable[twins.later])
        from_tests = rows.kind[twins.earlier] == 0
        found.exact = _pick(twins, ~from_tests)
        twice.append(_pick(twins, from_tests))
        alive[twins.later] = False
    root: np.ndarray | None = None  # first row of each group of near-duplicates that stay together
    if near_duplicates != "off":
        twins = duplicates.near(
            work, rows.blocks, rows.bases, alive, bands=rules.bands, threshold=near_threshold, pool=processes
        )
        if near_duplicates == "keep":
            from_tests = (rows.kind[twins.earlier] == 0) & removable[twins.later]
            root = duplicates.components(_pick(twins, rows.kind[twins.earlier] == 2), len(rows))
        else:
            twins = duplicates.greedy(twins, len(rows), removable)
            found.near_removed = True
            alive[twins.later] = False
            from_tests = rows.kind[twins.earlier] == 0
            twice.append(_pick(twins, from_tests))
        found.near = _pick(twins, ~from_tests)
    progress.add(len(rows))

    mine = alive & train
    several = int(mine.sum()) > 1
    found.side[mine] = TRAIN
    found.side[alive & general] = REPLAY
    if explicit:
        found.side[alive & (rows.kind == 1)] = VALIDATION
    elif validation_share and mine.any():
        draw = drawn(rows.keys, rules.seed, work)
        if root is not None:
            draw = draw[root]
        if stratify:
            held = np.zeros(len(rows), bool)
            for source in np.unique(rows.source[mine]):
                own = np.flatnonzero(mine & (rows.source == source))
                count = round(validation_share * len(own))
                held[own[np.argsort(draw[own], kind="stable")[:count]]] = True
            held = (held if root is None else held[root]) & mine
        else:
            held = mine & (draw < validation_share)
        if held.any() and not several:
            held[:] = False
            found.notes.append("one row is all there is to train on; none is held out")
        if not held.any() and several:
            held[np.argmin(np.where(mine, draw, 2))] = True
            found.notes.append("the share would leave no validation row; one is held out all the same")
        if held[mine].all() and several:
            held[np.argmax(np.where(mine, draw, -1))] = False
            found.notes.append("the share would leave no training row; one is kept all the same")
        found.side[held] = VALIDATION

    if rules.ngram:
        side = np.zeros(len(rows), np.uint8)
        side[(rows.kind == 0) | (found.side == VALIDATION)] = 1
        side[(found.side == TRAIN) | (found.side == REPLAY)] = 2
        if (side == 1).any():
            bad, because = duplicates.contaminated(
                work, rows.blocks, rows.bases, side, ngram=rules.ngram, boilerplate=boilerplate, pool=processes
            )
            twice.append(duplicates.Twins(bad, because, np.zeros(len(bad))))
            found.side[bad] = 0
    if twice:
        found.contaminated = duplicates.Twins(*(np.concatenate(parts) for parts in zip(*twice, strict=True)))
    weights = np.array([s.weight for s in rules.sources])
    if (weights != 1).any():
        found.times = _times(rows, weights, rules.seed, work)
    progress.done()
    if not (found.side == TRAIN).any():
        left = "" if not mine.any() else " (all that was left shares text with the validation rows)"
        raise UserError(f"data.path: no training row is left after cleaning{left}; see data.* filters and duplicates")
    return found


def _pick(twins: duplicates.Twins, which: np.ndarray) -> duplicates.Twins:
    return duplicates.Twins(*(part[which] for part in twins))


def _times(rows: Rows, weights: np.ndarray, seed: int, work: Path) -> np.ndarray:
    """How often an epoch holds each row."""
    times = scratch(work, "times", np.int16, len(rows))
    draw = drawn(rows.keys, seed + 1, work)
    for part in in_parts(len(rows)):
        weight = weights[rows.source[part]]
        times[part] = np.floor(weight) + (draw[part] < weight - np.floor(weight))
    return times


def drawn(keys: np.ndarray, seed: int, work: Path) -> np.ndarray:
    """A number in [0, 1) for each row: a function of its content and the seed alone."""
    result = scratch(work, f"draw-{seed}", np.float64, len(keys))
    for part in in_parts(len(keys)):
        x = keys[part, 0] ^ (keys[part, 1] + U64((0x9E3779B97F4A7C15 * (seed + 1)) % (1 << 64)))
        for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            x = (x ^ (x >> U64(31))) * U64(factor)
        result[part] = (x >> U64(11)).astype(np.float64) / (1 << 53)
    return result
