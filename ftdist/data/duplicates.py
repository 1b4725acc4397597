"""Which rows say the same: exact duplicates, near-duplicates (MinHash LSH, verified), shared n-grams across
the split.

Rows are numbered over all blocks; a smaller number takes precedence: rows to decontaminate against first,
then explicit validation rows, then training rows in the order of the files, then general ones. Only those two are
ever taken out.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftdist.data import text
from ftdist.data.clean import PARTITIONS, load_rows, row_texts
from ftdist.data.column import in_parts, pieces, scratch
from ftdist.data.pool import Pool

U64 = np.uint64
# buckets up to this size are compared pair by pair, larger ones with their first row and their neighbour
_ALL_PAIRS = 16
_TASK_ENTRIES = 1_000_000  # n-grams that a task holds at once


class Twins(NamedTuple):
    """Row `later[i]` repeats row `earlier[i]`; `overlap[i]` says how much (1.0: exactly)."""

    later: np.ndarray
    earlier: np.ndarray
    overlap: np.ndarray


def group_starts(ordered: np.ndarray) -> np.ndarray:
    """Where the runs of equal values begin."""
    changes = np.ones(len(ordered), bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(changes)


def exact(keys: np.ndarray, alive: np.ndarray, folder: Path) -> Twins:
    """Every alive row but the first of each group with one key; sorted a piece at a time."""
    both = scratch(folder, "both", U64, len(keys))
    piece = np.zeros(len(keys), np.uint8)
    count = pieces(len(keys))
    for part in in_parts(len(keys)):
        both[part] = keys[part, 0] ^ (keys[part, 1] * U64(0x9E3779B97F4A7C15))
        piece[part] = (both[part] >> U64(56)) // U64(256 // count)
    later, earlier = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number in range(count):
        rows = np.flatnonzero(alive & (piece == number))
        if not len(rows):
            continue
        own = both[rows]
        order = np.argsort(own, kind="stable")
        starts = group_starts(own[order])
        first = np.repeat(rows[order[starts]], np.diff([*starts, len(rows)]))
        rows = rows[order]
        repeats = rows != first
        later.append(rows[repeats])
        earlier.append(first[repeats])
    twins = np.concatenate(later)
    return Twins(twins, np.concatenate(earlier), np.ones(len(twins)))


def near(
    folder: Path,
    blocks: list[int],
    bases: np.ndarray,
    alive: np.ndarray,
    *,
    bands: int,
    threshold: float,
    pool: Pool,
) -> Twins:
    """All found pairs of alive rows whose sets of shingles have a Jaccard index of at least `threshold`.

    Candidates come from the LSH bands; each is verified on the sets themselves, so no pair is below the
    threshold.
    """
    np.save(folder / "alive.npy", alive)
    known = np.zeros(0, U64)
    tasks = [(folder, blocks, band) for band in range(bands)]
    for found in pool.map(band_pairs, tasks):
        known = np.union1d(known, found)
    if not len(known):
        nothing = np.zeros(0, np.int64)
        return Twins(nothing, nothing, np.zeros(0))
    _join_shingles(folder, blocks, bases)
    step = 20_000
    later, earlier, overlap = [], [], []
    for start, jaccard in zip(
        range(0, len(known), step),
        pool.map(verify, ((folder, known[i : i + step]) for i in range(0, len(known), step))),
        strict=True,
    ):
        pairs = known[start : start + step]
        good = jaccard >= threshold
        later.append((pairs[good] >> U64(32)).astype(np.int64))
        earlier.append((pairs[good] & U64(0xFFFFFFFF)).astype(np.int64))
        overlap.append(jaccard[good])
    return Twins(np.concatenate(later), np.concatenate(earlier), np.concatenate(overlap))


def band_pairs(task: tuple[Path, list[int], int]) -> np.ndarray:
    """Candidates of one band, as later << 32 | earlier; a piece of the buckets at a time."""
    folder, blocks, band = task
    alive = np.load(folder / "alive.npy", mmap_mode="r")
    assert len(alive) < 1 << 32
    count = pieces(len(alive))
    pairs = [np.zeros(0, U64)]
    for number in range(count):
        at, buckets, rows = 0, [np.zeros(0, U64)], [np.zeros(0, U64)]
        for block in blocks:
            own = np.load(folder / f"bands-{block}.npy", mmap_mode="r")[band]
            inside = np.flatnonzero(((own >> U64(56)) // U64(256 // count) == number) & alive[at : at + len(own)])
            buckets.append(own[inside])
            rows.append((inside + at).astype(U64))
            at += len(own)
        pairs.append(_candidates(np.concatenate(buckets), np.concatenate(rows)))
    return np.unique(np.concatenate(pairs))


def _candidates(buckets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs of rows that share a bucket."""
    order = np.argsort(buckets, kind="stable")  # rows of a bucket stay in their order
    ordered, rows = buckets[order], rows[order]
    starts = group_starts(ordered)
    sizes = np.diff([*starts, len(rows)])
    pairs: list[np.ndarray] = [np.zeros(0, U64)]
    for size in np.unique(sizes[(sizes > 1) & (sizes <= _ALL_PAIRS)]):
        at = starts[sizes == size]
        for i in range(size):
            for j in range(i + 1, size):
                pairs.append((rows[at + j] << U64(32)) | rows[at + i])
    for start, size in zip(starts[sizes > _ALL_PAIRS], sizes[sizes > _ALL_PAIRS], strict=True):
        group = rows[start : start + size]
        pairs.append((group[1:] << U64(32)) | group[0])
        pairs.append((group[2:] << U64(32)) | group[1:-1])
    return np.concatenate(pairs)


