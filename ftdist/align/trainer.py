"""TokenTrainer on pairs of answers: every pair weighs the same, whatever micro-batch, accumulation step or rank it
is in. Rows, checkpoints, health and sharded evaluation are its parent's."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from ftdist.align import MEANS
from ftdist.align.losses import Objective, Pairs
from ftdist.align.reference import Reference
from ftdist.data.rows import PairRows
from ftdist.loss import IGNORED, full_log_probabilities
from ftdist.rundir import record
from ftdist.trainer import TokenTrainer

SUMS = ("loss", "pairs", "sft", "chosen_tokens", "chosen_ratio", *MEANS)
SAME = 0.05  # nats a token; policy and reference are the same model at the first step, but for rounding


class Tally(TrainerCallback, ExportableState):
    """Sums over all ranks' pairs since the last logged step; they go on in a resumed run."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.sums = [0.0] * len(names)
        self.dropped = False  # chosen answers had lost too much at the last logged step, which was said

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"sums": self.sums, "dropped": self.dropped}}

    def add(self, step: torch.Tensor) -> None:
        """Of one step."""
        self.sums = [a + b for a, b in zip(self.sums, step.tolist(), strict=True)]

    def take(self) -> torch.Tensor:
        """The sums, which begin anew."""
        taken, self.sums = self.sums, [0.0] * len(self.sums)
        return torch.tensor(taken, dtype=torch.float64)


