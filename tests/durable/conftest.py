"""Runs made by forked starts of the worker, and the table of the faults that were done to them."""

import json

import pytest
from runs import BASE, last_words


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
