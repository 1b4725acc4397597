"""What a rank really used: peak memory in each phase, and the bytes of its live tensors by kind.

A GPU's peak is the allocator's own; a CPU's is the resident set of the process, whose high-water mark Linux lets a
process reset (proc(5), clear_refs).
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ftdist import rundir


class Meter(TrainerCallback):
    """Follows one rank through its phases. `write` leaves `logs/rank-N.memory.json`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.peaks: dict[str, int] = {}
        self.states: dict[str, dict[str, int]] = {}
        self.start = _used()
        self.seconds: list[float] = []
        self.trainer: Any = None
        self._open("load")

    def follow(self, trainer: Any) -> None:
        """Listen to this trainer's steps and evaluations."""
        self.trainer = trainer
        trainer.add_callback(self)

    def _open(self, phase: str) -> None:
        self._close()
        self.phase = phase
        _reset()

    def _close(self) -> None:
        if hasattr(self, "phase"):
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), _peak())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine exists from here on: its step is a phase of its own."""
        engine = self.trainer.model_wrapped
        owner = engine if hasattr(engine, "zero_optimization_stage") else self.trainer.optimizer
        inner = owner.step

        def step(*positional: Any, **named: Any) -> Any:
            boundary = owner is not engine or engine.is_gradient_accumulation_boundary()
            if boundary:
                self._count("backward")
                self._open("step")
            try:
                return inner(*positional, **named)
            finally:
                if boundary:
                    self._open("train")

        owner.step = step
        evaluate = self.trainer.evaluate

        def evaluation(*positional: Any, **named: Any) -> Any:
            with self.during("evaluation"):
                return evaluate(*positional, **named)

        self.trainer.evaluate = evaluation
        self._open("train")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of a step."""
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts once, when every optimizer state exists and gradients have gone."""
        self._count("between")
        self.seconds.append(time.monotonic() - self.began)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What runs inside is `phase`; afterwards the phase before goes on."""
        before = self.phase
        self._open(phase)
        try:
            yield
        finally:
            self._open(before)

    def _count(self, moment: str) -> None:
        if moment not in self.states:
            self.states[moment] = tensors(self.trainer)

    def write(self, run_dir: Path) -> None:
        """This rank's numbers, for `plan.json`."""
        self._close()
        steps = sorted(self.seconds[1:] or self.seconds)
        report = {
            "rank": self.rank,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "at_start_bytes": self.start,
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "peak_bytes": self.peaks,
            "outside_bytes": _outside(),
            "tensors": self.states,
            "step_seconds": steps[len(steps) // 2] if steps else None,
        }
        rundir.write_json(run_dir / "logs" / f"rank-{self.rank}.memory.json", report)


def tensors(trainer: Any) -> dict[str, int]:
    """Bytes of live tensors by kind; a storage counts once, in the first kind that holds it.

    `host_…`: what an engine keeps in the host's memory while the model is on a GPU. Every name of an engine's own
    attribute is DeepSpeed's (runtime/zero/stage_1_and_2.py, stage3.py).
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    engine = getattr(trainer.model_wrapped, "optimizer", None)  # DeepSpeed's, which wraps torch's
    parameters = list(model.parameters())

    def weights() -> Iterator[Any]:
        for parameter in parameters:
            yield from (parameter.data, getattr(parameter, "ds_tensor", None))
        yield from model.buffers()
        for name in ("bit16_groups_flat", "lp_param_buffer", "param_groups_fp16_flat_cpu_memory"):
            yield getattr(engine, name, None)

    def quantization() -> Iterator[Any]:
        for parameter in parameters:
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                yield from (state.absmax, state.code, getattr(state, "offset", None))
                state = state.state2

    def gradients() -> Iterator[Any]:
        for parameter in parameters:
            yield from (parameter.grad, getattr(parameter, "grad_accum", None))
        for name in ("grad_partitions_flat_buffer", "averaged_gradients", "all_grad_tensors"):
            yield getattr(engine, name, None)

    def states() -> Iterator[Any]:
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            for part in getattr(engine, name, None) or ():
                yield from (part, part.grad)
        yield getattr(engine, "param_buffer_of_bit16_for_cpu_offload_groups", None)
        yield from optimizer.state.values()

    def reference() -> Iterator[Any]:  # of task=dpo, a frozen model beside
        copy = getattr(getattr(trainer, "reference", None), "copy", None)
        for parameter in copy.parameters() if copy is not None else ():
            yield from (parameter.data, getattr(parameter, "ds_tensor", None))

    def buckets() -> Iterator[Any]:
        for bucket in getattr(engine, "ipg_buckets", {}).values():
            yield bucket.buffer

    def penalty() -> Iterator[Any]:
        consolidation = getattr(trainer, "consolidation", None)
        yield from consolidation.tensors() if consolidation is not None else ()

    kinds = {
        "weights": weights,
        "quantization": quantization,
        "gradients": gradients,
        "optimizer": states,
        "buckets": buckets,
        "penalty": penalty,
        "reference": reference,
    }
    seen: set[tuple[str, int]] = set()
    counted: dict[str, int] = {}
    for kind, found in kinds.items():
        counted[kind] = 0
        for tensor in _flat(found()):
            storage = tensor.untyped_storage()
            key = (str(tensor.device), storage.data_ptr())
            if storage.nbytes() and key not in seen:
                seen.add(key)
                name = f"host_{kind}" if torch.cuda.is_available() and tensor.device.type == "cpu" else kind
                counted[name] = counted.get(name, 0) + storage.nbytes()
    return counted


def _flat(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _flat(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def _used() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else _status("VmHWM")


def _outside() -> int:
    """Bytes of a GPU that are used but not torch's: context, NCCL (and other programs, if it is shared)."""
    if not torch.cuda.is_available():
        return 0  # a resident set has everything in it
    free, total = torch.cuda.mem_get_info()
    return max(int(total - free - torch.cuda.memory_reserved()), 0)


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # a sandbox that forbids it: the peak of a phase then holds earlier ones'
            Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
