"""What a run tells while it runs: metrics.jsonl, a live line or plain lines, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ftdist import rundir

if TYPE_CHECKING:
    from transformers import TrainerCallback

Log = Callable[[dict[str, Any], int], None]
COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second")
WRITTEN = "written.json"  # in RUN/wandb: the last step that W&B's client has written, when it ended in order
HELD_OUT = {"eval_perplexity": "perplexity", "eval_rewards/accuracies": "preference accuracy"}  # said beside the loss


def start(run_dir: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    """How to log a step's metrics, and what to call at the end. Called by global rank 0 alone."""
    tracking = config["tracking"]
    if tracking["name"] == "none":
        return no_run(**tracking)
    return wandb_run(run_dir, config, **tracking)


def function(name: Any) -> Callable[..., Any]:
    """The function whose signature is the schema of this choice's keys."""
    return no_run if name == "none" else wandb_run


def no_run(*, name: str) -> tuple[Log, Callable[[], None]]:
    """Tracking is off: metrics.jsonl stays the only record."""
    assert name == "none"
    return (lambda *_: None), (lambda: None)


def wandb_run(
    run_dir: Path,
    config: dict[str, Any],
    *,
    name: str,
    project: str,
    entity: str | None,
    group: str | None,
    job_type: str | None,
    tags: list[str],
) -> tuple[Log, Callable[[], None]]:
    """A W&B run of its own client: online when logged in, else offline in the run directory.

    What a start that was killed has logged may have been in the client's memory alone: the steps since the last end in
    order are logged again, except those that the server has.
    """
    assert name == "wandb"
    run = _opened(run_dir, config, project, entity, group, job_type, tags)
    written = run_dir / "wandb" / WRITTEN
    last = int(rundir.read_json(written).get("step", -1))

    def log(metrics: dict[str, Any], step: int) -> None:
        nonlocal last
        run.log(metrics, step=step)
        last = max(last, step)

    def finish() -> None:
        run.finish()
        written.parent.mkdir(exist_ok=True)  # WANDB_MODE=disabled makes none
        rundir.write_json(written, {"step": last})

    first = max(last + 1, run.starting_step)
    file = run_dir / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        row = json.loads(line)
        if row["step"] >= first:
            log(_told(row), row["step"])
    return log, finish


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """What W&B gets of a row of metrics.jsonl."""
    return {key: value for key, value in row.items() if key != "step" and value is not None}


def results(run_dir: Path, config: dict[str, Any], pictures: Path) -> None:
    """The evaluation's numbers and samples as tables, and the page's plots, into the W&B run of this directory."""
    import wandb

    keys = ("project", "entity", "group", "job_type", "tags")
    run = _opened(run_dir, config, *(config["tracking"][key] for key in keys))
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text(encoding="utf-8"))
    table = wandb.Table(columns=["metric", "base", "tuned", "difference", "low", "high", "wins", "ties", "losses"])
    for name, value in metrics["tuned"].items():
        difference = metrics["difference"].get(name, {})
        rest = (difference.get(key) for key in ("difference", "low", "high", "wins", "ties", "losses"))
        table.add_data(name, metrics["base"].get(name), value, *rest)
    samples = wandb.Table(columns=["prompt", "reference", "base", "tuned"])
    for line in (run_dir / "eval" / "samples.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        samples.add_data(*(row.get(key) for key in ("prompt", "reference", "base", "tuned")))
    sides = {f"eval/{side}/{name}": value for side in ("base", "tuned") for name, value in metrics[side].items()}
    plots = {f"plots/{file.stem}": wandb.Image(str(file)) for file in sorted(pictures.glob("*.png"))}
    rows = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])["step"] if rows else 0  # W&B drops what comes with an earlier step
    values = {name: value for name, value in sides.items() if value is not None}
    run.log(values | {"eval/table": table, "eval/samples": samples} | plots, step=last)
    run.finish()


