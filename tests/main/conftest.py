"""The matrix's runs, each made once whoever asks first, and the table of them after the tests."""

import fcntl
import hashlib
import json
import time
from pathlib import Path

import pytest
from matrix import BY_COMMAND, STEPS, Cell, overrides


def hashes(directory):
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session")
def cell(run, forks, small, model, shared):
    """`cell(strategy, engine)`: that finished run. Workers share runs; who comes second waits for the first.

    By the console script where `BY_COMMAND` has it, elsewhere by the same steps in forked processes.
    """
    folder = shared / "cells"
    folder.mkdir(exist_ok=True)

    def made(run_dir, words, by_command, processes):
        before, began = hashes(model), time.monotonic()
        given = (*small, *words)
        if by_command:
            finished = run("train", *given, f"run_dir={run_dir}")
            status, said = finished.status, finished.stdout + finished.stderr
        else:
            forks.freeze(run_dir, *given)
            statuses = forks.start(run_dir, processes)
            status, said = max(map(abs, statuses)), "\n".join(f.read_text() for f in (run_dir / "logs").glob("*.log"))
            if status == 0:
                forks.finish(run_dir)
        return {
            "seconds": time.monotonic() - began,
            "status": status,
            "said": said,
            "base_untouched": before == hashes(model),
        }

    def cell(strategy, engine, **changes):
        name = "-".join([strategy, engine, *(f"{key}_{value}" for key, value in changes.items())])
        with (folder / f"{name}.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            if not known:
                by_command = (strategy, engine) in BY_COMMAND and not changes
                words = overrides(strategy, engine, **changes)
                known = json.dumps(made(folder / name, words, by_command, 1 if engine == "single" else 2))
                file.write(known)
            result = json.loads(known)
        assert result["status"] == 0, result["said"]
        return Cell(Path(folder, name), result["seconds"], result["base_untouched"])

    return cell


def pytest_terminal_summary(terminalreporter):
    lines = sorted(
        value
        for report in terminalreporter.getreports("passed")
        for name, value in getattr(report, "user_properties", ())
        if name == "cell"
    )
    if lines:
        terminalreporter.section(f"the matrix: loss at step 1 → {STEPS}, held-out loss, seconds of the run")
        terminalreporter.write_line("\n".join(lines))
