"""Prepared preference rows as the trainer takes them: two sequences a row, the chosen one first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ftdist.loss import IGNORED
from ftdist.trainer import collate


class PairRows:
    """Rows by number, each as the sequence of its chosen answer with the rejected one's beside it.

    `reference` (rows, 2) in float32, once it is known: the reference's log-probabilities of both answers.
    """

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        row = self.prepared[index]
        made = _sequence(row["prompt_ids"], row["chosen_ids"])
        made["rejected"] = _sequence(row["prompt_ids"], row["rejected_ids"])
        if self.reference is not None:
            made["reference"] = self.reference[index]
        return made


def _sequence(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    ids = [*prompt, *answer]
    return {"input_ids": ids, "labels": [*([IGNORED] * len(prompt)), *answer], "lengths": [len(ids)]}


def collate_pairs(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """B rows → the tensors of `collate` over 2·B sequences, all chosen ones first; `reference` (2·B,) if rows have it.

    Padding comes last and positions run on into it: causal attention alone keeps it out, and takes its fast path.
    A filler has no rejected answer; neither of its halves has a target.
    """
    fillers = [{**row, "rejected": row} if "rejected" not in row else row for row in rows]
    both = [*fillers, *({"filler": row.get("filler"), **row["rejected"]} for row in fillers)]
    batch = collate(both, pad_id)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(len(both), 1)
    if any("reference" in row for row in rows):
        known = np.stack([row.get("reference", np.zeros(2, np.float32)) for row in fillers])
        batch["reference"] = torch.from_numpy(known).T.reshape(-1).contiguous()
    return batch
