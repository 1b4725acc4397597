"""A process that forks starts of the worker, runs made with it, and how two runs are compared bit by bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import BASE, last_words


class Forks:
    """The forking process; one for a test session's worker."""

    def __init__(self, environment, errors):
        self.errors = errors
        self.pending = []
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            env=environment | {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("a"),
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()[-3000:]
        return json.loads(line)

    def _ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()["pids"]

    def freeze(self, run_dir, *words):
        """A run directory, ready to be started."""
        self._ask(freeze=[*words, f"run_dir={run_dir}"])
        assert self._answer()["statuses"] == [0], self.errors.read_text()[-3000:]
        return run_dir

    def change(self, run_dir, *words):
        """The first half of `ftdist resume RUN words`: the status of the process."""
        self._ask(change=str(run_dir), words=list(words))
        return self._answer()["statuses"][0]

    def begin(self, run_dir, world=2):
        """Start the ranks; their pids."""
        self.pending = self._ask(start=str(run_dir), world=world)
        return self.pending

    def end(self):
        """The statuses of the ranks that were begun last."""
        statuses = self._answer()["statuses"]
        self.pending = []
        return statuses

    def clear(self):
        """End what a failed test has left running."""
        for pid in self.pending:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.pending:
            self.end()

    def start(self, run_dir, world=2):
        self.begin(run_dir, world)
        return self.end()


@pytest.fixture(scope="session")
def forks(environment, tmp_path_factory):
    forks = Forks(environment, tmp_path_factory.mktemp("forks") / "errors.log")
    yield forks
    forks.process.stdin.close()
    forks.process.wait(timeout=60)


@pytest.fixture(autouse=True)
def cleared(forks):
    yield
    forks.clear()


@pytest.fixture(scope="session")
def words(small):
    """`words(strategy, engine, …)`: overrides of a short run of that cell, global batch 4."""

    def words(strategy, engine, *more, processes=2):
        micro = 4 // processes
        return (
            *small,
            *BASE,
            f"strategy={strategy}",
            f"engine={engine}",
            f"cluster.processes={processes}",
            f"train.per_device_train_batch_size={micro}",
            *(("strategy.top_percent=50",) if strategy == "spectrum" else ()),
            *more,
        )

    return words


@pytest.fixture(scope="session")
def untouched(forks, words, tmp_path_factory):
    """`untouched(strategy, engine, …)`: a run that nothing has happened to. Made once."""
    made = {}

    def untouched(strategy, engine, *more, processes=2):
        key = strategy, engine, more, processes
        if key not in made:
            run_dir = tmp_path_factory.mktemp("untouched") / "run"
            forks.freeze(run_dir, *words(strategy, engine, *more, processes=processes))
            assert forks.start(run_dir, processes) == [0] * processes, last_words(run_dir)
            made[key] = run_dir
        return made[key]

    return untouched


def pytest_terminal_summary(terminalreporter):
    table = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "fault":
                fault, engine, count = json.loads(value)
                row = table.setdefault(fault, {})
                row[engine] = row.get(engine, 0) + count
    if table:
        engines = sorted({engine for row in table.values() for engine in row})
        terminalreporter.section("faults, all with the promised outcome")
        terminalreporter.write_line(" | ".join(["| fault", *engines, "all |"]))
        terminalreporter.write_line("|---" * (len(engines) + 2) + "|")
        for fault, row in table.items():
            cells = [str(row.get(engine, 0)) for engine in engines]
            terminalreporter.write_line(" | ".join([f"| {fault}", *cells, f"{sum(row.values())} |"]))
