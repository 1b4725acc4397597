"""A poor trial is stopped by its own intermediate evaluations, while its ranks train."""

import json
import time

import pytest

from ftdist import launcher
from ftdist.errors import STOPPED, Failed
from ftdist.sweep import directory, rank
from ftdist.sweep.search import Search

SWEEP = {"name": "search", "objective": "eval_loss", "direction": "minimize", "parallel": 1, "retries": 0, "trials": 3,
         "space": {"train.learning_rate": "log 1e-9 1e-8"}, "random_trials": 3, "pruner": "median", "prune_from": 2,
         "prune_after": 2, "keep_pruned": True}  # fmt: skip
STEPS = 400


def test_a_poor_trial_is_stopped_while_it_trains(forks, small, tmp_path, monkeypatch):
    """Two others were better at each step: after `sweep.prune_after` steps it saves and ends, and counts as pruned."""
    monkeypatch.setattr(Search, "_configured", lambda *_: True)
    directory.write(tmp_path, {"name": "s", "words": [], "sweep": SWEEP, "seed": 7, "directory": "."}, [], [])
    source = Search(tmp_path)
    for loss in (0.2, 0.1):
        name = source.take()
        (tmp_path / name).mkdir()
        rows = [json.dumps({"step": step, "eval_loss": loss}) for step in range(1, STEPS + 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        source.ended(name, directory.ended(tmp_path, name, 0, None, 1.0))
    name = source.take()
    words = ["engine=single", "cluster.processes=1", "train.eval_strategy=steps", "train.eval_steps=1"]
    run_dir = forks.freeze(tmp_path / name, *small, *words, f"train.max_steps={STEPS}", "train.learning_rate=1e-9")
    forks.begin(run_dir, world=1)
    while not (run_dir / "outcome.json").exists():
        time.sleep(0.01)  # as those who watch it do
        source.look(name)
    forks.end()
    with pytest.raises(Failed) as failure:
        launcher.judge(run_dir, 0)
    assert failure.value.status == STOPPED
    source.ended(name, directory.ended(tmp_path, name, STOPPED, str(failure.value), 1.0))
    last = rank.results(tmp_path)[-1]
    assert (last["name"], last["state"]) == (name, "pruned")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert 2 <= rows[-1]["step"] < STEPS and (run_dir / "checkpoints" / f"step-{rows[-1]['step']:08}").is_dir()
    trial = source.study.get_trials()[2]
    assert trial.state.name == "PRUNED"
    assert trial.intermediate_values == {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert source.take() is None
