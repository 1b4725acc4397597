"""The matrix's runs, each made once by the worker that needs it, and the table of them after the tests."""

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

STEPS = 6
GLOBAL_BATCH = 4  # packed rows; the same in every cell, so that curves can be compared
# Without dropout, whose random numbers belong to a rank.
OVERRIDES = {
    "full": ("train.learning_rate=1e-2",),
    "lora": ("train.learning_rate=3e-2", "strategy.dropout=0"),
    "qlora": ("train.learning_rate=3e-2", "strategy.dropout=0"),
    "spectrum": ("train.learning_rate=1e-2", "strategy.top_percent=50"),
}


@dataclass(frozen=True)
class Cell:
    """A finished run of the matrix."""

    run_dir: Path
    seconds: float
    model_before: dict[str, str]  # file of the model directory → SHA-256, before and after the run
    model_after: dict[str, str]

    @functools.cached_property
    def metrics(self):
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]

    @property
    def losses(self):
        return [row["loss"] for row in self.metrics if "loss" in row]

    @property
    def held_out(self):
        return [row["eval_loss"] for row in self.metrics if "eval_loss" in row]

    @property
    def plan(self):
        return json.loads((self.run_dir / "plan.json").read_text())


def hashes(directory):
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session")
def cell(run, small, model, tmp_path_factory):
    """`cell(strategy, engine)`: that run, made at the first call; `micro` packed rows in a micro-batch."""

    @functools.cache
    def cell(strategy, engine, micro=None, accumulation=1):
        processes = 1 if engine == "single" else 2
        micro = micro or GLOBAL_BATCH // processes // accumulation
        assert micro * processes * accumulation == GLOBAL_BATCH
        before, began = hashes(model), time.monotonic()
        finished = run(
            "train",
            *small,
            f"strategy={strategy}",
            f"engine={engine}",
            *OVERRIDES[strategy],
            f"cluster.processes={processes}",
            "cluster.oversubscribe=true",
            f"train.per_device_train_batch_size={micro}",
            f"train.gradient_accumulation_steps={accumulation}",
            f"train.max_steps={STEPS}",
            f"run_dir={tmp_path_factory.mktemp('cell') / 'run'}",
        )
        assert finished.status == 0, finished
        return Cell(finished.run_dir, time.monotonic() - began, before, hashes(model))

    return cell


def pytest_terminal_summary(terminalreporter):
    cells = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in getattr(report, "user_properties", ())
        if name == "cell"
    ]
    if cells:
        terminalreporter.section(f"the matrix: loss at step 1 → {STEPS}, held out after it, seconds of the run")
        for line in sorted(cells):
            terminalreporter.write_line(line)
