"""Numbers that say a run is going wrong, looked at before the optimizer uses them; the same answer on every rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist.errors import FENCED, STOPPED, Failed
from ftdist.rundir import leave_out, left_out, record

WINDOW = 50  # gradient norms that a new one is compared with
ENOUGH = 10  # of them before anything is called a spike
GUESSING = 1.5  # a first loss above so many times the logarithm of the vocabulary is worse than guessing
LEAKED = 1e-3  # a first loss below has seen its answers


def settings(
    *,
    nonfinite: Literal["stop", "skip", "roll_back", "warn"],
    spike: Literal["stop", "skip", "roll_back", "warn", "ignore"],
    spike_factor: Annotated[float, Field(gt=1)],
    no_tokens: Literal["stop", "warn"],
    first_loss: Literal["stop", "warn", "ignore"],
    stall_minutes: Annotated[float, Field(gt=0)],
    grace_seconds: Annotated[float, Field(ge=0)],
    max_restarts: Annotated[int, Field(ge=0)],
) -> None:
    """The keys of `health`: those of numbers, and those of whoever watches over the ranks."""


class Health:
    """Judges each step's gradient norm and loss, and keeps the optimizer from a step that is to be left out."""

    def __init__(
        self,
        run_dir: Path,
        token: int,
        main: bool,
        *,
        nonfinite: str,
        spike: str,
        spike_factor: float,
        no_tokens: str,
        first_loss: str,
    ) -> None:
        self.run_dir, self.token, self.main = run_dir, token, main
        self.losses: Callable[[], list[float]] = list  # gathers every rank's share of the step's loss, for the record
        self.nonfinite, self.spike, self.spike_factor = nonfinite, spike, spike_factor
        self.no_tokens, self.first_loss = no_tokens, first_loss
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.left_out = set(left_out(run_dir))
        self.scaled = False  # fp16: overflow belongs to the loss scaler's search
        self.judged = 0  # the last step that was judged, and whether it may be applied
        self.applies = True

    def guard(self, optimizer: Any, norm: Callable[[], float], step: Callable[[], int]) -> None:
        """Have every step of torch's optimizer ask first. Under ZeRO it runs once for each group of weights."""
        inner = optimizer.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) if self.may_apply(step(), norm()) else None

        optimizer.step = guarded

    def may_apply(self, step: int, norm: float) -> bool:
        """Whether the gradients of `step` (counted from 1), of this global norm, are to change the weights."""
        if step != self.judged:
            self.judged, self.applies = step, self._judge(step, norm)
        return self.applies

    def _judge(self, step: int, norm: float) -> bool:
        if step in self.left_out:
            self._say(step, "left-out", "left out, as decided before")
            return False
        if not math.isfinite(norm):
            if self.scaled and all(map(math.isfinite, self.losses())):
                return True  # too large a loss scale: the scaler leaves the step out and takes a smaller one
            return self._act(self.nonfinite, "nonfinite", step, norm, "the gradients are not finite")
        usual = statistics.median(self.norms) if len(self.norms) >= ENOUGH else math.inf
        self.norms.append(norm)
        if self.spike != "ignore" and norm > self.spike_factor * usual:
            text = f"the gradient norm {norm:.4g} is {norm / usual:.3g} times the median of the last {len(self.norms)}"
            return self._act(self.spike, "spike", step, norm, text)
        return True

    def tokens(self, step: int, count: int) -> None:
        """`count`: supervised tokens of the step, over all ranks."""
        if count == 0:
            self._act(self.no_tokens, "no_tokens", step, 0.0, "no token of this step is supervised")

    def first(self, loss: float, vocabulary: int) -> None:
        """The mean loss of the first step."""
        if self.first_loss == "ignore":
            return
        if not loss < GUESSING * math.log(vocabulary):
            text = (
                f"the first loss {loss:.4g} is worse than guessing among {vocabulary:,} tokens; wrong weights or data?"
            )
        elif loss < LEAKED:
            text = f"the first loss {loss:.4g} is next to nothing; do the prompts hold the answers?"
        else:
            return
        self._act(self.first_loss, "first_loss", 1, math.nan, text)

    def first_difference(self, difference: float, most: float) -> None:
        """Of log-probabilities (nats a token) between the policy and its reference, before anything was learnt."""
        if self.first_loss != "ignore" and not abs(difference) <= most:
            text = f"policy and reference differ by {difference:.4g} nats a token before the first step"
            self._act(self.first_loss, "first_loss", 1, math.nan, text)

    def _act(self, action: str, kind: str, step: int, norm: float, text: str) -> bool:
        losses = [repr(loss) for loss in self.losses()]
        self._say(step, kind, text, action=action, grad_norm=repr(norm), loss_by_rank=losses)
        if action == "stop":
            raise Failed(f"step {step}: {text} (health.{kind}=stop)", FENCED)
        if action == "roll_back":
            if self.main:
                leave_out(self.run_dir, self.token, step)
            raise Failed(f"step {step}: {text}; back to the last checkpoint, to leave this step out", STOPPED)
        return action in ("warn", "ignore")

    def _say(self, step: int, kind: str, text: str, **facts: Any) -> None:
        if self.main:
            record(self.run_dir, self.token, f"health-{kind}", step, text=text, **facts)
            print(f"warning: step {step}: {text}", flush=True)
