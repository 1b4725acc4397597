"""Where the time of training goes (`train.profile=true`): seconds by phase on every rank, the length of each step, and
torch's trace of a few steps.

A phase's seconds are its own: what runs inside another phase counts for the inner one alone. On a GPU every phase waits
for the device, so that work is counted where it was asked for; such a run is slower than one without a profile.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ftdist import rundir
from ftdist.report.phases import FOLDER, PHASES

CLOSED = ("evaluation", "save")  # what runs inside them is not told apart
SKIPPED, TRACED = 1, 2  # steps of a start before the trace, and in it
# Of torch.distributed and deepspeed.comm. Where one of them does not wait, the waiting counts for the phase around it.
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "reduce", "broadcast",
               "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "barrier", "broadcast_object_list",
               "all_reduce_coalesced", "all_gather_coalesced", "allgather_fn", "reduce_scatter_fn")  # fmt: skip


class Clock:
    """Seconds by phase; the innermost open phase is the one that runs."""

    def __init__(self, now: Callable[[], float] = time.monotonic, wait: Callable[[], None] = lambda: None) -> None:
        """wait: until the device has done what it was asked for."""
        self.now, self.wait = now, wait
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.stack = ["other"]
        self.since = now()

    def _turn(self) -> None:
        self.wait()
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts for `name`."""
        if self.stack[-1] in CLOSED:
            yield
            return
        self._turn()
        self.stack.append(name)
        try:
            with torch.profiler.record_function(f"ftdist: {name}"):
                yield
        finally:
            self._turn()
            self.stack.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `name`."""

        @functools.wraps(function)
        def inside(*positional: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*positional, **named)

        return inside


class Profile(TrainerCallback):
    """Follows one rank; leaves `profile/from-STEP-rank-N.json` and a trace beside it. STEP: the first of this start."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder, self.rank = run_dir / FOLDER, rank
        self.steps: list[float] = []
        self.trace: Any = None
        self.traced: dict[str, Any] = {}

    def follow(self, trainer: Any) -> None:
        """Put the clock around what the trainer does."""
        self.trainer = trainer
        self.clock = clock = Clock(wait=torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
        trainer.add_callback(self)
        samples = trainer.get_batch_samples

        def get_batch_samples(rows: Any, *rest: Any) -> Any:
            with clock.phase("data"):
                return samples(rows, *rest)

        trainer.get_batch_samples = get_batch_samples
        for name, phase in (
            ("_forward", "forward"),
            ("log", "logging"),
            ("_save_checkpoint", "save"),
            ("evaluate", "evaluation"),
        ):
            setattr(trainer, name, clock.timed(phase, getattr(trainer, name)))
        trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = clock.timed("optimizer", trainer.accelerator.clip_grad_norm_)
        if trainer.head.usable:
            trainer.head.module.forward = clock.timed("loss", trainer.head.module.forward)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine exists from here on."""
        self.first = state.global_step + 1
        engine = self.trainer.model_wrapped
        # under DeepSpeed torch's optimizer lies inside; the engine's own reduces gradients on the way
        owner = getattr(engine, "optimizer", None) if hasattr(engine, "zero_optimization_stage") else None
        owner = owner or self.trainer.optimizer
        owner.step = self.clock.timed("optimizer", owner.step)
        self.collectives = contextlib.ExitStack()
        for module in filter(None, (dist, sys.modules.get("deepspeed.comm"))):
            for name in COLLECTIVES:
                if hasattr(module, name):
                    self.collectives.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, self.clock.timed("communication", getattr(module, name)))
        self.began = self.clock.now()
        self.clock.seconds = dict.fromkeys(PHASES, 0.0)
        self.clock.since = self.began
        self.mark = (self.began, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trace begins after the first steps of a start, which are not like the others."""
        if self.trace is None and state.global_step + 1 == self.first + SKIPPED:
            self.trace = torch.profiler.profile()
            self.trace.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step lasts from the end of the one before, evaluations and saves taken out."""
        paused = sum(self.clock.seconds[name] for name in CLOSED)
        now = self.clock.now()
        before, then = self.mark
        self.steps.append(now - before - (paused - then))
        self.mark = (now, paused)
        if state.global_step == self.first + SKIPPED + TRACED - 1:
            self._stop_trace()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a run that is killed later, this much is known."""
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last word of this start."""
        self._stop_trace()
        self._write()
        self.collectives.close()

    def _stop_trace(self) -> None:
        """Write the trace, if one is being made; a start of too few steps has none."""
        if self.trace is None or self.traced:
            return
        self.trace.stop()
        steps = len(self.steps) - SKIPPED
        self.folder.mkdir(exist_ok=True)
        self.trace.export_chrome_trace(str(self.folder / f"{self._name()}.trace.json.gz"))
        flying = [e.time_range.elapsed_us() for e in self.trace.events() if e.name.startswith(("gloo:", "nccl:"))]
        self.traced = {"steps": steps, "collective_seconds": sum(flying) / 1e6}

    def _name(self) -> str:
        return f"from-{self.first}-rank-{self.rank}"

    def _write(self) -> None:
        self.clock._turn()
        self.folder.mkdir(exist_ok=True)
        found = {
            "rank": self.rank,
            "first_step": self.first,
            "wall_seconds": self.clock.now() - self.began,
            "seconds": self.clock.seconds,
            "step_seconds": self.steps,
            "trace": self.traced,
        }
        rundir.write_json(self.folder / f"{self._name()}.json", found)
