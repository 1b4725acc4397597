"""transformers' Trainer with a token-weighted loss that never holds the full logits, and exact evaluation."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import patch_optimizer_step
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from ftdist.errors import UserError
from ftdist.health import Health
from ftdist.keeper import Keeper
from ftdist.loss import IGNORED, Head, full_loss
from ftdist.models import trainable_elements
from ftdist.sampler import EpochLoader, Rows, StepSampler
from ftdist.state import engines

PROBE = 16  # tokens of a sequence in the self-check before the first step


def collate(
    rows: Sequence[Mapping[str, Any]], pad_id: int, general: frozenset[int] = frozenset()
) -> dict[str, torch.Tensor]:
    """Rows of `input_ids`, `labels`, `lengths` → tensors (B, L). No attention mask anywhere.

    Positions restart at every sequence, which is what keeps packed sequences apart; padding is one more sequence
    at the end. `targets` are the labels shifted by one. `tokens` (B,) counts what is no padding.
    general: numbers of the sources of replayed data; `general` (B, L) then marks the targets that are theirs.
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
    tokens = torch.tensor([0 if row.get("filler") else len(row["input_ids"]) for row in rows])
    batch = {"input_ids": input_ids, "position_ids": position_ids, "targets": targets, "tokens": tokens}
    if general:
        batch["general"] = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            if not row.get("filler"):
                own = torch.tensor([source in general for source in row["sources"]])
                mine = own.repeat_interleave(torch.tensor(row["lengths"]))
                batch["general"][i, : len(mine) - 1] = mine[1:]
    return batch


