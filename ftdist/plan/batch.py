"""Sequences and tokens per step, steps per epoch: the same arithmetic that the trainer does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Batch:
    """What one optimizer step works on."""

    sequences_per_step: int  # rows over all processes and accumulation steps
    tokens_per_step: int  # room for tokens; filled when rows are packed
    steps_per_epoch: int | None  # None: the number of rows is not known yet
    total_steps: int | None
    arithmetic: list[str]  # lines that show where the numbers come from


@dataclass(frozen=True)
class Filling:
    """How much of the room of a sequence real tokens take, where rows are not packed."""

    tokens: float  # of a sequence, mean
    quantiles: tuple[tuple[float, float], ...]  # (share of the sequences, that are at most so long), rising

    def padded(self, sequences: int) -> float:
        """Mean length that a micro-batch of so many is padded to: of its longest, drawn at random."""
        points = [((i + 0.5) / 100) ** (1 / sequences) for i in range(100)]
        return sum(self._length(share) for share in points) / len(points)

    def _length(self, share: float) -> float:
        """Straight between two quantiles over −log(1 − share), as an exponential tail is."""
        for (low, short), (high, long) in zip(self.quantiles, self.quantiles[1:], strict=False):
            if share <= high:
                low, high, at = (-math.log1p(-s) for s in (low, high, share))
                return short + (long - short) * (at - low) / (high - low)
        return self.quantiles[-1][1]


def filling(report: Mapping[str, Any]) -> Filling:
    """Of rows that are not packed, from `data_report.json`. A pair is two sequences that share a prompt."""
    mean = report["tokens"] / report["train_sequences"]
    sequence = mean
    if "preference" in report:
        answers = report["preference"]["chosen_tokens_mean"] + report["preference"]["rejected_tokens_mean"]
        sequence = mean - answers / 2
    last = 1 - 0.5 / report["train_sequences"]  # the longest one's share, short of all
    lengths = report["token_lengths"]
    return Filling(
        sequence, tuple((min(share, last), lengths[name] * sequence / mean) for name, share in QUANTILES.items())
    )


def batch_arithmetic(
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    processes: int,
    nodes: int,
    max_length: int,
    packing: bool,
    rows: int | None,
    num_train_epochs: float,
    max_steps: int,
    about: bool = False,
    sequences_per_row: int = 1,
) -> Batch:
    """`processes` is per node; `rows` counts what the trainer sees: packed rows where rows are packed; `about`: it is
    a guess from the size of the data; `sequences_per_row`: 2 where a row is a pair of answers.

    Steps as in transformers' `Trainer.set_initial_training_values`: the last batch of an epoch may be short,
    a `max_steps` above 0 overrides the epochs.
    """
    world = processes * nodes
    sequences = per_device_train_batch_size * gradient_accumulation_steps * world
    tokens = sequences * sequences_per_row * max_length

    factors = [
        f"{per_device_train_batch_size:,} micro-batch",
        f"{gradient_accumulation_steps:,} accumulation",
    ]
    factors.append(f"{processes:,} process" + ("es" if processes > 1 else ""))
    if nodes > 1:
        factors.append(f"{nodes:,} nodes")
    amount = f"{tokens:,} tokens per step" if packing else f"at most {tokens:,} tokens per step (rows are not packed)"
    unit = "sequences" if sequences_per_row == 1 else f"pairs × {sequences_per_row} sequences"
    lines = [f"{' × '.join(factors)} = {sequences:,} {unit} × {max_length:,} tokens = {amount}"]

    per_epoch = total = None
    if rows is not None:
        micro_batches = math.ceil(rows / (per_device_train_batch_size * world))
        per_epoch = max(math.ceil(micro_batches / gradient_accumulation_steps), 1)
        total = math.ceil(num_train_epochs * per_epoch)
        kind = "packed rows" if packing else "rows" if sequences_per_row == 1 else "pairs"
        epoch = f"{'about ' if about else ''}{rows:,} {kind} / {sequences:,} = {per_epoch:,} steps per epoch"
        if max_steps <= 0:
            lines.append(f"{epoch} × {num_train_epochs:g} epochs = {total:,} steps")
        else:
            lines.append(f"{epoch}; train.max_steps={max_steps:,} is {max_steps / per_epoch:.3g} epochs")
    if max_steps > 0:
        total = max_steps
    return Batch(sequences, tokens, per_epoch, total, lines)
