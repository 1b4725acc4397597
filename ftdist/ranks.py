"""The ranks of a run agreeing on the CPU, beside the engine's own collectives and without waiting for a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(hours=12)  # a rank may write or hash for long; one that is gone closes its connection at once


class Ranks:
    """All ranks, in a group of their own; one process is a group too. Every rank makes the same calls."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.group: Any = dist.new_group(backend="gloo", timeout=WAIT) if together else None

    def maximum(self, *values: int) -> list[int]:
        """The largest value of any rank, for each place."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]
