"""Several runs side by side as numbers: which is best and by what, what they differ in, what each took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdist import rundir
from ftdist.report.gather import Run, flat, tasks
from ftdist.sweep import directory, rank
from ftdist.sweep.objective import order

OWN = ("run_dir", "sweep_dir")  # keys that differ in all runs and say nothing
DECIDING = ("extracted_match", "exact_match", "loss")  # of an evaluation, in the order in which they decide


@dataclass(frozen=True)
class Comparison:
    """Runs, best first. objective: what ranks them, in words; values: run name → that number."""

    title: str
    objective: str
    direction: str
    runs: list[Run]
    values: dict[str, float | None]
    own: dict[str, dict[str, Any]]  # run name → key → value, of what is not the same in all; best first
    members: list[dict[str, Any]]  # of a sweep, as `rank.results` has them
    again: str | None  # the command that makes the best one again


def of_sweep(sweep_dir: Path, runs: list[Run]) -> Comparison:
    """A sweep's members by its own objective; those that made no run directory are in `members` alone."""
    sweep, rows = directory.read(sweep_dir)["sweep"], rank.results(sweep_dir)
    by_name = {run.name: run for run in runs}
    ordered = [by_name[row["name"]] for row in rows if row["name"] in by_name]
    values = {row["name"]: row["objective"] for row in rows}
    own = {row["name"]: dict(map(_pair, row["words"])) for row in rows if row["name"] in by_name}
    return _made(sweep_dir.name, sweep["objective"], sweep["direction"], ordered, values, own, rows)


def _pair(word: str) -> tuple[str, Any]:
    """Key and value of an override; numbers as numbers."""
    key, _, value = word.partition("=")
    try:
        return key, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        return key, value


def of_runs(runs: list[Run]) -> Comparison:
    """Runs by the first number that two of them have: right answers, loss after training, loss while training.

    Those of different tasks (the stages of a recipe) are no rivals: they stay in their order.
    """
    if len(tasks(runs)) > 1:
        return _ordered("eval_loss", "minimize", runs, dict.fromkeys(run.name for run in runs))
    for name in DECIDING:
        values = {run.name: run.metrics.get("tuned", {}).get(name) for run in runs}
        if sum(value is not None for value in values.values()) > 1:
            direction = "minimize" if name == "loss" else "maximize"
            return _ordered(f"tuned.{name}", direction, runs, values)
    values = {run.name: run.held_out[-1].get("eval_loss") if run.held_out else None for run in runs}
    return _ordered("eval_loss", "minimize", runs, values)


def _ordered(name: str, direction: str, runs: list[Run], values: dict[str, Any]) -> Comparison:
    by_name = {run.name: run for run in runs}
    ordered = [by_name[name] for name in order(values, direction)]
    return _made(f"{len(runs)} runs", name, direction, ordered, values, differing(ordered), [])


def _made(
    title: str,
    name: str,
    direction: str,
    runs: list[Run],
    values: dict[str, float | None],
    own: dict[str, dict[str, Any]],
    members: list[dict[str, Any]],
) -> Comparison:
    best = runs[0] if values.get(runs[0].name) is not None else None
    again = rundir.again(best.environment) if best is not None and best.environment.get("command") else None
    return Comparison(title, name, direction, runs, values, own, members, again)


def differing(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Run name → key → value, of the keys whose values are not the same in all runs."""
    configs = {run.name: flat(run.config) for run in runs}
    first = configs[runs[0].name]
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in OWN)
    unlike = [key for key in keys if any(config.get(key) != first.get(key) for config in configs.values())]
    return {name: {key: config.get(key) for key in unlike} for name, config in configs.items()}


def took(run: Run, seconds: float | None) -> dict[str, float | None]:
    """`seconds device_peak_bytes tokens_per_second cost` of a run as far as they are known.

    seconds: that its starts took, start-up and evaluation too, if somebody has measured it; without those that were
    killed, which only the run's own events know.
    """
    measured = run.plan.get("measured") or {}
    speeds = sorted(row["tokens_per_second"] for row in run.steps if row.get("tokens_per_second"))
    peaks = [row["memory_gib"] for row in run.steps if row.get("memory_gib")]
    seconds = max((known for known in (seconds, _working(run.events)) if known), default=None)
    price = (run.config.get("hardware") or {}).get("price_per_hour")
    devices = (run.plan.get("processes") or 0) * (run.plan.get("nodes") or 0)
    return {
        "seconds": seconds,
        "device_peak_bytes": measured.get("device_peak_bytes") or (max(peaks) * 2**30 if peaks else None),
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "cost": price * devices * seconds / 3600 if price and seconds is not None else None,
    }


def _working(events: list[dict[str, Any]]) -> float | None:
    """Seconds between each start and the last that is known of it; the time between a stop and the next start is none.

    A start that was killed counts up to its last event. In SLURM it is the job that starts, before its ranks do.
    """
    total, begun, last, before = 0.0, None, None, None
    for event in sorted(events, key=lambda event: event["time"]):
        if event.get("event") in ("job", "start", "resume") and before != "job":
            total += last - begun if begun is not None and last is not None else 0.0
            begun = event["time"]
        last, before = event["time"], event.get("event")
    return None if begun is None or last is None else total + last - begun
