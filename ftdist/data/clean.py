"""The first pass over the data, a block at a time: parse, convert, filter, and note what the decisions
need."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data import text as texts
from ftdist.data.column import Columns
from ftdist.data.formats import Reject, convert, ignored
from ftdist.data.reading import BadRow, Block, parse
from ftdist.data.sources import KINDS, Source

U64 = np.uint64
PARTITIONS = 256
_TEXT_BATCH = 400_000  # characters at once: the arrays of this many stay in the cache

# why a row that can be used is not: its status
KEPT = 0
FILTERS = ("too_short", "too_long", "repetition", "markup", "script")  # status 1 …
_TAGS = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|&(?:[a-zA-Z]{2,8}|#\d{1,6});")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True)
class Rules:
    """What the first pass is to do."""

    task: str
    sources: tuple[Source, ...]
    seed: int
    min_answer: int | None
    max_answer: int | None
    max_repetition: float | None
    max_markup: float | None
    scripts: tuple[str, ...] | None
    min_script_share: float
    shingle: int | None  # words a shingle; None = near-duplicates are not looked for
    bands: int
    band_rows: int
    ngram: int | None  # words an n-gram; None = no decontamination


@dataclass(frozen=True)
class Cleaned:
    """A block after the first pass. Arrays have one entry a row that could be read, and go to files when the block
    has arrived (`columns`); the rows lie in rows-N.pkl."""

    block: int
    source: int
    file: int
    seen: int
    rejects: list[dict[str, Any]]
    lines: np.ndarray  # uint32
    status: np.ndarray  # uint8
    keys: np.ndarray  # (rows, 2) uint64: hash of the content
    ids: np.ndarray  # uint64: hash of the row's own id, 0 without one
    scripts: np.ndarray
    ignored: tuple[str, ...]  # columns of the first row that nothing reads
    first: tuple[str, ...]  # all columns of the first row
    renamed: tuple[str, ...]  # columns that data.columns names and some row has
    count: int
    reject_reasons: list[str] = field(default_factory=list)


def row_texts(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row without system prompts: what people and models said."""
    if "text" in row:
        return "", row["text"]
    if "chosen" in row:
        return _said(row["prompt"]), _said(row["chosen"]) + "\n" + _said(row["rejected"])
    return _said(row["messages"][: row["start"]]), _said(row["messages"][row["start"] :])


def _said(messages: list[dict[str, Any]]) -> str:
    return "\n".join(
        m["content"] + (json.dumps(m["tool_calls"], ensure_ascii=False) if "tool_calls" in m else "")
        for m in messages
        if m["role"] != "system"
    )


def content_key(row: dict[str, Any]) -> bytes:
    """16 bytes: equal for rows that differ only in white space (roles and system prompts count)."""
    if "text" in row:
        parts = [row["text"]]
    else:
        messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]
        parts = []
        for m in messages:
            parts += [m["role"], m["content"]]
            if "tool_calls" in m:
                parts.append(json.dumps(m["tool_calls"], sort_keys=True))
    whole = "".join([f"{' '.join(part.split())}\x1e" for part in parts])
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()


def reject_line(source: Source, file: int, line: int, error: Reject, raw: Any) -> dict[str, Any]:
    """A line of rejects.jsonl."""
    row: Any = raw
    if isinstance(raw, BadRow):
        row = str(raw)
    return {
        "file": str(source.files[file]),
        "line": line,
        "reason": error.reason,
        "detail": error.detail,
        "row": row,
    }


# str.splitlines and other readers break a line at these too
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def json_line(value: Any) -> str:
    """A line of a .jsonl file, one line for every reader, in valid UTF-8."""
    line = json.dumps(value, ensure_ascii=False, default=str).translate(_LINE_ENDS)
    return line.encode("utf-8", "replace").decode() + "\n"


def clean_block(task: tuple[Rules, Path, Block]) -> Cleaned:
    """First pass over one block; the rows and what the duplicates' search needs go to files in the work
    folder."""
    rules, folder, block = task
    source = rules.sources[block.source]
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    said: list[tuple[str, str]] = []
    rejects: list[dict[str, Any]] = []
    unread: tuple[str, ...] | None = None
    first: tuple[str, ...] = ()
    renamed: set[str] = set()
    seen = 0
    for line, raw in parse(block):
        seen += 1
        if source.columns and isinstance(raw, dict):
            renamed.update(name for name in source.columns.values() if name in raw)
        if unread is None and isinstance(raw, dict):
            first = tuple(map(str, raw))
            unread = tuple(ignored(raw, format=source.format, columns=source.columns))
        try:
            if isinstance(raw, BadRow):
                raise Reject(raw.reason, raw.detail)
            row = convert(raw, format=source.format, columns=source.columns)
            if ("chosen" in row) != (rules.task == "dpo") and source.kind != "against":
                if rules.task == "sft":
                    raise Reject(
                        "not for this task", "has chosen and rejected: use task=dpo, or see data.format=preference"
                    )
                raise Reject("not for this task", "preference data need chosen and rejected; for answers use task=sft")
        except Reject as error:
            rejects.append(reject_line(source, block.file, line, error, raw))
            continue
        rows.append(row)
        lines.append(line)
        said.append(row_texts(row))

    count = len(rows)
    keys = np.frombuffer(b"".join(map(content_key, rows)), U64).reshape(count, 2) if rows else np.zeros((0, 2), U64)
    ids = np.zeros(count, U64)
    for i, row in enumerate(rows):
        if row["id"] is not None:
            digest = hashlib.blake2b(row["id"].encode("utf-8", "replace"), digest_size=8).digest()
            ids[i] = int.from_bytes(digest, "little")
    repeated, scripts = _measure(rules, folder, block.index, said)
    status = np.zeros(count, np.uint8)
    if source.kind == "train":
        status = _filter(rules, said, repeated, scripts)
    with (folder / f"rows-{block.index}.pkl").open("wb") as file:
        pickle.dump((rows, lines), file, protocol=5)
    return Cleaned(
        block.index,
        block.source,
        block.file,
        seen,
        rejects,
        np.array(lines, np.uint32),
        status,
        keys,
        ids,
        scripts.sum(0) if count else np.zeros(len(texts.SCRIPTS), np.int64),
        unread or (),
        first,
        tuple(renamed),
        count,
    )


