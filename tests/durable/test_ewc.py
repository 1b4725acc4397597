"""Elastic weight consolidation through the worker: the same in every engine, and after a stop."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from runs import events, last_words, metrics, same, weights

from ftdist import state

STRENGTH = 200.0  # a penalty that is felt within four steps
PLAIN = "forgetting.adapters=plain"
CELLS = [
    ("full", "single"),
    ("full", "ddp"),
    ("full", "zero1"),
    ("full", "zero2"),
    ("full", "zero3"),
    ("spectrum", "single"),
    ("spectrum", "zero2"),
    ("lora", "single"),
    ("lora", "ddp"),
    ("lora", "zero2"),
    ("lora", "zero3"),
    ("qlora", "single"),
    ("qlora", "zero3"),
    ("lora", "single", PLAIN),
    ("lora", "zero3", PLAIN),
]


@pytest.fixture(scope="session")
def on(words, chat):
    """`on(strategy, engine, …)`: words of a run of four steps with a Fisher of 24 rows."""

    def on(strategy, engine, *more):
        return words(
            strategy,
            engine,
            "forgetting=ewc",
            f"forgetting.data={chat}",
            "forgetting.samples=24",
            f"forgetting.strength={STRENGTH}",
            "train.max_steps=4",
            *(("strategy.dropout=0",) if "lora" in strategy else ()),  # its random numbers belong to a rank
            *more,
            processes=processes(engine),
        )

    return on


@pytest.fixture(scope="session")
def penalised(forks, on, environment, tmp_path_factory):
    """`penalised(strategy, engine, …)`: such a run, made once; its Fisher is measured by its own ranks."""
    made = {}

    def penalised(strategy, engine, *more):
        key = strategy, engine, more
        if key not in made:
            made[key] = tmp_path_factory.mktemp("penalised") / "run"
            forks.freeze(made[key], *on(strategy, engine, *more))
            shutil.rmtree(Path(environment["FTDIST_CACHE"], "fisher"), ignore_errors=True)
            assert forks.start(made[key], processes(engine)) == [0] * processes(engine), last_words(made[key])
        return made[key]

    return penalised


def processes(engine):
    return 1 if engine == "single" else 2


def steps(run_dir):
    return [row for row in metrics(run_dir) if "loss" in row]


def kept(folder, kind):
    """Every tensor of that kind in a Fisher's files, whole."""
    saved = state.Saved(folder)
    tensors = {}
    for name, shape in saved.shapes.items():
        tensors[name] = torch.full((math.prod(shape),), math.nan)
        saved.fill(tensors[name], state.Segment(name, 0, math.prod(shape), 0), kind)
    return tensors


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_engine_adds_the_same(penalised, cell):
    """The Fisher, the anchors, the penalty and what becomes of the loss."""
    strategy, engine, *more = cell
    run_dir, alone = penalised(strategy, engine, *more), penalised(strategy, "single", *more)
    measured, expected = kept(run_dir / "fisher", "fisher"), kept(alone / "fisher", "fisher")
    assert set(measured) == set(expected)
    for name, values in measured.items():
        torch.testing.assert_close(values, expected[name], rtol=2e-3, atol=1e-5 * float(expected[name].max()))
    plan = json.loads((run_dir / "plan.json").read_text())
    if strategy in ("full", "spectrum"):
        assert sum(map(len, measured.values())) == plan["trainable_parameters"]
        anchors = kept(alone / "fisher", "weight")
        assert all(torch.equal(values, anchors[name]) for name, values in kept(run_dir / "fisher", "weight").items())
    penalties = [row["ewc_penalty"] for row in steps(run_dir)]
    assert penalties[0] == 0 and penalties[-1] > 1e-4
    assert penalties == pytest.approx([row["ewc_penalty"] for row in steps(alone)], rel=1e-2)
    assert [row["loss"] for row in steps(run_dir)] == pytest.approx([r["loss"] for r in steps(alone)], rel=1e-3)
