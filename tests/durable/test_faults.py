"""What can happen to a run, done to it. Polling waits for what is to happen; nothing waits for time to pass."""

import json
import shutil
import signal

import pytest
from drills import DAMAGES, LONG, committed, drill, kill, steps_done, unmake, until
from runs import events, last_words, metrics, same

DRILLED = [("full", "zero2"), ("lora", "ddp"), ("spectrum", "zero3")]


@pytest.mark.parametrize(("strategy", "engine"), DRILLED)
def test_killed_at_random_moments(forks, words, untouched, tmp_path, strategy, engine):
    """SIGKILL to every rank, every third time inside a save: no run lost, no work lost that was committed."""
    run_dir = forks.freeze(tmp_path / "run", *words(strategy, engine, *LONG))
    counts = drill(forks, run_dir, untouched(strategy, engine, *LONG), kills=4, seed=f"{strategy}{engine}")
    assert counts["inside a save"] == 2


@pytest.fixture(scope="module")
def stopped(forks, words, tmp_path_factory):
    """A run that has stopped after step 5, with checkpoints of steps 2, 4 and 5."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    keys = ("checkpoint.every_steps=2", "checkpoint.keep_last=9", 'train_until="step 5"')
    forks.freeze(run_dir, *words("full", "zero2", *keys))
    assert forks.start(run_dir) == [75, 75], last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    return run_dir


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(forks, untouched, stopped, tmp_path, damage):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    damage(run_dir / "checkpoints" / "step-00000005")
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    (aside,) = events(run_dir, "set-aside")
    assert aside["step"] == 5 and (run_dir / aside["moved_to"]).is_dir()
    assert [event["step"] for event in events(run_dir, "resume")] == [4]
    same(run_dir, untouched("full", "zero2"))


def test_nothing_left_is_no_new_beginning(forks, stopped, tmp_path):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        unmake(checkpoint)
    statuses = forks.start(run_dir)
    assert set(statuses) <= {93, -15, 1} and 93 in statuses
    assert "no checkpoint that can be trusted" in last_words(run_dir)
    assert not (run_dir / "final").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all(forks, words, untouched, tmp_path, number):
    run_dir = forks.freeze(tmp_path / "run", *words("lora", "ddp", *LONG))
    pids = forks.begin(run_dir)
    until(lambda: steps_done(run_dir) >= 2)
    kill(pids[1:], number)
    assert forks.end() == [75, 75], last_words(run_dir)
    (stop,) = events(run_dir, "stopped")
    assert stop["step"] == committed(run_dir) < 30
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, untouched("lora", "ddp", *LONG))


def test_a_stop_during_an_evaluation(forks, words, untouched, tmp_path):
    """The evaluation, a long one, is given up; the next start makes it."""
    keys = ("train.eval_strategy=steps", "train.eval_steps=2", "train.per_device_eval_batch_size=1",
            "data.validation_share=0.9")  # fmt: skip
    run_dir = forks.freeze(tmp_path / "run", *words("full", "zero3", *keys))
    forks.begin(run_dir)
    until(lambda: steps_done(run_dir) >= 2)  # told before the evaluation begins
    (run_dir / "stop.json").write_text(json.dumps({"reason": "asked"}))
    assert forks.end() == [75, 75], last_words(run_dir)
    saved = json.loads((run_dir / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert saved["evaluation_pending"] and not any("eval_loss" in row for row in metrics(run_dir))
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)  # the request was for the start that it stopped
    same(run_dir, untouched("full", "zero3", *keys))


def test_an_evaluation_that_was_due_is_made_by_the_next_start(forks, words, untouched, tmp_path):
    keys = ("train.eval_strategy=steps", "train.eval_steps=2")
    run_dir = forks.freeze(tmp_path / "run", *words("full", "ddp", *keys, 'train_until="step 4"'))
    assert forks.start(run_dir) == [75, 75]
    assert [row["step"] for row in metrics(run_dir) if "eval_loss" in row] == [2]
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, untouched("full", "ddp", *keys))


def test_who_was_given_up_writes_nothing_more(forks, words, tmp_path):
    """Another machine has taken the run: its token is higher. The old ranks end, and neither commit nor log."""
    run_dir = forks.freeze(tmp_path / "run", *words("full", "zero2", *LONG))
    pids = forks.begin(run_dir)
    until(lambda: steps_done(run_dir) >= 2)
    kill(pids, signal.SIGSTOP)
    lease = json.loads((run_dir / "lease.json").read_text())
    (run_dir / "lease.json").write_text(json.dumps({**lease, "token": lease["token"] + 1, "host": "elsewhere"}))
    before = committed(run_dir), (run_dir / "metrics.jsonl").read_bytes()
    kill(pids, signal.SIGCONT)
    assert 93 in forks.end(), last_words(run_dir)
    assert (committed(run_dir), (run_dir / "metrics.jsonl").read_bytes()) == before
    assert "taken over by process" in last_words(run_dir)


def test_a_second_start_is_refused(forks, words, verb, tmp_path):
    run_dir = forks.freeze(tmp_path / "run", *words("full", "zero2", *LONG))
    pids = forks.begin(run_dir)
    until(lambda: steps_done(run_dir) >= 1)
    kill(pids, signal.SIGSTOP)
    verb("resume", run_dir).refused("in use by process", str(pids[0]))
    kill(pids, signal.SIGCONT)
    assert forks.end() == [0, 0], last_words(run_dir)


def test_a_rank_that_stands_still_is_named(forks, words, tmp_path):
    run_dir = forks.freeze(tmp_path / "run", *words("full", "ddp", *LONG, "health.stall_minutes=0.05"))
    pids = forks.begin(run_dir)
    until(lambda: steps_done(run_dir) >= 2)
    kill(pids[1:], signal.SIGSTOP)
    until(lambda: (run_dir / "logs" / "rank-0.error.json").exists())
    kill(pids[1:])
    forks.end()
    message = json.loads((run_dir / "logs" / "rank-0.error.json").read_text())["message"]
    assert "no progress for 3 s" in message and "rank 1 gives no sign of life" in message


def test_a_full_disk(forks, words, untouched, tmp_path, request):
    """Room for two checkpoints, not for a third beside them: saves fail and say so, the run goes on and ends well."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk], check=True))
    keys = ("checkpoint.every_steps=1", "checkpoint.background=false", "checkpoint.keep_last=2")
    run_dir = forks.freeze(disk / "run", *words("full", "ddp", *keys, "checkpoint.max_failed_saves=9"))
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    failed = events(run_dir, "save-failed")
    assert failed and "the disk lacks" in failed[0]["reason"] and failed[0]["newest"] == 2
    same(run_dir, untouched("full", "ddp"))


def test_numbers_that_are_none(forks, words, tmp_path):
    """A learning rate that blows the weights up: the run stops, says so, and keeps the raw values."""
    for engine in ("ddp", "zero2"):
        keys = ("train.learning_rate=1e30", "health.first_loss=ignore")
        run_dir = forks.freeze(tmp_path / engine, *words("full", engine, *keys))
        assert 93 in forks.start(run_dir), last_words(run_dir)
        assert "the gradients are not finite (health.nonfinite=stop)" in last_words(run_dir)
        (event,) = events(run_dir, "health-nonfinite")
        assert event["step"] == 2 and event["grad_norm"] in ("nan", "inf")
        assert len(event["loss_by_rank"]) == 2