def _join_shingles(folder: Path, blocks: list[int], bases: np.ndarray) -> None:
    """All sets in one file `shingles.bin`; where each row's begins and ends, in entries: `shingle_bounds.npy`."""
    bounds = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / "shingle_bounds.npy", "w+", np.int64, (int(bases[-1]) + 1,)
    )
    at = 0
    with (folder / "shingles.bin").open("wb") as file:
        for number, block in enumerate(blocks):
            own = np.load(folder / f"bounds-{block}.npy")
            bounds[bases[number] : bases[number + 1] + 1] = own + at
            hashes = np.load(folder / f"shingles-{block}.npy")
            file.write(hashes.tobytes())
            at += len(hashes)
            (folder / f"shingles-{block}.npy").unlink()
    bounds.flush()


def verify(task: tuple[Path, np.ndarray]) -> np.ndarray:
    """The Jaccard index of each pair (later << 32 | earlier) of shingle sets."""
    folder, pairs = task
    bounds = np.load(folder / "shingle_bounds.npy", mmap_mode="r")
    hashes = np.memmap(folder / "shingles.bin", np.uint32, "r")
    a, b = (pairs >> U64(32)).astype(np.int64), (pairs & U64(0xFFFFFFFF)).astype(np.int64)
    result = np.zeros(len(pairs))
    sizes = (bounds[a + 1] - bounds[a]) + (bounds[b + 1] - bounds[b])
    start = 0
    while start < len(pairs):  # so many pairs at once that their sets stay below a few dozen megabytes
        stop = start + max(1, int(np.searchsorted(np.cumsum(sizes[start:]), 2_000_000, "right")))
        part = slice(start, stop)
        keys = np.concatenate([_keyed(hashes, bounds, rows[part]) for rows in (a, b)])
        keys.sort()
        shared = keys[1:][keys[1:] == keys[:-1]] >> U64(32)
        both = np.bincount(shared.astype(np.int64), minlength=stop - start)
        result[part] = both / np.maximum(sizes[part] - both, 1)
        start = stop
    return result


