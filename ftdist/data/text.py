"""Texts as numbers, many at once: words, n-grams, MinHash bands, scripts. All numpy over code points, no
Python loop over words, because this is what a million rows spend their time in.

A word is a run of letters, digits and marks (ZWNJ inside a Persian word included), compared without case. A
letter of a script that is written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) is a word by
itself.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

U64 = np.uint64
_ROW_END = 0  # texts hold no NUL: cleaning removed it

# (first, last, name) of the scripts that the report counts; everything else with a letter is "Other"
_SCRIPTS = (
    (0x0041, 0x024F, "Latin"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0530, 0x058F, "Armenian"),
    (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x06FF, "Arabic"),
    (0x0750, 0x077F, "Arabic"),
    (0x08A0, 0x08FF, "Arabic"),
    (0xFB50, 0xFDFF, "Arabic"),
    (0xFE70, 0xFEFC, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"),
    (0x0A00, 0x0A7F, "Gurmukhi"),
    (0x0A80, 0x0AFF, "Gujarati"),
    (0x0B80, 0x0BFF, "Tamil"),
    (0x0C00, 0x0C7F, "Telugu"),
    (0x0C80, 0x0CFF, "Kannada"),
    (0x0D00, 0x0D7F, "Malayalam"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x0E80, 0x0EFF, "Lao"),
    (0x1000, 0x109F, "Myanmar"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"),
    (0xAC00, 0xD7AF, "Hangul"),
    (0x1200, 0x137F, "Ethiopic"),
    (0x1780, 0x17FF, "Khmer"),
    (0x3040, 0x309F, "Hiragana"),
    (0x30A0, 0x30FF, "Katakana"),
    (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"),
    (0xF900, 0xFAFF, "Han"),
    (0x20000, 0x323AF, "Han"),
)
SCRIPTS = ("none", "Other", *dict.fromkeys(name for _, _, name in _SCRIPTS))
_NO_SPACES = {"Thai", "Lao", "Myanmar", "Khmer", "Hiragana", "Katakana", "Han"}


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """(class, script) of every code point. class: 0 separates, 1 part of a word, 2 a word by itself."""
    last = 0x323B0  # beyond it: unassigned, tags, private use
    category = np.array([unicodedata.category(chr(c))[0] for c in range(last)])
    in_word = np.isin(category, ["L", "N", "M"])
    kind = np.zeros(0x110000, np.uint8)
    kind[:last][in_word] = 1
    kind[0x5F] = 1  # underscore: names in code
    kind[0x200C] = 1  # ZWNJ
    script = np.zeros(0x110000, np.uint8)
    script[:last][category == "L"] = 1
    for first, end, name in _SCRIPTS:
        span = script[first : end + 1]
        span[span > 0] = SCRIPTS.index(name)
        if name in _NO_SPACES:
            part = kind[first : end + 1]
            part[part > 0] = 2
    return kind, script


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit moves every output bit."""
    x = x ^ (x >> U64(30))
    x *= U64(0xBF58476D1CE4E5B9)
    x ^= x >> U64(27)
    x *= U64(0x94D049BB133111EB)
    x ^= x >> U64(31)
    return x


_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)


@lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    """base**0, base**1, … modulo 2**64."""
    powers = np.full(count, base, U64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


@dataclass(frozen=True)
class Words:
    """Words of several texts: `hashes` (u64) in order, text t's are hashes[bounds[t]:bounds[t+1]];
    `scripts` counts letters, shape (texts, len(SCRIPTS))."""

    hashes: np.ndarray
    bounds: np.ndarray
    scripts: np.ndarray


def words(texts: list[str]) -> Words:
    """The words of cleaned texts (no NUL in them)."""
    joined = "".join(f"{text}\x00" for text in texts)
    codes = np.frombuffer(joined.casefold().encode("utf-32-le"), np.uint32)
    kind_table, script_table = _tables()
    kind = kind_table[codes]
    row_ends = np.flatnonzero(codes == _ROW_END)
    assert len(row_ends) == len(texts), "a text held a NUL"

    inside = kind > 0
    alone = kind == 2
    starts_here = inside.copy()
    starts_here[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
    starts = np.flatnonzero(starts_here)
    ends_here = inside.copy()
    ends_here[:-1] &= ~inside[1:] | alone[1:] | alone[:-1]
    ends = np.flatnonzero(ends_here) + 1

    size = 1 << max(10, (len(codes) + 1).bit_length())  # few sizes, so that the powers are reused
    powers = _powers(_BASE, size)[: len(codes)]
    inverse = _powers(_INVERSE, size)
    sums = np.zeros(len(codes) + 1, U64)
    np.cumsum((codes.astype(U64) + U64(1)) * U64(0xD6E8FEB86659FD93) * powers, out=sums[1:])
    hashes = _mix((sums[ends] - sums[starts]) * inverse[starts])
    bounds = np.zeros(len(texts) + 1, np.int64)
    bounds[1:] = np.searchsorted(starts, row_ends)

    script = script_table[codes].astype(np.int64)
    row = np.zeros(len(codes), np.int64)
    row[row_ends[:-1] + 1] = 1
    np.cumsum(row, out=row)
    counts = np.bincount(row * len(SCRIPTS) + script, minlength=len(texts) * len(SCRIPTS))
    return Words(hashes, bounds, counts.reshape(len(texts), len(SCRIPTS)))


def ngrams(found: Words, n: int, *, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """(hashes u64, text index int32) of all word n-grams. `short`: a text with 1 … n-1 words gives one
    n-gram of all its words, else none."""
    hashes, bounds = found.hashes, found.bounds
    counts = np.diff(bounds)
    row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    coefficients = _powers(0xC2B2AE3D27D4EB4F, 64 if n <= 64 else n)
    if len(hashes) >= n:
        size = len(hashes) - n + 1
        total = np.zeros(size, U64)
        for k in range(n):
            total += hashes[k : k + size] * coefficients[k]
        valid = row[:size] == row[n - 1 :]
        result, owner = _mix(total[valid]), row[:size][valid]
    else:
        result, owner = np.zeros(0, U64), np.zeros(0, np.int32)
    if short:
        few = np.flatnonzero((counts > 0) & (counts < n))
        if len(few):
            extra = [np.add.reduce(hashes[bounds[t] : bounds[t + 1]] * coefficients[: counts[t]]) for t in few]
            result = np.concatenate([result, _mix(np.array(extra, U64))])
            owner = np.concatenate([owner, few.astype(np.int32)])
            order = np.argsort(owner, kind="stable")
            result, owner = result[order], owner[order]
    return result, owner


@dataclass(frozen=True)
class Shingles:
    """Sets of 32-bit shingle hashes: text t's set, sorted, is hashes[bounds[t]:bounds[t+1]]; `repeated`
    is the share of a text's shingles that occurred before in it."""

    hashes: np.ndarray
    bounds: np.ndarray
    repeated: np.ndarray


def shingles(found: Words, n: int) -> Shingles:
    """The set of word n-grams of every text."""
    hashes, owner = ngrams(found, n, short=True)
    texts = len(found.bounds) - 1
    keys = (owner.astype(U64) << U64(32)) | (hashes >> U64(32))
    keys.sort()
    all_counts = np.bincount(owner, minlength=texts)
    if len(keys):
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    owner = (keys >> U64(32)).astype(np.int64)
    counts = np.bincount(owner, minlength=texts)
    bounds = np.zeros(texts + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    repeated = 1 - counts / np.maximum(all_counts, 1)
    repeated[all_counts == 0] = 0
    return Shingles((keys & U64(0xFFFFFFFF)).astype(np.uint32), bounds, repeated)


@lru_cache(maxsize=4)
def permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of `count` bijections h → a·h + b modulo 2**32 of already mixed hashes; fixed for ever: the
    seed is ours."""
    random = np.random.Generator(np.random.PCG64(20240229))
    a = random.integers(0, 1 << 32, count, dtype=np.uint32) | np.uint32(1)
    return a, random.integers(0, 1 << 32, count, dtype=np.uint32)


def signatures(sets: Shingles, count: int) -> np.ndarray:
    """MinHash signatures (Broder 1997), shape (count, texts), uint32. A text without a word has all ones."""
    texts = len(sets.bounds) - 1
    result = np.full((count, texts), 0xFFFFFFFF, np.uint32)
    filled = np.flatnonzero(np.diff(sets.bounds))
    if len(filled):
        a, b = permutations(count)
        starts = sets.bounds[:-1][filled]
        for k in range(count):
            result[k, filled] = np.minimum.reduceat(sets.hashes * a[k] + b[k], starts)
    return result


def bands(signature: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Locality-sensitive bucket of each text in each band, shape (count, texts), uint64. Uses count·rows
    permutations."""
    coefficients = _powers(0xC2B2AE3D27D4EB4F, 64 if rows <= 64 else rows)
    result = np.zeros((count, signature.shape[1]), U64)
    for k in range(count):
        for r in range(rows):
            result[k] += (signature[k * rows + r].astype(U64) + U64(1)) * coefficients[r + 1]
    return _mix(result)