class PreferenceTrainer(TokenTrainer):
    """Learns from PairRows what `objective` says, beside what `reference` knows."""

    train_dataset: PairRows  # type: ignore[assignment]  # narrower than Trainer's
    eval_dataset: PairRows  # type: ignore[assignment]  # narrower than Trainer's
    objective: Objective
    reference: Reference

    def __init__(
        self,
        *,
        objective: Objective,
        reference: Reference,
        disable_dropout: bool,
        chosen_drop: float | None,
        **kwargs: Any,
    ) -> None:
        """chosen_drop: nats a token that chosen answers may lose against the reference without a warning."""
        super().__init__(**kwargs)
        self.objective, self.reference = objective, reference
        self.chosen_drop = chosen_drop
        self.disable_dropout = disable_dropout
        self.tally = Tally(SUMS)
        self.add_callback(self.tally)
        self.step_sums: Any = 0
        if disable_dropout:
            without_dropout(self.model)

    # The loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step; pairs and chosen tokens in them, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_sums = 0
        counts = [0, 0]
        for batch in batches:
            chosen = (batch["targets"] != IGNORED).sum(1).chunk(2)[0]
            counts[0] += int((chosen > 0).sum())
            counts[1] += int(chosen.sum())
        every = self.keeper.ranks.gather(counts)
        return batches, torch.tensor([sum(column) for column in zip(*every, strict=True)], device=device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the mean over the global batch's pairs, times the world size."""
        assert not return_outputs and num_items_in_batch is not None
        if not self.examined:
            self._examine(model, inputs)
        pairs = self._pairs(model, inputs)
        count, tokens = num_items_in_batch.clamp(min=1)
        loss = self.objective.of_pairs(pairs).sum() / count
        if self.objective.sft:
            loss = loss - self.objective.sft * pairs.chosen.sum() / tokens
        loss = loss * self.accelerator.num_processes
        self.step_sums = self.step_sums + self._summed(pairs).detach()
        self.step_losses.append(loss.detach())
        return loss

    def log_probabilities(self, model: Any, batch: Mapping[str, torch.Tensor], head: Any = None) -> torch.Tensor:
        """log p (2·B,) of each sequence's supervised tokens; head: of another model than the trained one."""
        targets, head = batch["targets"], head or self.head
        with head.answering(targets if head.usable else None, each=True):
            output = self._forward(model, batch["input_ids"], batch["position_ids"])
        each = head.answer(output) if head.usable else full_log_probabilities(output, targets)
        owner = (targets != IGNORED).nonzero()[:, 0]
        return each.new_zeros(len(targets)).index_add(0, owner, each)

    def _pairs(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Pairs:
        """Both sides' log-probabilities of the batch's pairs, fillers left out."""
        known = batch.get("reference")
        if known is None:
            known = self.reference.live(self, model, batch)  # before the policy's own pass, which keeps activations
        policy = self.log_probabilities(model, batch)
        chosen_tokens, rejected_tokens = (batch["targets"] != IGNORED).sum(1).chunk(2)
        real = chosen_tokens > 0
        chosen, rejected, reference_chosen, reference_rejected = (
            half[real] for values in (policy, known) for half in values.chunk(2)
        )
        return Pairs(chosen, rejected, reference_chosen, reference_rejected, chosen_tokens[real], rejected_tokens[real])

    def _summed(self, p: Pairs) -> torch.Tensor:
        """SUMS (float64) over the pairs."""
        chosen, rejected = self.objective.beta * p.chosen_ratio, self.objective.beta * p.rejected_ratio
        columns = {
            "loss": self.objective.of_pairs(p),
            "pairs": torch.ones_like(p.chosen),
            "sft": -p.chosen,
            "chosen_tokens": p.chosen_tokens,
            "chosen_ratio": p.chosen_ratio,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
            "logps/chosen": p.chosen,
            "logps/rejected": p.rejected,
        }
        return torch.stack([columns[name].double().sum() for name in SUMS])

    # Evaluation: the parent's loop over each rank's share of the rows

    def _sums(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._summed(self._pairs(model, batch))

    def _means(self, totals: torch.Tensor) -> dict[str, float]:
        """Exact means over pairs."""
        sums = dict(zip(SUMS, totals.tolist(), strict=True))
        pairs, tokens = max(sums["pairs"], 1.0), max(sums["chosen_tokens"], 1.0)
        loss = sums["loss"] / pairs + self.objective.sft * sums["sft"] / tokens
        return {"loss": loss, **{name: sums[name] / pairs for name in MEANS}}

    # The record

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        self.tally.add(self.accelerator.reduce(self.step_sums, "sum"))
        return super()._get_grad_norm(model, grad_norm)

    def _judge_first(self, loss: float) -> None:  # noqa: ARG002  (ln 2 for one loss, something else for another)
        """Training starts from the reference, unless it is another model: their difference must be nothing, but
        for dropout, which the policy alone has."""
        if self.reference.is_start and self.disable_dropout:
            sums = dict(zip(SUMS, self.tally.sums, strict=True))
            self.health.first_difference(sums["chosen_ratio"] / max(sums["chosen_tokens"], 1.0), SAME)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means over the pairs since the last logged step."""
        if "loss" in logs:
            sums = self.tally.take()
            means = self._means(sums)
            logs |= {name: means[name] for name in MEANS}
            self._watch_chosen(dict(zip(SUMS, sums.tolist(), strict=True)))
        super().log(logs, start_time)

    def _watch_chosen(self, sums: dict[str, float]) -> None:
        """Both answers may become less likely while the margin grows: said once, and again after a recovery."""
        if self.chosen_drop is None:
            return
        drop = -sums["chosen_ratio"] / max(sums["chosen_tokens"], 1.0)
        if drop > self.chosen_drop and not self.tally.dropped and self.keeper.main:
            step = self.state.global_step
            text = (
                f"chosen answers have lost {drop:.3g} nats a token against the reference (task.chosen_drop="
                f"{self.chosen_drop:g}): the margin grows because rejected ones lose more; a larger task.beta, a "
                "smaller train.learning_rate or task.loss_type=[sigmoid,sft] keep them"
            )
            record(self.keeper.run_dir, self.keeper.token, "chosen-drop", step, text=text)
            print(f"warning: step {step}: {text}", flush=True)
        self.tally.dropped = drop > self.chosen_drop

    # The reference's log-probabilities, once

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.reference.ready(self)
        return prepared


def without_dropout(model: Any) -> None:
    """Policy and reference shall differ by their weights alone. Adapters' dropout too."""
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _silence(module)  # of those that call torch's functions themselves
        config = getattr(module, "config", None)
        # Falcon asks the configuration in its forward pass; the model's own is what will be saved
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in quiet:
                quiet[id(config)] = copy.deepcopy(config)
                _silence(quiet[id(config)])
            module.config = quiet[id(config)]


def _silence(owner: Any) -> None:
    for name, value in vars(owner).items():
        if re.search("dropout|pdrop|layerdrop", name) and isinstance(value, float):
            setattr(owner, name, 0.0)
