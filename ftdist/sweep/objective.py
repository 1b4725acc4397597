"""The number that ranks the members of a sweep: named by a key, read from the files of a run."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftdist import evaluate as evaluation
from ftdist import judge, rundir, schema
from ftdist.errors import UserError

TUNED = "tuned."  # before a name: of eval/metrics.json, which the evaluation after training writes


def recorded(config: dict[str, Any]) -> list[str]:
    """The names that a run of this configuration is known to record."""
    wanted = config["eval"]
    names = [*judge.TRAINING, "tokens", "memory_gib"]
    if config["train"]["eval_strategy"] != "no":
        names += [f"eval_{name}" for name in ("loss", "perplexity", *evaluation.recorded(wanted))]
    if evaluation.afterwards(wanted, config["stopping"]):
        answers = evaluation.recorded({**wanted, "during": wanted["samples"]})
        names += [TUNED + name for name in ("loss", "perplexity", *answers)]
    return names


def check(name: str, config: dict[str, Any]) -> None:
    """UserError where nothing would record the objective."""
    wanted, names = config["eval"], recorded(config)
    if name.startswith(TUNED) and not evaluation.afterwards(wanted, config["stopping"]):
        raise UserError(f"sweep.objective={name}: nothing is evaluated after training; set eval.samples=200")
    if name.startswith("eval_") and config["train"]["eval_strategy"] == "no":
        raise UserError(f"sweep.objective={name}: train.eval_strategy=no evaluates nothing; use epoch or steps")
    # a task's own, a set's, a judge's, a harness's: what they are called is seen when they are recorded
    later = "/" in name or (wanted["retention"] and re.match(r"(eval_|tuned\.)retention", name))
    later = later or (name.startswith(TUNED) and (wanted["lm_eval"] or name.startswith(f"{TUNED}g_eval")))
    if name not in names and not later:
        raise UserError(f"sweep.objective={name}: no run records it; {schema.nearest(name, names)}")


def while_training(name: str) -> bool:
    """Whether an evaluation during training gives it, so that a trial can be pruned by it."""
    return name.startswith("eval_")


def series(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of metrics.jsonl that has a finite one, as far as the run has come."""
    rows = _rows(run_dir / "metrics.jsonl")
    return sorted({int(row["step"]): float(row[name]) for row in rows if _is_number(row.get(name))}.items())


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Of a file of lines, but the one that is being written, or was cut when the run was killed."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):  # of a cut line a number may be left
                yield row


def value(run_dir: Path, name: str) -> float | None:
    """The objective of a run: of the last line that has it, or of the evaluation; None where there is none (yet).

    Where the best step's weights were restored at the end, it is that step's value.
    """
    if not name.startswith(TUNED):
        step = _restored(run_dir)
        line = [value for at, value in series(run_dir, name) if step is None or at <= step]
        return line[-1] if line else None
    tuned = rundir.read_json(run_dir / "eval" / "metrics.json").get("tuned", {})
    found = tuned.get(name.removeprefix(TUNED))
    return float(found) if _is_number(found) else None


def _restored(run_dir: Path) -> int | None:
    """The step whose weights final/ holds, where it is not the last one."""
    found = [int(row["step"]) for row in _rows(run_dir / "events.jsonl") if row.get("event") == "best-restored"]
    return found[-1] if found else None


def seen(run_dir: Path) -> list[str]:
    """Every name that a run has recorded a number under."""
    names: dict[str, None] = {}
    for row in _rows(run_dir / "metrics.jsonl"):
        names |= {key: None for key, value in row.items() if _is_number(value)}
    tuned = rundir.read_json(run_dir / "eval" / "metrics.json").get("tuned", {})
    names |= {TUNED + key: None for key, value in tuned.items() if _is_number(value)}
    return [name for name in names if name not in ("step", "epoch")]


def order(values: dict[str, float | None], direction: str) -> list[str]:
    """Names, best first; those without a number last, as they came."""
    sign = 1.0 if direction == "minimize" else -1.0

    def key(name: str) -> float:
        value = values[name]
        return math.inf if value is None else sign * value

    return sorted(values, key=key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
