"""The parts of a durable run, one by one."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ftdist import checkpoint, keeper, lease, rundir, stops
from ftdist.errors import FENCED, Failed, UserError
from ftdist.health import Health
from ftdist.ranks import Ranks
from ftdist.sampler import FILLER, Rows, StepSampler
from ftdist.state import Saved, State, copied, write


def test_what_is_kept():
    losses = {2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: None, 12: 5.0}
    assert checkpoint.surplus(losses, 2, 0, None) == [2, 4, 6, 8]
    assert checkpoint.surplus(losses, 2, 1, None) == [2, 6, 8]
    assert checkpoint.surplus(losses, 1, 2, 6) == [2, 10]
    assert checkpoint.surplus({0: None, 3: None}, 2, 0, 3) == []


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_every_row_once_in_an_epoch_and_the_same_in_every_world(world, rows):
    """Row numbers themselves: none skipped, none seen twice, the same set in each step whatever the world size."""

    def steps(world, epoch):
        parts = []
        for rank in range(world):
            sampler = StepSampler(
                rows, micro_batch=8 // world // 2, accumulation=2, rank=rank, world=world, seed=5, drop_last=False
            )
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        assert len({len(part) for part in parts}) == 1
        batches = [sum((part[i] for part in parts), []) for i in range(len(parts[0]))]
        return [set(batches[i] + batches[i + 1]) - {FILLER} for i in range(0, len(batches), 2)]

    for epoch in (0, 1):
        made = steps(world, epoch)
        assert sorted(row for step in made for row in step) == list(range(rows))
        assert made == steps(1, epoch)
    assert rows <= 8 or steps(world, 0) != steps(world, 1)


def test_a_filler_teaches_nothing():
    row = Rows([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "lengths": [3]}])[FILLER]
    assert set(row["labels"]) == {-100} and row["filler"]


def test_a_writer_that_fails_commits_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(keeper, "write", lambda *_: (_ for _ in ()).throw(MemoryError()))
    draft = keeper._Draft(tmp_path, 0, {}, {}, {}, {})
    draft.wait(10)
    assert draft.written and "MemoryError" in draft.problem and not draft.files


def manifest(directory, **changes):
    directory.mkdir(parents=True)
    draft = directory / ".draft"
    draft.mkdir()
    whole = {"step": 3, "world_size": 1, "initial": False, "id": "a", "eval_loss": None}
    names = ("rank-00000.json", "rank-00000.safetensors")
    for name in names:
        (draft / name).write_text(name)
    files = {name: checkpoint.fingerprint(draft / name) for name in names}
    checkpoint.commit(draft, directory / "step-00000003", {**whole, "files": files, **changes})
    return directory / "step-00000003"


def test_a_manifest_without_a_rank_is_broken(tmp_path):
    assert checkpoint.read_manifest(manifest(tmp_path / "whole"))["step"] == 3
    with pytest.raises(checkpoint.Broken, match="rank 1"):
        checkpoint.read_manifest(manifest(tmp_path / "lacking", world_size=2))
    with pytest.raises(checkpoint.Broken, match="rank 0"):
        checkpoint.read_manifest(manifest(tmp_path / "empty", files={}))


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    manifest(tmp_path / "checkpoints")
    assert keeper.choose(tmp_path, Ranks(), token_of(tmp_path), "a")[0].name == "step-00000003"
    with pytest.raises(Failed, match="no checkpoint that can be trusted") as failure:
        keeper.choose(tmp_path, Ranks(), token_of(tmp_path), "b")
    assert failure.value.status == FENCED


def test_lost_checkpoints_are_no_new_beginning(tmp_path):
    assert keeper.choose(tmp_path, Ranks(), token_of(tmp_path), "a") is None
    (tmp_path / keeper.BEGUN).touch()
    with pytest.raises(Failed, match="checkpoints/ is gone") as failure:
        keeper.choose(tmp_path, Ranks(), token_of(tmp_path), "a")
    assert failure.value.status == FENCED


class Prepared:
    """An optimizer as accelerate wraps it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def saved_and_restored(make, tmp_path):
    """Two optimizers with random state, the second restored from what the first has saved."""
    models = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)) for _ in range(2)]
    optimizers = [make(model.parameters()) for model in models]
    for model in models[:1]:
        model(torch.randn(4, 8)).sum().backward()
    optimizers[0].step()
    states = [State(model, Prepared(optimizer), 0, 1) for model, optimizer in zip(models, optimizers, strict=True)]
    tensors, index = states[0].held()
    write(tmp_path, 0, copied(tensors), {"state": index})
    states[1].restore(tmp_path)
    return models, optimizers


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "Adam-amsgrad"])
def test_any_state_comes_back(tmp_path, name):
    kind, _, extra = name.partition("-")
    options = {extra: True} if extra else {"momentum": 0.9} if kind == "SGD" else {}
    models, (one, other) = saved_and_restored(lambda p: getattr(torch.optim, kind)(p, lr=0.1, **options), tmp_path)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[b][key])), key
    assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]


