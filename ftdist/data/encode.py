"""The second pass: the rows that stay → token ids, a block at a time; then → Arrow, a shard at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftdist.data import arrow
from ftdist.data.clean import json_line, load_rows, reject_line
from ftdist.data.formats import Reject
from ftdist.data.sources import Source
from ftdist.data.template import Unsegmentable
from ftdist.data.tokens import Frozen, Laid, lay_out, load_frozen, pair_tokens, tokenize
from ftdist.errors import UserError

TRAIN, VALIDATION, REPLAY = 1, 2, 3
IGNORED = -100
_BATCH_CHARACTERS = 1_000_000  # what the tokenizer gets at once: more is faster, and takes a hundred bytes a token


@dataclass(frozen=True)
class Laying:
    """How rows become tokens."""

    task: str
    mask: str
    max_length: int
    overlong: str


class Sequence(NamedTuple):
    """`parts` are the lengths of prompt, chosen and rejected in a preference row, else zeros."""

    row: int
    ids: np.ndarray
    trained: np.ndarray
    parts: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Encoded:
    """A block's sequences, whose ids and marks (1 = trained on) lie in ids-N.bin (int32) and marks-N.bin
    (uint8)."""

    block: int
    lengths: np.ndarray  # int32
    rows: np.ndarray  # int32: the row in the block
    side: np.ndarray  # uint8: TRAIN, VALIDATION or REPLAY
    trained: np.ndarray  # int32: supervised tokens
    parts: np.ndarray  # int32, (sequences, 3)
    dropped: np.ndarray  # int32: rows left out because they are too long
    overlong: Counter[str]
    rejects: list[dict[str, Any]]
    validation: str  # lines of validation_rows.jsonl


def _characters(row: dict[str, Any]) -> int:
    """Roughly what a row gives the tokenizer."""
    if "text" in row:
        return len(row["text"])
    parts = [row["messages"]] if "messages" in row else [row["prompt"], row["chosen"], row["rejected"]]
    return sum([len(message["content"]) for messages in parts for message in messages])


class _Block:
    """One block on its way to tokens."""

    def __init__(self, folder: Path, laying: Laying, source: Source, file: int, block: int) -> None:
        self.frozen: Frozen = load_frozen(folder / "tokenizer")
        self.laying, self.source, self.file = laying, source, file
        self.rows, self.lines = load_rows(folder, block)
        self.overlong: Counter[str] = Counter()
        self.dropped: list[int] = []
        self.rejects: list[dict[str, Any]] = []

    def refuse(self, row: int, error: Reject) -> None:
        self.rejects.append(reject_line(self.source, self.file, self.lines[row], error, self.rows[row]))

    def stop(self, row: int, error: Unsegmentable) -> UserError:
        way_out = ", or data.mask=all" if self.laying.task == "sft" else ""
        return UserError(
            f"data.chat_template: the template can't be divided exactly into turns ({error}; seen at "
            f"{self.source.files[self.file]} line {self.lines[row]}); use one with {{% generation %}} "
            f"tags{way_out}"
        )

    def drop(self, row: int) -> None:
        self.overlong["dropped"] += 1
        self.dropped.append(row)

    def batches(self, picked: list[int]) -> Iterator[list[int]]:
        """The picked rows in groups of limited size."""
        group: list[int] = []
        size = 0
        for row in picked:
            group.append(row)
            size += _characters(self.rows[row]) + 100
            if size >= _BATCH_CHARACTERS:
                yield group
                group, size = [], 0
        if group:
            yield group

    def texts(self, group: list[int]) -> list[Sequence]:
        """Sequences of sft rows."""
        laid: list[Laid] = []
        owners: list[int] = []
        for row in group:
            try:
                laid.append(lay_out(self.rows[row], self.frozen.template, self.laying.mask))
                owners.append(row)
            except Reject as error:
                self.refuse(row, error)
            except Unsegmentable as error:
                raise self.stop(row, error) from None
        try:
            tokens = tokenize(laid, self.frozen)
        except Unsegmentable as error:
            raise self.stop(owners[0], error) from None
        result = []
        for row, (ids, trained) in zip(owners, tokens, strict=True):
            try:
                result += [Sequence(row, *window) for window in self._windows(row, ids, trained)]
            except Reject as error:
                self.refuse(row, error)
        return result

    def _windows(self, row: int, ids: np.ndarray, trained: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What stays of a sequence under the length limit."""
        limit = self.laying.max_length
        if not trained.any():
            raise Reject("no supervised token", f"none under data.mask={self.laying.mask}")
        if len(ids) <= limit:
            return [(ids, trained)]
        if self.laying.overlong == "drop":
            self.drop(row)
            return []
        if self.laying.overlong == "truncate":
            if not trained[:limit].any():
                raise Reject("no supervised token", f"the answer begins after {limit} tokens")
            self.overlong["truncated"] += 1
            self.overlong["cut_answers"] += bool(trained[limit:].any())
            return [(ids[:limit], trained[:limit])]
        windows = []
        for at in range(0, len(ids), limit):
            marks = trained[at : at + limit].copy()
            marks[0] = False
            if marks.any():
                windows.append((ids[at : at + limit], marks))
            else:
                self.overlong["windows_without_answer"] += 1
        if not windows:
            raise Reject("no supervised token", "none left after splitting")
        self.overlong["split"] += 1
        return windows

    def pairs(self, group: list[int]) -> list[Sequence]:
        """Sequences of preference rows: prompt, chosen and rejected one after another."""
        result = []
        for row in group:
            try:
                three = self._fit(row, *pair_tokens(self.rows[row], self.frozen))
            except Reject as error:
                self.refuse(row, error)
                continue
            except Unsegmentable as error:
                raise self.stop(row, error) from None
            if three is None:
                continue
            trained = np.ones(sum(map(len, three)), bool)
            trained[: len(three[0])] = False
            sizes = (len(three[0]), len(three[1]), len(three[2]))
            result.append(Sequence(row, np.concatenate(three), trained, sizes))
        return result

    def _fit(
        self, row: int, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        limit = self.laying.max_length
        longest = max(len(chosen), len(rejected))
        if len(prompt) + longest > limit:
            if self.laying.overlong == "drop":
                self.drop(row)
                return None
            # a prompt gives way from its beginning until answers have half of the room, then answers from
            # their end
            keep = max(limit - max(longest, 1), limit // 2)
            self.overlong["truncated"] += 1
            if len(prompt) > keep:
                self.overlong["cut_prompts"] += 1
                bos = prompt[:1] if prompt[0] == self.frozen.bos else prompt[:0]
                prompt = np.concatenate([bos, prompt[len(prompt) - keep + len(bos) :]])
            room = limit - len(prompt)
            self.overlong["cut_answers"] += longest > room
            chosen, rejected = chosen[:room], rejected[:room]
        if not len(chosen) or not len(rejected) or np.array_equal(chosen, rejected):
            raise Reject("identical chosen and rejected", f"as tokens, within train.max_length={limit}")
        return prompt, chosen, rejected

    def validation_line(self, number: int) -> str:
        """A held-out row before templating, with its last answer apart."""
        row = self.rows[number]
        if "text" in row:
            messages, prompt, reference = [], "", row["text"]
        else:
            messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
            prompt = self.frozen.template.render(messages[:-1], row["tools"], prompt=True)
            reference = messages[-1]["content"]
        identifier = row["id"]
        if identifier is None:
            identifier = f"{self.source.files[self.file].name}:{self.lines[number]}"
        held_out = {
            "messages": messages,
            "prompt": prompt,
            "reference": reference,
            "source": self.source.name,
        }
        if row["tools"]:
            held_out["tools"] = row["tools"]
        return json_line(held_out | {"id": identifier})


def encode_block(task: tuple[Path, Laying, Source, int, int, np.ndarray]) -> Encoded:
    """Tokens of the rows of a block whose entry in the last array says TRAIN, VALIDATION or REPLAY."""
    folder, laying, source, file, number, wanted = task
    block = _Block(folder, laying, source, file, number)
    picked = np.flatnonzero(wanted).tolist()
    done: list[tuple[int, int, int, tuple[int, int, int]]] = []
    validation: dict[int, str] = {}
    with (
        (folder / f"ids-{number}.bin").open("wb") as ids,
        (folder / f"marks-{number}.bin").open("wb") as marks,
    ):
        for group in block.batches(picked):
            made = block.pairs(group) if laying.task == "dpo" else block.texts(group)
            if made:
                ids.write(np.concatenate([sequence.ids for sequence in made]).tobytes())
                marks.write(np.concatenate([sequence.trained for sequence in made]).tobytes())
            for sequence in made:
                trained = int(np.count_nonzero(sequence.trained))
                done.append((sequence.row, len(sequence.ids), trained, sequence.parts))
                if wanted[sequence.row] == VALIDATION and sequence.row not in validation:
                    validation[sequence.row] = block.validation_line(sequence.row)
    rows = np.array([d[0] for d in done], np.int32)
    return Encoded(
        number,
        lengths=np.array([d[1] for d in done], np.int32),
        rows=rows,
        side=wanted[rows],
        trained=np.array([d[2] for d in done], np.int32),
        parts=np.array([d[3] for d in done], np.int32).reshape(-1, 3),
        dropped=np.array(block.dropped, np.int32),
        overlong=block.overlong,
        rejects=block.rejects,
        validation="".join(validation.values()),
    )


# --- tokens → Arrow -------------------------------------------------------------------------------

SFT_COLUMNS = ["input_ids", "labels", "lengths", "sources"]
DPO_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


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


def write(task: tuple[Path, Shard]) -> int:
    """Writes a shard; returns its rows."""
    folder, shard = task
    if not len(shard.lengths):
        ids, marks = np.zeros(0, np.int32), np.zeros(0, np.uint8)
    else:
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
        count = shard.per_row[start:stop]
        totals = np.add.reduceat(lengths, first[start:stop] - first[start])
        return [(tokens, totals), (labels, totals), (lengths, count), (shard.sources[part], count)]

    columns = DPO_COLUMNS if shard.task == "dpo" else SFT_COLUMNS
    arrow.write_shard(shard.path, columns, len(shard.per_row), take)
    return len(shard.per_row)
