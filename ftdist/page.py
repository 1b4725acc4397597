"""RUN/README.md: the run's page, from the files of the run directory alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftdist import rundir
from ftdist.data.report import words
from ftdist.evaluate.tables import table
from ftdist.plan.text import gigabytes, render, seconds


def write(run_dir: Path) -> None:
    """Write the page as far as the run has come: plan and data at the start, results at the end."""
    plan = _read(run_dir / "plan.json")
    environment = _read(run_dir / "env.json")
    parts = [f"# {run_dir.name}", _result(run_dir), "## Plan", _block(render(plan))]
    if "measured" in plan:
        parts += ["## Predicted and measured", _compared(plan)]
    parts += ["## Data", _block(words(Path(plan["prepared"])))]
    if (run_dir / "snr.png").is_file():
        parts += ["## Spectrum", "SNR of every module; what is trained is marked.", "![SNR by layer](snr.png)"]
    parts += ["## Again", _block(rundir.again(environment))]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    parts.append(f"Python {environment['python']}, {versions}; commit {environment['commit'] or 'not known'}.")
    partial = run_dir / ".README.md"
    partial.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    partial.replace(run_dir / "README.md")


def _result(run_dir: Path) -> str:
    if not (run_dir / "final").is_dir():
        return "Not finished."
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    steps = [row for row in rows if "loss" in row]
    outcome = _read(run_dir / "outcome.json") if (run_dir / "outcome.json").is_file() else {}
    last = outcome.get("final_step")
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row and (last is None or row["step"] <= last)]
    facts = []
    if steps:  # none where less was done than train.logging_steps
        facts.append(f"{steps[-1]['step']:,} steps over {steps[-1]['tokens']:,} tokens")
        facts.append(f"loss {_number(steps[0]['loss'])} → {_number(steps[-1]['loss'])}")
    if steps and last is not None and last != outcome["step"]:
        facts.append(f"final/ holds step {last:,}")
    if held_out:
        facts.append(f"held-out loss {_number(held_out[-1])}")
    lines = [f"Finished: {', '.join(facts)}." if facts else "Finished."]
    metrics = run_dir / "eval" / "metrics.json"
    if metrics.is_file():
        lines += ["", _block(table(_read(metrics)))]
    return "\n".join(lines)


def _compared(plan: dict[str, Any]) -> str:
    """The plan beside what the ranks measured, with the error of the plan."""
    lines = ["| | predicted | measured | error |", "|---|---|---|---|"]
    shown = {"device_peak_bytes": gigabytes, "host_peak_bytes_per_node": gigabytes, "seconds_per_step": seconds}
    for key, word in shown.items():
        if key in plan and key in plan["measured"]:
            predicted, found = plan[key], plan["measured"][key]
            name = key.replace("_", " ").replace(" bytes", "")
            lines.append(f"| {name} | {word(predicted)} | {word(found)} | {predicted / found - 1:+.1%} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _block(text: str) -> str:
    return f"```\n{text}\n```"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