def _opened(
    run_dir: Path, config: dict[str, Any], project: str, entity: str | None, group: str | None, job_type: str | None,
    tags: list[str],
) -> Any:  # fmt: skip
    """The id was made with the run directory, so that a run is one run however often it is started."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own telemetry, which calls home even when offline
    import wandb

    mode: Any = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    return wandb.init(
        project=project,
        entity=entity,
        group=group,
        job_type=job_type or config["task"]["name"],
        tags=tags,
        id=json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["id"],
        name=run_dir.name,
        resume="allow",
        dir=run_dir,
        config=config,
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )


def forget_after(run_dir: Path, step: int, evaluates: bool) -> None:
    """Take the lines of steps that will be trained again out of metrics.jsonl. An old writer keeps the old file.

    evaluates: what was measured on held-out rows at `step` will be measured again.
    """
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step or (row["step"] == step and not (evaluates and _held_out(row))):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line that was cut when the run was killed
    partial = file.with_name(".metrics.jsonl")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(file)


def follow(run_dir: Path, log: Log, out: IO[str], token: int) -> TrainerCallback:
    """Writes metrics.jsonl, prints a live line on a terminal and plain lines elsewhere. For global rank 0 only.

    token: of the lease; nothing is written into a run that somebody else has taken over.
    """
    from transformers import TrainerCallback

    from ftdist import checkpoint, lease
    from ftdist.errors import Failed

    class Follow(TrainerCallback):
        def __init__(self) -> None:
            self.file = (run_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
            self.live = out.isatty()
            self.printed = 0.0
            self.started: tuple[int, float] | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.started is None:  # after the first step: its time is start-up, not speed
                self.started = (state.global_step, time.monotonic())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step = state.global_step
            if "eval_loss" in logs:
                self._record({"step": step, **logs})
                more = [f"{meaning} {logs[key]:.4g}" for key, meaning in HELD_OUT.items() if key in logs]
                said = ", ".join([f"step {step}: held-out loss {logs['eval_loss']:.4f}", *more])
                self._say(f"{said}{_of_retention(logs)}", keep=True)
            elif _held_out(logs):
                self._record({"step": step, **logs})
                self._say(f"step {step}{_of_retention(logs)}", keep=True)
            elif "loss" in logs:
                row = {"step": step, **{k: logs.get(k) for k in COLUMNS}, "epoch": logs.get("epoch")}
                row |= {k: v for k, v in logs.items() if k not in row}
                self._record({**row, "memory_gib": round(memory_gib(), 4)})
                self._say(self._line(step, state.max_steps, logs), keep=step >= state.max_steps)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.file.close()

        def _record(self, row: dict[str, Any]) -> None:
            lease.check(run_dir, token)
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            try:
                self.file.write(json.dumps(row) + "\n")
            except OSError as failure:
                newest = next(iter(checkpoint.steps(run_dir)), None)
                why = f"metrics.jsonl cannot be written ({failure.strerror})"
                raise Failed(f"{why}; the newest checkpoint is that of step {newest}")
            log(_told(row), row["step"])

        def _line(self, step: int, steps: int, logs: dict[str, Any]) -> str:
            left = ""
            if self.started and step > self.started[0]:
                pace = (time.monotonic() - self.started[1]) / (step - self.started[0])
                left = f" · {duration(pace * (steps - step))} left"
            return (
                f"step {step}/{steps} · loss {logs['loss']:.4f}{_of_parts(logs)} · lr {logs['learning_rate']:.2e} · "
                f"{logs['tokens_per_second']:,.0f} tokens/s · {memory_gib():.2f} GiB{left}"
            )

        def _say(self, text: str, keep: bool) -> None:
            if self.live:
                out.write(f"\r\x1b[K{text}" + ("\n" if keep else ""))
            elif keep or time.monotonic() - self.printed > 2:
                self.printed = time.monotonic()
                out.write(text + "\n")
            out.flush()

    return Follow()


def _held_out(row: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in row)


def _of_retention(logs: dict[str, Any]) -> str:
    parts = []
    for name, value in logs.items():
        if name.startswith("eval_retention") and name.endswith("_loss"):
            stem = name.removesuffix("_loss")
            change = logs.get(f"{stem}_change")
            said = "" if change is None else f" ({change:+.2%})"
            parts.append(f"{stem.removeprefix('eval_').replace('_', ' ')} {value:.4f}{said}")
    return "".join(f"; {part}" for part in parts)


def _of_parts(logs: dict[str, Any]) -> str:
    if "loss_general" not in logs:
        return ""
    return f" (target {logs['loss_target']:.4f}, general {logs['loss_general']:.4f})"


def memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else of the host."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
