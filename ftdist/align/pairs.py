"""Pairs of answers as a batch: two sequences a row, the chosen one first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ftdist.trainer import collate


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
