"""Answers while training goes on: every rank answers its share of some held-out rows, with the engine's own weights.

Under ZeRO-3 every forward pass gathers weights from all ranks, so all ranks make the same number of calls, and inside
one call a rank that has ended its sentences goes on with empty passes until the last one has (`synced_gpus`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ftdist.evaluate import generate, scores
from ftdist.trainer import AskedToStop


class Examiner:
    """`count` held-out rows with a prompt, and how they are answered and scored."""

    def __init__(
        self,
        prepared: Path,
        count: int,
        tokenizer: Any,
        positions: int | None,
        seed: int,
        eval_keys: dict[str, Any],
    ) -> None:
        rows = [json.loads(line) for line in (prepared / "validation_rows.jsonl").open(encoding="utf-8")]
        rows = [row for row in rows if row["prompt"] and (row["reference"] or "").strip()]
        self.rows = random.Random(seed).sample(rows, count) if len(rows) > count else rows
        self.tokenizer, self.keys = tokenizer, eval_keys
        prompts = [row["prompt"] for row in self.rows]
        self.prompts, _ = generate.encoded(tokenizer, prompts, positions, eval_keys["max_new_tokens"])

    @torch.no_grad()
    def examine(
        self, model: Any, rank: int, world: int, sharded: bool, asked_to_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Metric → value over all ranks' answers; every rank must call. model: without the engine's wrapper."""
        if not self.rows:
            return {}
        size = self.keys["batch_size"]
        mine = list(range(rank, len(self.rows), world))
        found: dict[int, str] = {}
        for start in range(0, math.ceil(len(self.rows) / world), size):
            if asked_to_stop():  # agreed by all ranks
                raise AskedToStop
            # a rank without rows left answers the first one and throws it away: the others need its shards
            batch = mine[start : start + size] or [0]
            texts = generate.generated(
                model,
                self.tokenizer,
                [self.prompts[i] for i in batch],
                self.keys["max_new_tokens"],
                synced_gpus=sharded and world > 1,
            )
            found |= dict(zip(batch, texts, strict=True))
        if world > 1:
            shares: list[Any] = [None] * world
            torch.distributed.all_gather_object(shares, {i: found[i] for i in mine})
            found = {i: text for share in shares for i, text in share.items()}
        answers, references = [found[i] for i in range(len(self.rows))], [row["reference"] for row in self.rows]
        metrics = scores.of_answers(
            answers, references, self.keys["metrics"], self.keys["answer_pattern"], self.keys["bleu_tokenize"]
        )
        return {name: metric.total for name, metric in metrics.items()}