class Mixed(torch.optim.SGD):
    """State as bitsandbytes has it: in blocks for large weights, plain for small ones."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": 1, "state1": torch.randn(p.shape)}
            if p.numel() > 8:
                self.state[p] = {
                    "step": 1,
                    "state1": torch.randint(255, p.shape, dtype=torch.uint8),
                    "absmax1": torch.randn(3),
                }


def test_states_in_blocks_come_back_beside_plain_ones(tmp_path):
    models, (one, other) = saved_and_restored(lambda p: Mixed(p, lr=0.1), tmp_path)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[b][key])), key
    with pytest.raises(Failed, match="cannot be shared out anew"):
        Saved(tmp_path).bound_kinds(0, "zero3 rank 0 of 2")


class Odd(torch.optim.SGD):
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"projector": object()}


def test_a_state_that_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(Failed, match=r"train.optim: its state projector \(object\) cannot be saved"):
        saved_and_restored(lambda p: Odd(p, lr=0.1), tmp_path)


def token_of(tmp_path):
    held = lease.read(tmp_path)
    return held.token if held else lease.take(tmp_path).token


def health(tmp_path, **keys):
    usual = {"nonfinite": "stop", "spike": "ignore", "spike_factor": 5.0, "no_tokens": "stop", "first_loss": "warn"}
    return Health(tmp_path, token_of(tmp_path), True, **usual | keys)


def told(tmp_path):
    return [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()]


def test_health_of_gradients(tmp_path, capsys):
    skipping = health(tmp_path, nonfinite="skip", spike="skip")
    assert all(skipping.may_apply(step, 1.0) for step in range(1, 12))
    assert not skipping.may_apply(12, math.nan) and not skipping.may_apply(13, 5.1)
    assert skipping.may_apply(14, 4.9)
    assert told(tmp_path) == ["health-nonfinite", "health-spike"]
    assert "step 13" in capsys.readouterr().out
    with pytest.raises(Failed) as failure:
        health(tmp_path).may_apply(1, math.inf)
    assert failure.value.status == FENCED
    assert health(tmp_path, nonfinite="warn").may_apply(1, math.nan)


def test_who_was_taken_over_writes_nothing_more(tmp_path):
    old = health(tmp_path, nonfinite="roll_back")
    lease.release(tmp_path, old.token)
    token = lease.take(tmp_path).token
    with pytest.raises(Failed, match="taken over") as failure:
        old.may_apply(7, math.nan)
    assert failure.value.status == FENCED
    with pytest.raises(Failed, match="taken over"):
        rundir.leave_out(tmp_path, old.token, 7)
    assert not (tmp_path / "events.jsonl").exists() and rundir.left_out(tmp_path) == []
    rundir.record(tmp_path, token, "start", 0)
    assert told(tmp_path) == ["start"]


def test_a_roll_back_leaves_the_step_out_next_time(tmp_path):
    with pytest.raises(Failed) as failure:
        health(tmp_path, nonfinite="roll_back").may_apply(7, math.nan)
    assert failure.value.status == 75 and rundir.left_out(tmp_path) == [7]
    again = health(tmp_path, nonfinite="roll_back")
    assert not again.may_apply(7, math.nan) and again.may_apply(8, 1.0)


def test_overflow_belongs_to_the_loss_scale_but_a_nan_loss_does_not(tmp_path):
    scaled = health(tmp_path)
    scaled.scaled, scaled.losses = True, lambda: [1.0, 2.0]
    assert scaled.may_apply(1, math.inf)
    scaled.losses = lambda: [1.0, math.nan]
    with pytest.raises(Failed, match="not finite"):
        scaled.may_apply(2, math.inf)


def test_health_of_losses_and_tokens(tmp_path):
    with pytest.raises(Failed, match="no token of this step is supervised"):
        health(tmp_path).tokens(3, 0)
    strict = health(tmp_path, first_loss="stop")
    strict.first(math.log(1000), 1000)
    for loss in (1.6 * math.log(1000), math.nan, 1e-4):
        with pytest.raises(Failed, match="the first loss"):
            strict.first(loss, 1000)


def test_the_guard_keeps_the_optimizer_from_stepping(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(2)
    norm = math.nan
    health(tmp_path, nonfinite="skip").guard(optimizer, lambda: norm, lambda: 1)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    health(tmp_path).guard(optimizer, lambda: 1.0, lambda: 2)
    norm = 1.0
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]  # the first guard still judges step 1


def test_limits(monkeypatch):
    monkeypatch.setenv(stops.STARTED, str(time.time() - 3600))  # preparation counts
    assert stops.Limit("90m").reached(1, 0) is None
    assert stops.Limit("90m").reached(1, reserve=1801) == "train_until=90m"
    assert stops.Limit("0.5h").reached(1, 0) and stops.Limit("1h30m20s").reached(1, 0) is None
    assert stops.Limit("2020-01-31T08:00").reached(1, 0)
    assert stops.Limit("step 3").reached(2, 0) is None and stops.Limit("step 3").reached(3, 0)
    for wrong in ("soon", "3", "step", "1x"):
        with pytest.raises(UserError, match="train_until="):
            stops.Limit(wrong)


def test_a_lease_is_one_owners(tmp_path, monkeypatch):
    first = lease.take(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        lease.take(tmp_path)
    elsewhere = {**vars(first), "host": "elsewhere", "job": "12"}
    (tmp_path / lease.FILE).write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="on elsewhere"):  # it has just shown a sign of life
        lease.take(tmp_path)
    os.utime(tmp_path / lease.FILE, (time.time() - 61, time.time() - 61))
    assert lease.take(tmp_path).token == 2
    with pytest.raises(Failed) as failure:
        lease.check(tmp_path, first.token)
    assert failure.value.status == FENCED
    (tmp_path / lease.FILE).write_text(json.dumps(elsewhere))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # SLURM has given the first start up
    assert lease.take(tmp_path).token == 2
    lease.release(tmp_path, 2)
    assert lease.read(tmp_path).released and lease.take(tmp_path).token == 3


def test_a_start_that_was_killed_while_it_prepared_leaves_room(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), rundir.claimed(run_dir):
        raise KeyboardInterrupt
    assert not run_dir.exists()
    run_dir.mkdir()
    (run_dir / rundir.CLAIM).touch()
    (run_dir / "plan.json").touch()
    with pytest.raises(UserError, match="holds a run or other files already"), rundir.claimed(run_dir):
        pass
    rundir.clear_unfinished(run_dir)
    with rundir.claimed(run_dir) as token:
        assert token == 2  # higher than the one before
    assert oct(run_dir.stat().st_mode)[-3:] == "700"


def test_secrets_of_the_command_line_are_not_kept(monkeypatch):
    words = ["ftdist", "train", "data.path=https://me:pass@host/x.jsonl", "tracking.api_key=abc", "model.path=a@b"]
    monkeypatch.setattr("sys.argv", words)
    kept = rundir.environment()["command"]
    assert kept[2] == "data.path=https://***@host/x.jsonl" and kept[3] == "tracking.api_key=***"
    assert kept[4] == "model.path=a@b"


def test_a_rank_that_fails_gives_the_lease_back(tmp_path):
    """Under a foreign launcher nobody else does; the process ends without its `finally` blocks."""
    script = (
        "import sys; from pathlib import Path; from ftdist import lease, worker\n"
        "run = Path(sys.argv[1]); token = lease.take(run).token\n"
        "def broken(run_dir): raise RuntimeError('out of luck')\n"
        "worker.train = broken\n"
        "worker.main(run, at_failure=lambda: lease.release(run, token))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "rank 0: RuntimeError: out of luck" in done.stderr
    assert lease.read(tmp_path).released


def test_the_next_best_is_taken_or_the_last_one_stays(tmp_path, capsys):
    """The best step's checkpoint may be broken; and maybe no step counts."""
    made = object.__new__(keeper.Keeper)
    made.run_dir, made.token, made.ranks, made.main = tmp_path, None, Ranks(), True
    made.trainer = SimpleNamespace(state=SimpleNamespace(global_step=4))
    made.judge = SimpleNamespace(
        metric="eval_loss", memory=SimpleNamespace(best_step=2), said_of_best=lambda: "the best was 1 at step 2"
    )
    for step, score in ((2, 1.0), (3, None), (4, 2.0)):
        draft = checkpoint.drafts(tmp_path, step, 0)
        draft.mkdir(parents=True)
        names = ("rank-00000.json", "rank-00000.safetensors")
        for name in names:
            (draft / name).write_bytes(b"x")
        files = {name: checkpoint.fingerprint(draft / name) for name in names}
        facts = {"step": step, "world_size": 1, "engine": "single", "files": files, "initial": False, "score": score}
        checkpoint.commit(draft, checkpoint.folder(tmp_path, step), facts)
    (checkpoint.folder(tmp_path, 2) / "rank-00000.safetensors").write_bytes(b"y")
    assert made.restore_best() == 4
    said = capsys.readouterr().out
    assert "step 2 is broken" in said and "the next best is taken" in said and "but has no checkpoint" in said
    checkpoint.remove(tmp_path, 4)
    checkpoint.remove(tmp_path, 2)
    assert made.restore_best() == 4
    assert "no checkpoint of a step that counts; final/ holds the last step, 4" in capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [(event["event"], event["step"]) for event in events][-1] == ("best-missing", 4)