def takes_positions(model: Any) -> bool:
    """Whether the architecture is told positions (learned or rotary ones are; ALiBi and recurrent models have none)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(inner.forward).parameters


class AskedToStop(Exception):
    """All ranks have agreed to give up an evaluation."""


class TokenTrainer(Trainer):
    """Every supervised token weighs the same, whatever micro-batch, accumulation step or rank it is in."""

    def __init__(
        self,
        *,
        model: Any,
        packing: bool,
        loss_type: str,
        trainable: int,
        keeper: Keeper,
        health: Health,
        replay: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.health = health
        health.losses = self.losses
        health.scaled = self.args.fp16
        self.step_losses: list[torch.Tensor] = []  # of this rank, a micro-batch each
        self.norm = math.nan  # of the gradients of the step, over all ranks
        self.keeper = keeper
        keeper.trainer = self
        self.add_callback(keeper)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole global batch
        self.loss_is_scaled_for_ga = True
        self.packing = packing
        self.text_collator = self.data_collator  # of the general sets' rows, whatever the task's are
        self.retention: Mapping[str, Any] = {}  # rows of each general set that is measured at every evaluation
        self.examiner: Any = None  # answers held-out rows at every evaluation, if there is one
        self.consolidation: Any = None  # holds weights near their start, if anything does (EWC)
        self.sharded = False  # weights are in pieces over the ranks (ZeRO-3)
        self.trainable = trainable  # elements that the plan said would be trained
        self.head = Head(model, self.args.label_smoothing_factor, "dft" if loss_type == "dft" else "nll")
        self.takes_positions = takes_positions(model)
        self.examined = False
        self.tokens = 0  # on this rank, padding not counted
        # loss and tokens since the last log on this rank: of all targets, of the general ones
        self.parts = torch.zeros(4, dtype=torch.float64, device=self.args.device) if replay else None
        self.clock = (0, 0.0)  # tokens over all ranks and time at the last log

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches; the sampler alone decides which rows they hold."""
        args = self.args
        sampler = StepSampler(
            len(self.train_dataset),  # type: ignore[arg-type]  # always a mapped one, which has a length
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            seed=args.seed,
            drop_last=args.dataloader_drop_last,
        )
        self.steps_per_epoch = sampler.steps
        return EpochLoader(
            Rows(self.train_dataset),  # type: ignore[arg-type]  # the same
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            generator=torch.Generator().manual_seed(args.seed),  # of its own: dropout's random numbers stay the same
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step and the number of supervised tokens in them, over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
        self.tokens += sum(int(batch["tokens"].sum()) for batch in batches)
        count = sum(self.keeper.ranks.gather(count))
        self.health.tokens(self.state.global_step + 1, count)
        self.step_losses = []
        return batches, torch.tensor(count, device=device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the mean over the global batch's supervised tokens, times the world size.

        Both DistributedDataParallel and DeepSpeed average gradients over ranks, which the factor undoes.
        """
        assert not return_outputs and num_items_in_batch is not None
        if not self.examined:
            self._examine(model, inputs)
        total = self._summed_loss(model, inputs, self.parts)
        loss = total / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        self.step_losses.append(loss.detach())
        return loss

    def _summed_loss(
        self, model: Any, inputs: Mapping[str, torch.Tensor], parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """parts: what the sums and numbers of all and of the general targets are added to."""
        targets = inputs["targets"]
        head = self.head
        marked = () if parts is None else (inputs["general"], parts[1])
        with head.answering(*(targets, *marked) if head.usable else (None,)):
            output = self._forward(model, inputs["input_ids"], inputs["position_ids"])
        total = head.answer(output) if head.usable else full_loss(output, targets, head.smoothing, head.kind)
        if parts is not None:
            general = targets.masked_fill(~inputs["general"], IGNORED)
            if not head.usable:
                parts[1] += full_loss(output.detach(), general, head.smoothing, head.kind)
            parts[0] += total.detach()
            parts[2] += (targets != IGNORED).sum()
            parts[3] += (general != IGNORED).sum()
        return total

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
        training = self.model.training  # type: ignore[union-attr]  # DeepSpeed's wrapper does not follow its own eval()
        model.eval()
        ids = inputs["input_ids"].flatten()[: 2 * PROBE]
        half = len(ids) // 2
        if half >= 2:
            ids = ids[: 2 * half]
            line = torch.arange(half, device=ids.device)
            with self.head.kept() as raw:
                apart = self._forward(model, ids.view(2, half), torch.stack([line, line])).float()
            if self.head.usable and not self._all_agree(self.head.understands(raw[0], apart)):
                self._use_full_logits()
            if self.head.usable:
                targets = torch.full_like(ids, IGNORED).view(2, half)
                targets[:, :-1] = ids.view(2, half)[:, 1:]
                with self.head.answering(targets):
                    fused = self._forward(model, ids.view(2, half), torch.stack([line, line]))
                expected = full_loss(apart, targets, self.head.smoothing, self.head.kind)
                fused = self.head.answer(fused)
                same = fused.numel() == 1 and torch.allclose(fused.float().sum(), expected, rtol=0.02)
                if not self._all_agree(same):
                    self._use_full_logits()
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

    def _use_full_logits(self) -> None:
        self.head.usable = False  # logits are changed after the head in a way of their own: use them as they are
        if self.is_world_process_zero():
            print("loss: from the full logits (this architecture changes them after its output head)")

    def _all_agree(self, fine: bool) -> bool:
        flag = torch.tensor(0 if fine else 1, device=self.args.device)
        return int(self.accelerator.reduce(flag, "sum")) == 0

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all supervised held-out tokens and its perplexity; each row counts once on one rank."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self._means(self._summed_over(rows, self.data_collator, self._sums))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()} | self.retained()
        if self.examiner is not None:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            plain = self.accelerator.unwrap_model(self.model_wrapped)
            with self.compute_loss_context_manager():
                answered = self.examiner.examine(plain, rank, world, self.sharded, self.keeper.asked_to_stop)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in answered.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def retained(self) -> dict[str, float]:
        """Losses on the general sets, their mean, and how much each has risen over the base's, as a share."""
        metrics: dict[str, float] = {}
        for name, rows in self.retention.items():
            if self.keeper.asked_to_stop():
                raise AskedToStop
            sums = self._summed_over(rows, self.text_collator, partial(TokenTrainer._sums, self))
            metrics[name] = TokenTrainer._means(self, sums)["loss"]
        judge = self.keeper.judge
        changes = {name: judge.change(name, loss) for name, loss in metrics.items()} if judge is not None else {}
        if len(metrics) > 1:
            metrics["eval_retention_loss"] = sum(metrics.values()) / len(metrics)
        return metrics | {f"{n.removesuffix('_loss')}_change": c for n, c in changes.items() if c is not None}

    def _measure_base(self) -> None:
        """Losses on the general sets before the first step, which is the base's knowledge of them."""
        try:
            metrics = self.retained()
        except AskedToStop:
            self.keeper.gave_up_base(self.control)
            return
        self.keeper.base_measured(metrics)
        self.log(metrics)

    def _summed_over(self, rows: Any, collator: Any, sums: Callable[[Any, Any], torch.Tensor]) -> torch.Tensor:
        """`sums` of every batch of held-out rows, added up over all ranks; each row counts once on one rank."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        size = self.args.per_device_eval_batch_size
        model = self.model_wrapped
        model.eval()
        totals: Any = 0
        for start in range(0, math.ceil(len(rows) / world), size):
            if start and self.keeper.asked_to_stop():
                raise AskedToStop
            wanted = [(start + i) * world + rank for i in range(size)]
            batch = collator([rows[i % len(rows)] for i in wanted if i < len(rows)] or [rows[0]])
            if wanted[0] >= len(rows):  # nothing left for this rank, but sharded forwards need every rank
                batch["targets"].fill_(IGNORED)
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                if not self.examined:  # nothing was trained in this start yet
                    self._examine(model, batch)
            with self.head.plain(), self.compute_loss_context_manager():
                totals = totals + sums(model, batch)
        reduced: torch.Tensor = self.accelerator.reduce(totals, "sum")
        return reduced

    def _sums(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a held-out batch adds (float64): its summed loss and its supervised tokens."""
        count = (batch["targets"] != IGNORED).sum()
        return torch.stack([self._summed_loss(model, batch).double().sum(), count.double()])

    def _means(self, totals: torch.Tensor) -> dict[str, float]:
        """Metrics from these sums over all ranks."""
        loss = float(totals[0] / totals[1].clamp(min=1))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) of sequences of one length, through the engine. Every rank must call."""
        model = self.model_wrapped
        model.eval()
        ids = input_ids.to(self.args.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with self.compute_loss_context_manager():
            return self._forward(model, ids, positions)

    # Health: asked before torch's optimizer changes anything; DeepSpeed calls it inside the last backward

    def _norm(self) -> float:
        engine = getattr(self.optimizer, "optimizer", None)
        norm = getattr(engine, "_global_grad_norm", self.norm)
        return float(norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        self.norm = float(super()._get_grad_norm(model, grad_norm))
        step = self.state.global_step + 1
        if step == 1:
            shares = self.losses()
            self._judge_first(sum(shares) / len(shares))
        self.health.may_apply(step, self.norm)  # ZeRO leaves a step of NaN out without asking
        return self.norm

    def _judge_first(self, loss: float) -> None:
        model_config: Any = self.model.config  # type: ignore[union-attr]
        self.health.first(loss, model_config.get_text_config().vocab_size)

    def losses(self) -> list[float]:
        """Each rank's share of this step's loss, times the world size; their mean is the loss."""
        return self.keeper.ranks.gather(float(sum(self.step_losses)))

    # Saving and going on: transformers' own ways to write and find checkpoints are not used

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002  (transformers' hook)
        self.keeper.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: weights are restored when the engine is there."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.restore_random_state()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        _, base = engines(self.optimizer)
        if self.consolidation is not None:
            self.consolidation.begin(self)
        self.health.guard(base, self._norm, lambda: self.state.global_step + 1)
        if getattr(self.optimizer, "scaler", None) is not None:  # accelerate has kept the step as it was
            wrapper: Any = self.optimizer
            wrapper._optimizer_original_step_method = base.step
            wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, base.step)
        if resume_from_checkpoint is not None:
            self.keeper.restore()
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.retention and self.keeper.wants_base():
            self._measure_base()
        if self.keeper.evaluation_pending:
            self._evaluate(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        if self.state.global_step >= self.state.max_steps or self.keeper.ended_early():  # resumed after the last step
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self.keeper.evaluation_pending and not self.keeper.stopping:  # resumed at the end of the last epoch
            self._evaluate(trial, None)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:  # noqa: ARG002  (a hook)
        return False  # the keeper's judge decides

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except AskedToStop:
            self.keeper.interrupted_evaluation(self.control)
            self.keeper.save()
            self.control.should_save = False
            return {}
        self.keeper.evaluation_pending = False
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
            if self.parts is not None:
                every, general, count, of_general = self.accelerator.reduce(self.parts, "sum").tolist()
                self.parts.zero_()
                target = count - of_general
                logs["loss_target"] = (every - general) / target if target else math.nan
                logs["loss_general"] = general / of_general if of_general else math.nan
            if self.consolidation is not None:
                logs["ewc_penalty"] = self.consolidation.penalty()
            self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves NaN of a NaN
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002  (transformers' hook)
        """Not counted: transformers' own count walks all parameters at every micro-batch."""
        return 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        raise AssertionError("evaluate() shards the held-out rows itself")
