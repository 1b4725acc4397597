"""The matrix's runs, each made once whoever asks first, and the table of them after the tests."""

import fcntl
import hashlib
import json
import time
from pathlib import Path

import pytest
from matrix import STEPS, Cell, overrides


def hashes(directory):
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session")
def cell(run, small, model, shared):
    """`cell(strategy, engine)`: that finished run. Workers share runs; who comes second waits for the first."""
    folder = shared / "cells"
    folder.mkdir(exist_ok=True)

    def made(name, words):
        before, began = hashes(model), time.monotonic()
        finished = run("train", *small, *words, f"run_dir={folder / name}")
        return {
            "seconds": time.monotonic() - began,
            "status": finished.status,
            "said": finished.stdout + finished.stderr,
            "base_untouched": before == hashes(model),
        }

    def cell(strategy, engine, **changes):
        name = "-".join([strategy, engine, *(f"{key}_{value}" for key, value in changes.items())])
        with (folder / f"{name}.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            result = json.loads(known) if known else made(name, overrides(strategy, engine, **changes))
            if not known:
                json.dump(result, file)
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
