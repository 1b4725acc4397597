"""Everything that a run directory tells, read once. What is not there (yet) is empty; a torn last line is left out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftdist import rundir
from ftdist.errors import UserError
from ftdist.report import phases

SAMPLES = 12  # answers shown


def tasks(runs: list[Run]) -> list[str]:
    """What the runs learn, each task once. Numbers of different tasks are of different things."""
    return list(dict.fromkeys(str(run.plan.get("task", "sft")) for run in runs))


@dataclass(frozen=True)
class Run:
    """A run directory's files as plain data."""

    name: str
    config: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    steps: list[dict[str, Any]]  # a row for each logged step, the last one where a restart went over it again
    held_out: list[dict[str, Any]]
    events: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    export: dict[str, Any]
    profile: dict[str, Any]  # seconds by phase and rank, the length of steps
    selection: Path | None  # the picture of Spectrum's selection
    finished: bool
    deltas: list[tuple[str, Any, Any]] = field(default_factory=list)  # key, default, value


def run(directory: Path, name: str) -> Run:
    """Read `directory`, which the page calls `name`. UserError if it is no run."""
    config = rundir.read_config(directory)
    rows = _lines(directory / "metrics.jsonl")
    picture = directory / "snr.png"
    samples = _lines(directory / "eval" / "samples.jsonl")
    return Run(
        name=name,
        config=config,
        plan=_json(directory / "plan.json"),
        environment=_json(directory / "env.json"),
        data=_json(directory / "data_report.json"),
        steps=_by_step([row for row in rows if "loss" in row]),
        held_out=_by_step([row for row in rows if any(key.startswith("eval_") for key in row)]),
        events=[event for event in _lines(directory / "events.jsonl") if isinstance(event.get("time"), int | float)],
        checkpoints=_checkpoints(directory / "checkpoints"),
        errors=[_json(file) for file in sorted((directory / "logs").glob("rank-*.error.json"))],
        metrics=_json(directory / "eval" / "metrics.json"),
        samples=_telling(samples),
        export=_json(directory / "model" / "ftdist_export.json"),
        profile=phases.gathered(directory),
        selection=picture if picture.is_file() else None,
        finished=(directory / "final").is_dir(),
        deltas=_deltas(config),
    )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `group.key` → value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _deltas(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values are not the defaults of the choices that the run made."""
    from ftdist import compose

    known = set(compose.choices("strategy")) & {config["strategy"]["name"]}
    words = ["model=custom", "model.path=x", "data=custom", "data.path=x", f"engine={config['engine']['name']}"]
    words += (
        [f"strategy={name}" for name in known]
        + [f"task={config['task']['name']}"]
        + [f"tracking={config['tracking']['name']}"]
    )
    try:
        defaults = flat(compose.compose("report", words)[0])
    except UserError:  # a choice of a package that is not installed here
        return []
    defaults |= dict.fromkeys(("model.path", "data.path"))
    mine = flat(config)
    left_out = ("run_dir", "cluster.name")
    return [
        (key, defaults.get(key), value)
        for key, value in mine.items()
        if key not in left_out and (key not in defaults or defaults[key] != value)
    ]


def _telling(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows where base and tuned differ most in their scores, won and lost in turn, so that both are seen."""

    def gain(row: dict[str, Any]) -> float:
        scores = row.get("scores") or {}
        base, tuned = scores.get("base") or {}, scores.get("tuned") or {}
        for name in ("extracted_match", "exact_match", "g_eval", "rougeL", "chrf"):
            a, b = base.get(name), tuned.get(name)
            if a is not None and b is not None and a != b:
                return float(b - a)
        return 0.0

    order = sorted(range(len(samples)), key=lambda i: gain(samples[i]))
    won = [i for i in reversed(order) if gain(samples[i]) > 0][: SAMPLES // 2]
    lost = [i for i in order if gain(samples[i]) < 0][: SAMPLES // 4]
    rest = [i for i in range(len(samples)) if i not in won and i not in lost]
    return [samples[i] for i in [*won, *lost, *rest][:SAMPLES]]


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    found = []
    for manifest in folder.glob("step-*/manifest.json"):
        content = _json(manifest)
        sizes = [entry.get("bytes", 0) for entry in (content.get("files") or {}).values()]
        found.append({"step": content.get("step"), "bytes": sum(sizes), "name": manifest.parent.name})
    return sorted(found, key=lambda entry: entry["step"] or 0)


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {row.get("step", 0): row for row in rows}
    return [last[step] for step in sorted(last)]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as failure:
        raise UserError(f"{file}: cannot be read ({failure}); mend it or move it away")
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file} line {number}: no JSON; mend it or move the file away")
            continue  # a writer was killed inside it
        if isinstance(row, dict):
            found.append(row)
    return found
