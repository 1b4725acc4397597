"""transformers' Trainer with a token-weighted loss that never holds the full logits, and exact evaluation."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from ftdist.errors import UserError
from ftdist.loss import IGNORED, Head, full_loss
from ftdist.models import trainable_elements

PROBE = 16  # tokens of a sequence in the self-check before the first step


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of `input_ids`, `labels`, `lengths` → tensors (B, L). No attention mask anywhere.

    Positions restart at every sequence, which is what keeps packed sequences apart; padding is one more sequence
    at the end. `targets` are the labels shifted by one. `tokens` (B,) counts what is no padding.
    """
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    targets = torch.full((len(rows), length), IGNORED)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        input_ids[i, :size] = torch.as_tensor(row["input_ids"])
        targets[i, : size - 1] = torch.as_tensor(row["labels"][1:])
        start = 0
        for segment in (*row["lengths"], length - size):
            position_ids[i, start : start + segment] = torch.arange(segment)
            start += segment
    tokens = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": input_ids, "position_ids": position_ids, "targets": targets, "tokens": tokens}


class TokenTrainer(Trainer):
    """Every supervised token weighs the same, whatever micro-batch, accumulation step or rank it is in."""

    def __init__(self, *, model: Any, packing: bool, loss_type: str, trainable: int, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole global batch
        self.loss_is_scaled_for_ga = True
        self.packing = packing
        self.trainable = trainable  # elements that the plan said would be trained
        self.head = Head(model, self.args.label_smoothing_factor, "dft" if loss_type == "dft" else "nll")
        forward = inspect.signature(
            model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
        )
        self.takes_positions = "position_ids" in forward.parameters
        self.examined = False
        self.tokens = 0  # on this rank, padding not counted
        self.clock = (0, 0.0)  # tokens over all ranks and time at the last log

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step and the number of supervised tokens in them, over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            count += (batch["targets"] != IGNORED).sum()
            self.tokens += int(batch["tokens"].sum())
        return batches, self.accelerator.reduce(count, "sum")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the mean over the global batch's supervised tokens, times the world size.

        Both DistributedDataParallel and DeepSpeed average gradients over ranks, which the factor undoes.
        """
        assert not return_outputs and num_items_in_batch is not None
        if not self.examined:
            self._examine(model, inputs)
        return self._summed_loss(model, inputs) / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def _summed_loss(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        targets = inputs["targets"]
        with self.head.answering(targets if self.head.usable else None):
            output = self._forward(model, inputs["input_ids"], inputs["position_ids"])
        return output if self.head.usable else full_loss(output, targets, self.head.smoothing, self.head.kind)

    def _forward(self, model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output: torch.Tensor = model(input_ids=input_ids, use_cache=False, **positions).logits
        return output

    @torch.no_grad()
    def _examine(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        """Before the first step: is just the planned set trained, is the fused loss this architecture's, does packing
        isolate?

        Every rank runs the same forwards, so that sharded engines stay in step.
        """
        self.examined = True
        counted = trainable_elements(self.model)  # the engine exists: ZeRO has fixed what it trains
        if counted != self.trainable:
            raise RuntimeError(f"{counted:,} parameters would be trained, the plan has {self.trainable:,}")
        training = model.training
        model.eval()
        ids = inputs["input_ids"].flatten()[: 2 * PROBE]
        half = len(ids) // 2
        if half >= 2:
            ids = ids[: 2 * half]
            line = torch.arange(half, device=ids.device)
            apart = self._forward(model, ids.view(2, half), torch.stack([line, line])).float()
            if self.head.usable:
                targets = torch.full_like(ids, IGNORED).view(2, half)
                targets[:, :-1] = ids.view(2, half)[:, 1:]
                with self.head.answering(targets):
                    fused = self._forward(model, ids.view(2, half), torch.stack([line, line]))
                expected = full_loss(apart, targets, self.head.smoothing, self.head.kind)
                same = fused.numel() == 1 and torch.allclose(fused.float().sum(), expected, rtol=0.02)
                if not self._all_agree(same):
                    self.head.usable = False  # logits are scaled or capped after the head: use them as they are
                    if self.is_world_process_zero():
                        print("loss: from the full logits (this architecture changes them after its output head)")
            if self.packing:
                packed = self._forward(model, ids[None], torch.cat([line, line])[None]).float()[0, half:]
                mixed = self._forward(model, ids[None], torch.arange(2 * half, device=ids.device)[None]).float()[
                    0, half:
                ]
                leak, contamination = (packed - apart[1]).abs().max(), (mixed - apart[1]).abs().max()
                if not self._all_agree(bool(leak <= 0.25 * contamination + 1e-5)):
                    raise UserError(
                        "train.packing=true: packed sequences see one another in this architecture or attention "
                        "implementation; use train.packing=false or model.attn_implementation=sdpa"
                    )
        model.train(training)

    def _all_agree(self, fine: bool) -> bool:
        flag = torch.tensor(0 if fine else 1, device=self.args.device)
        return int(self.accelerator.reduce(flag, "sum")) == 0

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all supervised held-out tokens and its perplexity; each row counts once on one rank."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        size = self.args.per_device_eval_batch_size
        model = self.model_wrapped
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for start in range(0, math.ceil(len(rows) / world), size):
            wanted = [(start + i) * world + rank for i in range(size)]
            batch = self.data_collator([rows[i % len(rows)] for i in wanted if i < len(rows)] or [rows[0]])
            if wanted[0] >= len(rows):  # nothing left for this rank, but sharded forwards need every rank
                batch["targets"].fill_(IGNORED)
            batch = self._prepare_inputs(batch)
            with self.head.plain(), self.compute_loss_context_manager():
                totals[0] += self._summed_loss(model, batch).double().sum()
            totals[1] += (batch["targets"] != IGNORED).sum()
        totals = self.accelerator.reduce(totals, "sum")
        loss = float(totals[0] / totals[1].clamp(min=1))
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds real tokens so far and per second, over all ranks."""
        if "loss" in logs:
            tokens = int(self.accelerator.reduce(torch.tensor(self.tokens, device=self.args.device), "sum"))
            now = time.monotonic()
            before, then = self.clock
            logs["tokens"] = tokens
            logs["tokens_per_second"] = (tokens - before) / (now - then) if then else 0.0
            self.clock = (tokens, now)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002  (transformers' hook)
        """Not counted: transformers' own count walks all parameters at every micro-batch."""
        return 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        raise AssertionError("evaluate() shards the held-out rows itself")
