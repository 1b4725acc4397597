"""Which rows a rank trains on, and when: the global batch of a step is decided by seed, epoch and step alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from ftdist.data.order import epoch_order
from ftdist.loss import IGNORED

FILLER = -1  # in the place of a row where an epoch ends inside a global batch


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank, as lists of row numbers; as many on every rank.

    Step s of an epoch takes rows s·B … s·B + B - 1 of the epoch's order, B = micro_batch · accumulation · world.
    Another world size with the same B takes the same rows in the same step. No row is left out or taken twice in an
    epoch, unless `drop_last` leaves out the last, short batch.
    """

    def __init__(
        self, rows: int, *, micro_batch: int, accumulation: int, rank: int, world: int, seed: int, drop_last: bool
    ) -> None:
        self.rows, self.micro_batch, self.accumulation = rows, micro_batch, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        whole, rest = divmod(rows, micro_batch * accumulation * world)
        self.steps = whole + (1 if rest and not (drop_last and whole) else 0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.rows, seed=self.seed, epoch=self.epoch)
        slots = np.full(len(self) * self.world * self.micro_batch, FILLER)
        used = min(len(order), len(slots))
        slots[:used] = order[:used]
        yield from slots.reshape(len(self), self.world, self.micro_batch)[:, self.rank].tolist()


class Rows(Dataset[Mapping[str, Any]]):
    """Prepared rows by number; FILLER is a row of two tokens that nothing is learnt from."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index != FILLER:
            return self.rows[index]
        tokens = self.rows[0]["input_ids"][:2]
        return {"input_ids": tokens, "labels": [IGNORED] * len(tokens), "lengths": [len(tokens)], "filler": True}


class EpochLoader(DataLoader[Any]):
    """A loader whose sampler is told which epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
