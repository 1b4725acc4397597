"""Pairs of answers, and runs on them by forked starts of the worker."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "durable"))  # its module `runs`

ROWS = 60
STEPS = 6


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A JSONL file of preference rows."""
    from ftdist import demo

    rng = random.Random(3)
    made = [dict(zip(("prompt", "chosen", "rejected"), demo.greeting(rng), strict=True)) for _ in range(ROWS)]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, made)) + "\n")
    return file


@pytest.fixture(scope="session")
def words(model, pairs):
    """`words(strategy, engine, …)`: overrides of a short run, 8 pairs a step."""

    def words(strategy, engine, *more, processes=2):
        processes = 1 if engine == "single" else processes
        return (
            "task=dpo",
            f"model.path={model}",
            f"data.path={pairs}",
            "data.near_duplicates=off",
            "data.decontaminate=false",
            "train.max_length=64",
            "train.bf16=false",
            "train.warmup_steps=0",
            "train.lr_scheduler_type=constant",
            "train.learning_rate=1e-3",
            "tracking=none",
            f"strategy={strategy}",
            f"engine={engine}",
            f"cluster.processes={processes}",
            "cluster.oversubscribe=true",
            f"train.per_device_train_batch_size={8 // processes}",
            f"train.max_steps={STEPS}",
            "checkpoint.every_minutes=null",
            *(("strategy.top_percent=50",) if strategy == "spectrum" else ()),
            *more,
        )

    return words


@pytest.fixture(scope="session")
def trained(forks, words, tmp_path_factory):
    """`trained(strategy, engine, …)`: such a run, finished. Made once."""
    from runs import last_words

    made = {}

    def trained(strategy, engine, *more):
        key = strategy, engine, more
        if key not in made:
            run_dir = tmp_path_factory.mktemp("dpo") / "run"
            forks.freeze(run_dir, *words(strategy, engine, *more))
            world = 1 if engine == "single" else 2
            assert forks.start(run_dir, world) == [0] * world, last_words(run_dir)
            made[key] = run_dir
        return made[key]

    return trained
