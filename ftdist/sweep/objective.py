"""The number that ranks the members of a sweep: named by a key, read from the files of a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ftdist import evaluate as evaluation
from ftdist import judge, schema
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
    file, found = run_dir / "metrics.jsonl", {}
    if not file.is_file():
        return []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that is being written, or was cut when the run was killed
        if _is_number(row.get(name)):
            found[int(row["step"])] = float(row[name])
    return sorted(found.items())


def value(run_dir: Path, name: str) -> float | None:
    """The objective of a run: of the last line that has it, or of the evaluation; None where there is none (yet).

    Where the best step's weights were restored at the end, it is that step's value.
    """
    if not name.startswith(TUNED):
        step = _restored(run_dir)
        line = [value for at, value in series(run_dir, name) if step is None or at <= step]
        return line[-1] if line else None
    file = run_dir / "eval" / "metrics.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("tuned", {}).get(name.removeprefix(TUNED))
    return float(found) if _is_number(found) else None


def _restored(run_dir: Path) -> int | None:
    """The step whose weights final/ holds, where it is not the last one."""
    file = run_dir / "events.jsonl"
    found = None
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if '"best-restored"' in line:
            found = int(json.loads(line)["step"])
    return found


def seen(run_dir: Path) -> list[str]:
    """Every name that a run has recorded a number under."""
    names: dict[str, None] = {}
    for file, prefix in ((run_dir / "metrics.jsonl", ""), (run_dir / "eval" / "metrics.json", TUNED)):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(text).get("tuned", {})] if prefix else map(json.loads, text.splitlines())
        names |= {prefix + key: None for row in rows for key, value in row.items() if _is_number(value)}
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
