"""Prepared rows for whoever reads them: sequences with labels, also where a row is a pair of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100


class PairRows(Sequence[Mapping[str, Any]]):
    """Pairs by number, each as the sequence of its chosen answer with the rejected one's beside it (`rejected`).

    `reference` (rows, 2) in float32, once it is known: the reference's log-probabilities of both answers.
    """

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: Any) -> Any:
        row = self.prepared[index]
        made = _sequence(row["prompt_ids"], row["chosen_ids"])
        made["rejected"] = _sequence(row["prompt_ids"], row["rejected_ids"])
        if self.reference is not None:
            made["reference"] = self.reference[index]
        return made


class Answers(Sequence[Mapping[str, Any]]):
    """The sequences of all chosen answers, then those of all rejected ones."""

    def __init__(self, rows: PairRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        half, number = divmod(index, len(self.rows))
        row = self.rows[number]
        return row["rejected"] if half else row


def rows_of(folder: Path) -> Any:
    """A prepared split: its rows by number, with `input_ids`, `labels` and `lengths`; PairRows of preferences."""
    import datasets

    rows = datasets.load_from_disk(str(folder))
    return PairRows(rows) if "prompt_ids" in rows.column_names else rows


def _sequence(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    ids = [*prompt, *answer]
    return {"input_ids": ids, "labels": [*([IGNORED] * len(prompt)), *answer], "lengths": [len(ids)]}
