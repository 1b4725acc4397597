"""Elastic weight consolidation through the worker: the same in every engine, and after a stop."""

import json

import pytest
from runs import last_words, metrics, same, weights

STRENGTH = 200.0  # a penalty that is felt within six steps
CELLS = [("full", "single"), ("full", "ddp"), ("full", "zero3")]


@pytest.fixture(scope="session")
def penalised(forks, words, chat, tmp_path_factory):
    """`penalised(strategy, engine, …)`: a run of four steps with a Fisher of 24 rows, made once."""
    made = {}

    def penalised(strategy, engine, *more):
        key = strategy, engine, more
        if key not in made:
            world = 1 if engine == "single" else 2
            run_dir = tmp_path_factory.mktemp("penalised") / "run"
            added = ("forgetting=ewc", f"forgetting.data={chat}", "forgetting.samples=24", "train.max_steps=4",
                     f"forgetting.strength={STRENGTH}", *(("strategy.dropout=0",) if "lora" in strategy else ()))  # fmt: skip
            forks.freeze(run_dir, *words(strategy, engine, *added, *more, processes=world))
            assert forks.start(run_dir, world) == [0] * world, last_words(run_dir)
            made[key] = run_dir
        return made[key]

    return penalised


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_every_engine_adds_the_same(penalised, strategy, engine):
    rows = [row for row in metrics(penalised(strategy, engine)) if "loss" in row]
    expected = [row for row in metrics(penalised(strategy, "single")) if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    penalties = [row["ewc_penalty"] for row in rows]
    assert penalties[0] == 0 and penalties[-1] > 0.01
    assert penalties == pytest.approx([row["ewc_penalty"] for row in expected], rel=1e-2)
