"""The same run on another number of processes, another ZeRO stage, another engine: the same rows, the same curve."""

import pytest
from runs import last_words, metrics

TOLERANCE = 1e-4  # of a loss: sums are made in another order

CHANGES = [
    ("full", "zero3", 2, "zero3", 1),
    ("full", "zero2", 2, "zero2", 4),
    ("full", "zero2", 2, "zero3", 2),
    ("spectrum", "zero3", 2, "ddp", 2),
    ("spectrum", "ddp", 2, "zero1", 4),
    ("lora", "ddp", 2, "single", 1),
    ("qlora", "zero3", 2, "zero2", 1),
]


@pytest.mark.parametrize(("strategy", "engine", "processes", "other", "others"), CHANGES)
def test_another_world(forks, words, untouched, tmp_path, strategy, engine, processes, other, others):
    dry = ("strategy.dropout=0",) if strategy in ("lora", "qlora") else ()  # dropout's numbers belong to a rank
    expected = untouched(strategy, engine, *dry, processes=processes)
    run_dir = tmp_path / "run"
    forks.freeze(run_dir, *words(strategy, engine, *dry, 'train_until="step 3"', processes=processes))
    assert forks.start(run_dir, processes) == [75] * processes, last_words(run_dir)
    assert forks.change(run_dir, "train_until=null", f"engine={other}", f"cluster.processes={others}") == 0
    assert forks.start(run_dir, others) == [0] * others, last_words(run_dir)
    ours, theirs = metrics(run_dir), metrics(expected)
    for key in ("step", "tokens", "learning_rate"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs]
    for key in ("loss", "eval_loss"):
        got = [row[key] for row in ours if key in row]
        assert got == pytest.approx([row[key] for row in theirs if key in row], rel=TOLERANCE)


def test_a_batch_that_cannot_be_made(forks, words, verb, tmp_path):
    run_dir = forks.freeze(tmp_path / "run", *words("full", "ddp"))
    answer = verb("resume", run_dir, "cluster.processes=3")
    answer.refused("cluster.processes", "global batch of 4 rows", "1, 2, 4")
    verb("resume", run_dir, "strategy=lora").refused("strategy=lora", "cannot change", "cluster")
    verb("resume", run_dir, "train.learning_rate=1").refused("train.learning_rate=1", "cannot change")
    verb("resume", tmp_path / "none").refused("no run directory")
