"""The second pass: the rows that stay → token ids, a block at a time; then → Arrow, a shard at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data import arrow
from ftdist.data.clean import load_rows, reject_line
from ftdist.data.formats import Reject
from ftdist.data.sources import Source
from ftdist.data.template import Unsegmentable
from ftdist.data.tokens import Laid, lay_out, load_frozen, pair_tokens, tokenize
from ftdist.errors import UserError

TRAIN, VALIDATION = 1, 2
_BATCH = 256
IGNORED = -100


@dataclass(frozen=True)
class Laying:
    """How rows become tokens."""

    task: str
    mask: str
    max_length: int
    overlong: str


@dataclass(frozen=True)
class Encoded:
    """A block's sequences, whose ids and marks lie in ids-N.bin (int32) and marks-N.bin (uint8).

    sft: a sequence is a text, mark 1 = trained on. dpo: three parts follow one another, `parts` (sequences, 3) long.
    """

    block: int
    lengths: np.ndarray  # int32
    rows: np.ndarray  # int32: the row in the block
    side: np.ndarray  # uint8: TRAIN or VALIDATION
    trained: np.ndarray  # int32: supervised tokens
    parts: np.ndarray
    rejects: list[dict[str, Any]]
    overlong: dict[str, int]  # truncated, dropped, split, cut_answers, windows_without_answer
    dropped: np.ndarray  # rows left out because they are too long
    validation: str  # lines of validation_rows.jsonl


def encode_block(task: tuple[Path, Laying, Source, int, int, np.ndarray]) -> Encoded:
    """Tokens of the rows of a block whose entry in the last array says TRAIN or VALIDATION."""
    folder, laying, source, file, block, wanted = task
    frozen = load_frozen(folder / "tokenizer")
    rows, lines = load_rows(folder, block)
    picked = [i for i in range(len(rows)) if wanted[i]]
    counts = dict.fromkeys(("truncated", "dropped", "split", "cut_answers", "windows_without_answer"), 0)
    rejects: list[dict[str, Any]] = []
    lengths: list[int] = []
    owners: list[int] = []
    trained: list[int] = []
    parts: list[tuple[int, int, int]] = []
    dropped: list[int] = []
    validation: list[str] = []

    def refuse(i: int, error: Reject) -> None:
        rejects.append(reject_line(source, file, lines[i], error, rows[i]))

    ids_file = (folder / f"ids-{block}.bin").open("wb")
    marks_file = (folder / f"marks-{block}.bin").open("wb")
    with ids_file, marks_file:
        for start in range(0, len(picked), _BATCH):
            group = picked[start : start + _BATCH]
            sequences: list[tuple[int, np.ndarray, np.ndarray, tuple[int, int, int]]]
            if laying.task == "dpo":
                sequences = _pairs(group, rows, lines, source, file, frozen, laying, counts, dropped, refuse)
            else:
                sequences = _texts(group, rows, lines, source, file, frozen, laying, counts, dropped, refuse)
            seen = set()
            for i, ids, marks, three in sequences:
                ids_file.write(ids.tobytes())
                marks_file.write(marks.astype(np.uint8).tobytes())
                lengths.append(len(ids))
                owners.append(i)
                trained.append(int(marks.sum()))
                parts.append(three)
                if wanted[i] == VALIDATION and i not in seen:
                    seen.add(i)
                    validation.append(_validation_line(rows[i], source, file, lines[i], frozen))
    return Encoded(
        block,
        np.array(lengths, np.int32),
        np.array(owners, np.int32),
        wanted[np.array(owners, np.int64)] if owners else np.zeros(0, np.uint8),
        np.array(trained, np.int32),
        np.array(parts, np.int32).reshape(-1, 3),
        rejects,
        counts,
        np.array(dropped, np.int32),
        "".join(validation),
    )


def _where(source: Source, file: int, line: int) -> str:
    return f"{source.files[file]}, line {line}"


def _texts(group, rows, lines, source, file, frozen, laying, counts, dropped, refuse):  # type: ignore[no-untyped-def]
    laid: list[Laid] = []
    owners: list[int] = []
    for i in group:
        try:
            laid.append(lay_out(rows[i], frozen.template, laying.mask))
            owners.append(i)
        except Reject as error:
            refuse(i, error)
        except Unsegmentable as error:
            raise UserError(
                f"data.chat_template: the template can't be divided exactly into turns ({error}; first seen at "
                f"{_where(source, file, lines[i])}); use one with {{% generation %}} tags, or data.mask=all"
            ) from None
    result = []
    for i, row, (ids, trained) in zip(owners, laid, tokenize(laid, frozen), strict=True):
        if not trained.any():
            refuse(i, Reject("no supervised token", f"none under data.mask={laying.mask}"))
            continue
        windows = [(ids, trained)]
        if len(ids) > laying.max_length:
            if laying.overlong == "drop":
                counts["dropped"] += 1
                dropped.append(i)
                continue
            if laying.overlong == "truncate":
                counts["truncated"] += 1
                counts["cut_answers"] += bool(trained[laying.max_length :].any())
                windows = [(ids[: laying.max_length], trained[: laying.max_length])]
                if not windows[0][1].any():
                    refuse(i, Reject("no supervised token", f"the answer begins after {laying.max_length} tokens"))
                    continue
            else:
                counts["split"] += 1
                windows = []
                for at in range(0, len(ids), laying.max_length):
                    part = trained[at : at + laying.max_length].copy()
                    part[0] = False
                    if part.any():
                        windows.append((ids[at : at + laying.max_length], part))
                    else:
                        counts["windows_without_answer"] += 1
                if not windows:
                    refuse(i, Reject("no supervised token", "none left after splitting"))
                    continue
        result += [(i, ids, trained, (0, 0, 0)) for ids, trained in windows]
    return result


def _pairs(group, rows, lines, source, file, frozen, laying, counts, dropped, refuse):  # type: ignore[no-untyped-def]
    result = []
    for i in group:
        try:
            prompt, chosen, rejected = pair_tokens(rows[i], frozen)
        except Reject as error:
            refuse(i, error)
            continue
        except Unsegmentable as error:
            raise UserError(
                f"data.chat_template: the template can't be divided exactly into turns ({error}; first seen at "
                f"{_where(source, file, lines[i])}); use one with {{% generation %}} tags"
            ) from None
        if not len(chosen) or not len(rejected) or np.array_equal(chosen, rejected):
            refuse(i, Reject("identical chosen and rejected", "as tokens"))
            continue
        room = laying.max_length - len(prompt)
        if len(chosen) > room or len(rejected) > room:
            if laying.overlong != "truncate":
                counts["dropped"] += 1
                dropped.append(i)
                continue
            if room < 1 or np.array_equal(chosen[:room], rejected[:room]):
                refuse(i, Reject("no supervised token", f"nothing to tell apart within {laying.max_length} tokens"))
                continue
            counts["truncated"] += 1
            counts["cut_answers"] += 1
            chosen, rejected = chosen[:room], rejected[:room]
        ids = np.concatenate([prompt, chosen, rejected])
        marks = np.ones(len(ids), bool)
        marks[: len(prompt)] = False
        result.append((i, ids, marks, (len(prompt), len(chosen), len(rejected))))
    return result


def _validation_line(row: dict[str, Any], source: Source, file: int, line: int, frozen: Any) -> str:
    """A held-out row before templating, with its last answer apart."""
    if "text" in row:
        messages, prompt, reference = [], "", row["text"]
    else:
        messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
        prompt = frozen.template.render(messages[:-1], row.get("tools"), prompt=True)
        reference = messages[-1]["content"]
    return (
        json.dumps(
            {
                "messages": messages,
                "prompt": prompt,
                "reference": reference,
                "source": source.name,
                "id": row["id"] if row["id"] is not None else f"{source.files[file].name}:{line}",
            },
            ensure_ascii=False,
        )
        + "\n"
    )


# --- tokens → Arrow ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """The sequences of one Arrow file, in order, and how many of them each of its rows holds."""

    path: Path
    task: str
    offsets: np.ndarray  # where a sequence begins in ids.bin, in tokens
    lengths: np.ndarray
    sources: np.ndarray
    parts: np.ndarray
    per_row: np.ndarray


SFT_COLUMNS = ["input_ids", "labels", "lengths", "sources"]
DPO_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def write(task: tuple[Path, Shard]) -> int:
    """Writes a shard; returns its rows."""
    folder, shard = task
    ids = np.memmap(folder / "ids.bin", np.int32, "r")
    marks = np.memmap(folder / "marks.bin", np.uint8, "r")
    first = np.concatenate([[0], np.cumsum(shard.per_row)])

    def take(start: int, stop: int) -> list[tuple[np.ndarray, np.ndarray]]:
        part = slice(first[start], first[stop])
        lengths = shard.lengths[part].astype(np.int64)
        ends = np.cumsum(lengths)
        index = np.arange(int(lengths.sum())) + np.repeat(shard.offsets[part] - (ends - lengths), lengths)
        tokens = ids[index]
        if shard.task == "dpo":
            three = shard.parts[part]
            of = np.repeat(np.tile([0, 1, 2], len(three)), three.ravel())
            return [(tokens[of == k], three[:, k]) for k in range(3)]
        labels = np.where(marks[index] == 1, tokens, np.int32(IGNORED))
        labels[ends - lengths] = IGNORED  # nothing predicts a sequence's first token
        count = shard.per_row[start:stop]
        totals = np.add.reduceat(lengths, first[start:stop] - first[start])
        return [(tokens, totals), (labels, totals), (lengths, count), (shard.sources[part], count)]

    columns = DPO_COLUMNS if shard.task == "dpo" else SFT_COLUMNS
    arrow.write_shard(shard.path, columns, len(shard.per_row), take)
    return len(shard.per_row)