def columns(folder: Path) -> Columns:
    """For the numbers of all rows."""
    return Columns(folder, "rows", lines=np.uint32, status=np.uint8, keys=(U64, 2), ids=U64)


def _measure(rules: Rules, folder: Path, index: int, said: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(share of repeated shingles, letters by script) a row; writes shingles, band hashes and n-grams of
    the block."""
    sets, bounds, buckets, repeated, scripts = [], [np.zeros(1, np.int64)], [], [], []
    grams, owners = [], []
    start, at = 0, 0
    while start < len(said):
        stop, size = start, 0
        while stop < len(said) and (size == 0 or size + len(said[stop][0]) + len(said[stop][1]) < _TEXT_BATCH):
            size += len(said[stop][0]) + len(said[stop][1]) + 2
            stop += 1
        found = texts.words([f"{a}\n{b}" for a, b in said[start:stop]])
        scripts.append(found.scripts)
        shingles = texts.shingles(found, rules.shingle or 5)
        repeated.append(shingles.repeated)
        if rules.shingle:
            signature = texts.signatures(shingles, rules.bands * rules.band_rows)
            buckets.append(texts.bands(signature, rules.bands, rules.band_rows))
            sets.append(shingles.hashes)
            bounds.append(shingles.bounds[1:] + at)
            at += len(shingles.hashes)
        if rules.ngram:
            hashes, owner = texts.ngrams(found, rules.ngram, short=False)
            grams.append(hashes)
            owners.append(owner + start)
        start = stop
    if rules.shingle:
        np.save(folder / f"shingles-{index}.npy", np.concatenate(sets or [np.zeros(0, np.uint32)]))
        np.save(folder / f"bounds-{index}.npy", np.concatenate(bounds))
        np.save(
            folder / f"bands-{index}.npy",
            np.concatenate(buckets or [np.zeros((rules.bands, 0), U64)], axis=1),
        )
    if rules.ngram:
        _write_partitions(
            folder / f"ngrams-{index}",
            np.concatenate(grams or [np.zeros(0, U64)]),
            np.concatenate(owners or [np.zeros(0, np.int64)]).astype(np.uint32),
        )
    empty = np.zeros((0, len(texts.SCRIPTS)), np.int64)
    return np.concatenate(repeated or [np.zeros(0)]), np.concatenate(scripts or [empty])


def _write_partitions(stem: Path, hashes: np.ndarray, owners: np.ndarray) -> None:
    """n-grams grouped by the top byte of their hash, so that equal ones of all blocks can be brought
    together."""
    part = (hashes >> U64(56)).astype(np.uint8)
    order = np.argsort(part, kind="stable")
    counts = np.bincount(part, minlength=PARTITIONS)
    np.save(stem.with_suffix(".hash.npy"), hashes[order])
    np.save(stem.with_suffix(".row.npy"), owners[order])
    np.save(stem.with_suffix(".at.npy"), np.concatenate([[0], np.cumsum(counts)]))


def _filter(rules: Rules, said: list[tuple[str, str]], repeated: np.ndarray, scripts: np.ndarray) -> np.ndarray:
    status = np.zeros(len(said), np.uint8)

    def drop(reason: str, which: np.ndarray) -> None:
        status[(status == KEPT) & which] = 1 + FILTERS.index(reason)

    answers = np.array([len(answer.strip()) for _, answer in said], np.int64)
    if rules.min_answer is not None:
        drop("too_short", answers < rules.min_answer)
    if rules.max_answer is not None:
        drop("too_long", answers > rules.max_answer)
    if rules.max_repetition is not None:
        drop("repetition", repeated > rules.max_repetition)
    if rules.max_markup is not None:
        drop("markup", np.array([_markup(answer) > rules.max_markup for _, answer in said], bool))
    if rules.scripts is not None:
        wanted = [texts.SCRIPTS.index(name) for name in rules.scripts]
        letters = scripts[:, 1:].sum(1)
        share = scripts[:, wanted].sum(1) / np.maximum(letters, 1)
        drop("script", (letters > 0) & (share < rules.min_script_share))
    return status


def _markup(answer: str) -> float:
    """Share of an answer's characters, code left aside, that are HTML tags and entities."""
    prose = _CODE.sub("", answer)
    return sum(len(m.group()) for m in _TAGS.finditer(prose)) / max(len(prose), 1)


def load_rows(folder: Path, block: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a block and their lines in the file."""
    with (folder / f"rows-{block}.pkl").open("rb") as file:
        return pickle.load(file)  # type: ignore[no-any-return]  # our own file, in our own folder


def kind_of(source: Source) -> int:
    return KINDS.index(source.kind)
