"""Which evaluated step is the best, when to end early, and since when a run overfits. Plain numbers, no engine."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist.errors import UserError
from ftdist.schema import nearest

PLATEAUS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a metric
ROUNDING = 1e-9  # a set that has lost just what is allowed is kept
TRAINING = ("loss", "loss_target", "loss_general", "grad_norm", "learning_rate", "tokens_per_second")
LOWER, HIGHER = (
    r"(loss|loss_target|loss_general|perplexity|grad_norm|_change)$",
    r"(match|bleu|chrf|rouge\w*|accurac\w+|margins|rewards/chosen|tokens_per_second)$",
)


def settings(
    *,
    metric: str,
    direction: Literal["auto", "min", "max"],
    patience: Annotated[int, Field(ge=1)] | None,
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)],
    max_forgetting: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
    restore_best: bool,
    overfitting_after: Annotated[int, Field(ge=1)] | None,
    overfitting_rise: Annotated[float, Field(ge=0, allow_inf_nan=False)],
) -> None:
    """The keys of `stopping`, which Judge reads, and whoever restores the best step."""


def sign(metric: str, direction: str) -> int:
    """+1 where a lower value is better, else -1. UserError for a metric that says nothing of it."""
    if direction != "auto":
        return 1 if direction == "min" else -1
    for pattern, found in ((LOWER, 1), (HIGHER, -1)):
        if re.search(pattern, metric):
            return found
    raise UserError(f"stopping.metric={metric}: is a lower or a higher value better? set stopping.direction=min or max")


def check(
    values: Mapping[str, Any],
    *,
    eval_strategy: str,
    schedule: str,
    logging_steps: float,
    eval_steps: float | None,
    retention: Collection[str],
    replay: bool,
    saves: bool,
    held_out: Collection[str],
    training: Collection[str],
) -> None:
    """UserError for what cannot be: a metric that is not recorded, no evaluation to judge, no checkpoint to restore.

    retention: what every general set is called, where they are measured while training; saves: whether the engine can;
    held_out: metrics that an evaluation records (without `eval_`); training: those that the task logs beside its loss.
    """
    metric = values["metric"]
    of_sets = [f"eval_{name}_{what}" for name in retention for what in ("loss", "change")]
    of_sets += ["eval_retention_loss"] if len(retention) > 1 else []
    of_parts = ("loss_target", "loss_general") if replay else ()
    logged = (*(name for name in TRAINING if not name.startswith("loss_")), *of_parts, *training)
    known = (*logged, *(f"eval_{name}" for name in held_out), *of_sets)
    if metric not in known:
        raise UserError(f"stopping.metric={metric}: not recorded by this run; {nearest(metric, known)}")
    if metric in logged and eval_strategy == "steps" and eval_steps and 1 <= eval_steps < logging_steps:
        raise UserError(
            f"stopping.metric={metric}: logged every {logging_steps:g} steps and judged every {eval_steps:g}; set "
            f"train.logging_steps={eval_steps:g} or less"
        )
    sign(metric, values["direction"])
    wants = {f"stopping.{k}={values[k]}": values[k] for k in ("patience", "max_forgetting", "restore_best")}
    wants[f"train.lr_scheduler_type={schedule}"] = schedule in PLATEAUS
    for key, wanted in wants.items():
        if wanted not in (None, False) and eval_strategy == "no":
            raise UserError(
                f"{key}: nothing is evaluated while training; set train.eval_strategy=steps train.eval_steps=N"
            )
    if schedule in PLATEAUS and not metric.startswith("eval_"):
        raise UserError(
            f"train.lr_scheduler_type={schedule}: follows an evaluation, and stopping.metric={metric} is none"
        )
    if values["max_forgetting"] is not None and not retention:
        raise UserError(
            f"stopping.max_forgetting={values['max_forgetting']}: of what? name general data with eval.retention=FILE"
        )
    if values["restore_best"] and not saves:
        raise UserError("stopping.restore_best=true: engine=zero3_nvme has no checkpoints to restore from")


@dataclass
class Memory:
    """What the judge remembers; in every checkpoint, so that a resumed run ends at the same step."""

    best: float | None = None
    best_step: int | None = None
    reference: float | None = None  # the value that patience counts improvements from
    waited: int = 0  # evaluations since
    stop: str | None = None  # why training ends
    base: dict[str, float] = field(default_factory=dict)  # losses on the retention sets before the first step
    logged: dict[str, float] = field(default_factory=dict)  # last values of training, as far as they are the metric
    training: list[Any] = field(default_factory=lambda: [0.0, 0])  # sum and number of losses since the evaluation
    before: float | None = None  # mean training loss in front of the last evaluation
    lowest: list[Any] | None = None  # step, held-out loss and training loss of the lowest held-out loss
    risen: int = 0  # evaluations in a row above it
    overfitting: int | None = None  # the step since which that was said


@dataclass(frozen=True)
class Verdict:
    """What an evaluation means. score: lower is better, None for a step that does not count, and `why_not` in words
    where it is not NaN."""

    score: float | None
    best: bool
    why_not: str | None
    stop: str | None
    overfitting: int | None


class Judge:
    """Told of every logged loss and of every evaluation, in their order; the same answers on every rank."""

    def __init__(
        self,
        *,
        metric: str,
        direction: str,
        patience: int | None,
        min_delta: float,
        max_forgetting: float | None,
        restore_best: bool,
        overfitting_after: int | None,
        overfitting_rise: float,
    ) -> None:
        self.metric, self.sign = metric, sign(metric, direction)
        self.patience, self.min_delta, self.max_forgetting = patience, min_delta, max_forgetting
        self.restore_best = restore_best
        self.overfitting_after, self.overfitting_rise = overfitting_after, overfitting_rise
        self.memory = Memory()

    def state(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self.memory)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.memory = Memory(**state)

    def trained(self, logs: Mapping[str, Any]) -> None:
        """A log line of training. With replay its loss is that of the special data."""
        loss = logs.get("loss_target", logs["loss"])
        if math.isfinite(loss):
            self.memory.training = [self.memory.training[0] + loss, self.memory.training[1] + 1]
        if self.metric in logs:
            self.memory.logged[self.metric] = logs[self.metric]

    def change(self, name: str, loss: float) -> float | None:
        """How much a retention loss has risen, as a share of the base's; None where that is not known."""
        base = self.memory.base.get(name)
        return None if not base else loss / base - 1

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """UserError where the metric was not recorded after all. One of training waits for its first logged value."""
        memory = self.memory
        value = metrics.get(self.metric, memory.logged.get(self.metric))
        if value is None and not self.metric.startswith("eval_"):
            why_not = f"{self.metric} has not been logged yet (train.logging_steps)"
            return Verdict(None, False, why_not, memory.stop, self._overfits(step, metrics))
        if value is None:
            known = sorted({*(k for k in metrics if k.startswith("eval_")), *TRAINING})
            raise UserError(f"stopping.metric={self.metric}: not recorded by this run; {nearest(self.metric, known)}")
        forgotten = self._forgotten(metrics)
        score = None if forgotten or not math.isfinite(value) else self.sign * value
        best = score is not None and (memory.best is None or score < memory.best)
        if best:
            memory.best, memory.best_step = score, step
        if score is not None and (memory.reference is None or score < memory.reference - self.min_delta):
            memory.reference, memory.waited = score, 0
        else:
            memory.waited += 1
            if self.patience is not None and memory.waited >= self.patience:
                memory.stop = (
                    f"{self.metric} has not improved in {memory.waited} evaluations (stopping.patience); "
                    f"{self.said_of_best()}"
                )
        return Verdict(score, best, forgotten, memory.stop, self._overfits(step, metrics))

    def said_of_best(self) -> str:
        """The best step in words."""
        if self.memory.best is None:
            return "no evaluated step counts"
        return f"the best was {self.sign * self.memory.best:.4g} at step {self.memory.best_step}"

    def _forgotten(self, metrics: Mapping[str, float]) -> str | None:
        """The set that lost most, in words, if that is more than what is allowed."""
        if self.max_forgetting is None:
            return None
        changes = {name: self.change(name, metrics[name]) for name in self.memory.base}
        worst = max(changes, key=lambda name: math.inf if (c := changes[name]) is None or math.isnan(c) else c)
        change = changes[worst]
        if change is not None and change <= self.max_forgetting + ROUNDING:
            return None
        name = worst.removeprefix("eval_").removesuffix("_loss")
        return f"{name} has lost {'?' if change is None else f'{change:+.2%}'} (stopping.max_forgetting)"

    def _overfits(self, step: int, metrics: Mapping[str, float]) -> int | None:
        """The step since which the held-out loss has risen while the training loss fell; None, or if it was said."""
        memory, held_out = self.memory, metrics.get("eval_loss")
        total, count = memory.training
        memory.training = [0.0, 0]
        memory.before = total / count if count else memory.before
        if held_out is None or not math.isfinite(held_out) or self.overfitting_after is None:
            return None
        if memory.lowest is None or held_out < memory.lowest[1]:
            memory.lowest = [step, held_out, memory.before]
            memory.risen, memory.overfitting = 0, None
            return None
        since, lowest, training = memory.lowest
        fell = None not in (memory.before, training) and memory.before < training
        memory.risen = memory.risen + 1 if held_out > lowest * (1 + self.overfitting_rise) and fell else 0
        if memory.risen < self.overfitting_after or memory.overfitting is not None:
            return None
        memory.overfitting = int(since)
        return memory.overfitting