def _keyed(hashes: np.ndarray, bounds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    starts, counts = bounds[rows], bounds[rows + 1] - bounds[rows]
    pair = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    inside = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (pair.astype(U64) << U64(32)) | hashes[starts[pair] + inside].astype(U64)


def greedy(twins: Twins, rows: int, removable: np.ndarray) -> Twins:
    """One entry for each row to take out: a removable row with an earlier twin that stays itself."""
    order = np.lexsort((twins.earlier, twins.later))
    out = np.zeros(rows, bool)
    chosen = []
    for i in order.tolist():
        later = twins.later[i]
        if removable[later] and not out[later] and not out[twins.earlier[i]]:
            out[later] = True
            chosen.append(i)
    return Twins(twins.later[chosen], twins.earlier[chosen], twins.overlap[chosen])


def components(twins: Twins, rows: int) -> np.ndarray:
    """The first row of each row's connected component."""
    root = np.arange(rows)

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = int(root[i])
        return i

    for a, b in zip(twins.later.tolist(), twins.earlier.tolist(), strict=True):
        a, b = find(a), find(b)
        root[max(a, b)] = min(a, b)
    while True:  # flatten
        flat = root[root]
        if (flat == root).all():
            return flat
        root = flat


class Shared(NamedTuple):
    """Evidence of contamination: training row `rows[i]` has n-gram `grams[i]` in common with row `others[i]`.
    `boilerplate` are n-grams that too many rows have."""

    rows: np.ndarray
    others: np.ndarray
    grams: np.ndarray
    boilerplate: np.ndarray


def contaminated(
    folder: Path,
    blocks: list[int],
    bases: np.ndarray,
    side: np.ndarray,
    *,
    ngram: int,
    boilerplate: int,
    pool: Pool,
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, for each an evaluation row) that share an n-gram which at most `boilerplate` rows have,
    and of which boilerplate n-grams cover less than half.

    `side` is 0 for rows out of the game, 1 for evaluation, 2 for training.
    """
    np.save(folder / "side.npy", side)
    np.save(folder / "bases.npy", bases)
    total = sum(np.load(folder / f"ngrams-{b}.at.npy")[-1] for b in blocks)
    together = max(1, int(PARTITIONS * _TASK_ENTRIES // max(total, 1)))
    starts = range(0, PARTITIONS, together)
    tasks = [(folder, blocks, p, min(p + together, PARTITIONS), boilerplate) for p in starts]
    found = list(pool.map(shared_ngrams, tasks))
    rows, others, grams, common = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if len(common):
        common.sort()
        order = np.argsort(rows, kind="stable")
        rows, others, grams = rows[order], others[order], grams[order]
        number = np.searchsorted(bases, rows, "right") - 1
        groups = group_starts(number)
        checks = (
            (folder, blocks[number[a]], ngram, rows[a:b] - bases[number[a]], grams[a:b], common)
            for a, b in zip(groups, [*groups[1:], len(rows)], strict=True)
        )
        good = np.concatenate([np.zeros(0, bool), *pool.map(confirm, checks)])
        rows, others = rows[good], others[good]
    row, first = np.unique(rows, return_index=True)
    return row, others[first]


def shared_ngrams(task: tuple[Path, list[int], int, int, int]) -> Shared:
    """What is shared among the n-grams in partitions [first, last)."""
    folder, blocks, first, last, boilerplate = task
    side = np.load(folder / "side.npy", mmap_mode="r")
    bases = np.load(folder / "bases.npy")
    hashes, owners = [np.zeros(0, U64)], [np.zeros(0, np.int64)]
    for number, block in enumerate(blocks):
        at = np.load(folder / f"ngrams-{block}.at.npy")
        part = slice(at[first], at[last])
        hashes.append(np.load(folder / f"ngrams-{block}.hash.npy", mmap_mode="r")[part])
        own = np.load(folder / f"ngrams-{block}.row.npy", mmap_mode="r")[part]
        owners.append(own.astype(np.int64) + bases[number])
    grams, rows = np.concatenate(hashes), np.concatenate(owners)
    of = side[rows]
    evaluation = np.unique(grams[of == 1])
    nothing = np.zeros(0, np.int64)
    if not len(evaluation):
        return Shared(nothing, nothing, np.zeros(0, U64), np.zeros(0, U64))
    place = np.searchsorted(evaluation, grams)
    place[place == len(evaluation)] = 0
    hit = (evaluation[place] == grams) & (of > 0)
    grams, rows, of = place[hit], rows[hit], of[hit]
    order = np.lexsort((rows, grams))
    grams, rows, of = grams[order], rows[order], of[order]
    fresh = np.ones(len(grams), bool)
    fresh[1:] = (grams[1:] != grams[:-1]) | (rows[1:] != rows[:-1])
    grams, rows, of = grams[fresh], rows[fresh], of[fresh]
    frequency = np.bincount(grams, minlength=len(evaluation))
    example = np.zeros(len(evaluation), np.int64)
    example[grams[of == 1]] = rows[of == 1]
    bad = (of == 2) & (frequency[grams] <= boilerplate)
    common = evaluation[frequency > boilerplate]
    return Shared(rows[bad], example[grams[bad]], evaluation[grams[bad]], common)


def confirm(task: tuple[Path, int, int, np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """For each (row, n-gram) of a block: whether boilerplate covers less than half of the n-gram's words.

    An n-gram at the border of boilerplate ("… the following text: Paris") is rare and still says nothing.
    """
    folder, block, ngram, rows, grams, common = task
    all_rows, _ = load_rows(folder, block)
    good = np.zeros(len(rows), bool)
    starts = group_starts(rows)
    for a, b in zip(starts, [*starts[1:], len(rows)], strict=True):
        prompt, answer = row_texts(all_rows[rows[a]])
        hashes, _ = text.ngrams(text.words([f"{prompt}\n{answer}"]), ngram, short=False)
        covered = np.zeros(len(hashes) + ngram, np.int64)
        for i in np.flatnonzero(np.isin(hashes, common)):
            covered[i : i + ngram] = 1
        words = np.concatenate([[0], np.cumsum(covered)])
        fresh = ngram - (words[ngram:] - words[:-ngram])[: len(hashes)]
        good[a:b] = np.isin(grams[a:b], hashes[2 * fresh > ngram])
    return good
