"""The number that ranks the members of a sweep: named by a key, read from the files of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ftdist import schema
from ftdist.errors import UserError

TUNED = "tuned."  # before a name: of eval/metrics.json, which the evaluation after training writes
STEPS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gib")
ANSWERS = {"exact_match": ("exact_match",), "bleu": ("bleu",), "chrf": ("chrf",),
           "rouge": ("rouge1", "rouge2", "rougeL")}  # fmt: skip


def recorded(config: dict[str, Any]) -> list[str]:
    """Every name that a run of this configuration records."""
    names, wanted = list(STEPS), config["eval"]
    answers = [name for metric in wanted["metrics"] for name in ANSWERS[metric]]
    answers += ["extracted_match"] if wanted["answer_pattern"] else []
    if config["train"]["eval_strategy"] != "no":
        names += ["eval_loss", "eval_perplexity"]
        names += [f"eval_{name}" for name in answers] if wanted["during"] else []
    if wanted["samples"]:
        after = ["loss", "perplexity", *answers]
        after += ["retention_loss", "retention_perplexity"] if wanted["retention"] else []
        criteria = wanted["g_eval"]["criteria"]
        after += [f"g_eval_{name}" for name in criteria] if isinstance(criteria, dict) else []
        after += ["g_eval"] if criteria else []
        names += [TUNED + name for name in after]
    return names


def check(name: str, config: dict[str, Any]) -> None:
    """UserError where nothing would record the objective."""
    names = recorded(config)
    if name in names or (name.startswith(TUNED) and config["eval"]["samples"] and config["eval"]["lm_eval"]):
        return
    if name.startswith(TUNED) and not config["eval"]["samples"]:
        raise UserError(f"sweep.objective={name}: nothing is evaluated after training; set eval.samples=200")
    if name.startswith("eval_") and config["train"]["eval_strategy"] == "no":
        raise UserError(f"sweep.objective={name}: train.eval_strategy=no evaluates nothing; use epoch or steps")
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
    """The objective of a run: the last line that has it, or the evaluation's; None where there is none (yet)."""
    if not name.startswith(TUNED):
        line = series(run_dir, name)
        return line[-1][1] if line else None
    file = run_dir / "eval" / "metrics.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("tuned", {}).get(name.removeprefix(TUNED))
    return float(found) if _is_number(found) else None


def order(values: dict[str, float | None], direction: str) -> list[str]:
    """Names, best first; those without a number last, as they came."""
    sign = 1.0 if direction == "minimize" else -1.0
    return sorted(values, key=lambda name: math.inf if values[name] is None else sign * values[name])  # type: ignore[operator]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
