"""Does the evaluation set hold what was trained on? Evaluation rows against the tokens that the run saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data import text
from ftdist.data.rows import rows_of

NGRAM = 13  # words; the evaluation harnesses' convention
BOILERPLATE = 10  # an n-gram that more training sequences than this have is a template's
SHORTEST = 4  # words of a question that says which one it is
_BLOCK = 2000  # training sequences at a time


def found(prepared: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Which rows overlap with the training split; None where the prepared data are gone.

    A row overlaps when a training sequence holds 13 words in a row of it that are no boilerplate, or (if it is too
    short for that) its whole question and its whole answer.
    """
    folder = prepared / "train"
    if not folder.is_dir():
        return None
    answers = [row["reference"] for row in rows]
    questions = [_question(row) or answer for row, answer in zip(rows, answers, strict=True)]  # a text is both
    asked, said = _words(questions), _words(answers)
    long = [_grams(words, i, NGRAM) for words in (asked, said) for i in range(len(rows))]
    wanted = np.unique(np.concatenate([*long, np.zeros(0, np.uint64)]))
    lengths = [(len(_of(asked, i)), len(_of(said, i))) for i in range(len(rows))]
    short = [i for i, (q, a) in enumerate(lengths) if SHORTEST <= q < NGRAM and 0 < a < NGRAM]
    whole = {i: tuple(int(_grams(words, i, n)[0]) for words, n in ((asked, lengths[i][0]), (said, lengths[i][1])))
             for i in short}  # fmt: skip
    sizes = sorted({n for i in short for n in lengths[i]})
    by_question: dict[int, list[int]] = {}
    for i, (question, _) in whole.items():
        by_question.setdefault(question, []).append(i)
    keys = np.unique(np.array([n for pair in whole.values() for n in pair], np.uint64))
    times = np.zeros(len(wanted), np.int64)
    hit: set[int] = set()
    sequences = 0
    for texts in _sequences(folder, tokenizer):
        sequences += len(texts)
        words = text.words(texts)
        grams, owners = text.ngrams(words, NGRAM, short=False)
        at = np.searchsorted(wanted, grams).clip(max=max(len(wanted) - 1, 0))
        same = wanted[at] == grams if len(wanted) else np.zeros(len(grams), bool)
        pairs = np.unique(np.stack([at[same], owners[same].astype(np.int64)], 1), axis=0) if same.any() else None
        if pairs is not None:
            times += np.bincount(pairs[:, 0], minlength=len(wanted))
        inside: list[set[int]] = [set() for _ in texts]
        for n in sizes:
            grams, owners = text.ngrams(words, n, short=False)
            for gram, owner in zip(*(x[np.isin(grams, keys)] for x in (grams, owners)), strict=True):
                inside[owner].add(int(gram))
        for seen in inside:
            hit |= {i for question in seen & by_question.keys() for i in by_question[question] if whole[i][1] in seen}
    telling = wanted[(times > 0) & (times <= BOILERPLATE)]
    for i in range(len(rows)):
        if np.isin(long[i], telling).any() or np.isin(long[len(rows) + i], telling).any():
            hit.add(i)
    return {"rows": sorted(hit), "of": len(rows), "training_sequences": sequences, "ngram": NGRAM}


def held_out(prepared: Path) -> list[dict[str, Any]]:
    """The held-out rows of a prepared data set that have a reference."""
    rows = [json.loads(line) for line in (prepared / "validation_rows.jsonl").open(encoding="utf-8")]
    return [row for row in rows if (row["reference"] or "").strip()]


def _question(row: dict[str, Any]) -> str:
    said = [m["content"] for m in row["messages"] if m["role"] == "user" and isinstance(m["content"], str)]
    return said[-1] if said else ""


def _words(texts: list[str]) -> text.Words:
    return text.words([t.replace("\x00", " ") for t in texts])


def _of(words: text.Words, i: int) -> np.ndarray:
    return words.hashes[words.bounds[i] : words.bounds[i + 1]]


def _grams(words: text.Words, i: int, n: int) -> np.ndarray:
    own = _of(words, i)
    one = text.Words(own, np.array([0, len(own)]), words.scripts[i : i + 1])
    return text.ngrams(one, n, short=False)[0]


def _sequences(folder: Path, tokenizer: Any) -> Any:
    """Training sequences as text, some thousand at a time."""
    rows = rows_of(folder)
    batch: list[list[int]] = []
    for i in range(len(rows)):
        row = rows[i]
        for packed in (row, *([row["rejected"]] if "rejected" in row else ())):
            start = 0
            for length in packed["lengths"]:
                batch.append(packed["input_ids"][start : start + length])
                start += length
        if len(batch) >= _BLOCK:
            yield [t.replace("\x00", " ") for t in tokenizer.batch_decode(batch, skip_special_tokens=True)]
            batch = []
    if batch:
        yield [t.replace("\x00", " ") for t in tokenizer.batch_decode(batch, skip_special_tokens=True)]
