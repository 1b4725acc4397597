"""The promises to the user, through the real commands and launchers."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from runs import events, metrics, same

REPOSITORY = Path(__file__).parents[2]
LONG = ("train.max_steps=30", "checkpoint.every_steps=3", "train.num_train_epochs=9")


def until(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_done(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.exists() else 0


def kill_all(process):
    """As a power cut does it: everything at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def test_killed_and_started_again(start, verb, words, untouched, tmp_path):
    """The same command goes on where it was, with resume=auto; another configuration in its place is refused."""
    run_dir = tmp_path / "run"
    same_command = (*words("full", "zero2", *LONG), f"run_dir={run_dir}", "resume=auto")
    process = start("ftdist", "train", *same_command, cwd=tmp_path)
    until(lambda: steps_done(run_dir) >= 5, process)
    kill_all(process)
    verb("train", *same_command, "train.learning_rate=1").refused("train.learning_rate=1", "was started with 0.01")
    verb("train", *same_command[:-1]).refused("run_dir=", "holds a run")
    finished = verb("train", *same_command)
    assert finished.status == 0 and finished.run_dir == run_dir, finished
    assert events(run_dir, "resume")[0]["step"] >= 3
    same(run_dir, untouched("full", "zero2", *LONG))
    again = verb("train", *same_command)
    assert again.status == 0 and "nothing to train" in again.stdout


def test_a_lost_rank_is_started_again(start, words, untouched, tmp_path):
    run_dir = tmp_path / "run"
    keys = (*words("lora", "ddp", *LONG), f"run_dir={run_dir}", "health.max_restarts=2")
    process = start("ftdist", "train", *keys, cwd=tmp_path)
    until(lambda: any((run_dir / "checkpoints").glob("step-*[3-9]")) or (run_dir / "final").exists(), process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "ftdist.worker" in p.cmdline()]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, (stdout, stderr)
    assert len(events(run_dir, "restart")) == 1 and "starting again" in stdout
    same(run_dir, untouched("lora", "ddp", *LONG))


@pytest.mark.parametrize(
    ("strategy", "engine", "command"),
    [
        ("full", "zero2", ("-m", "accelerate.commands.launch", "--config_file", "launch/zero2.yaml",
                           "--num_processes", "2", "--main_process_port", "0", "-m", "ftdist.train")),
        ("lora", "ddp", ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ftdist.train")),
    ],
)  # fmt: skip
def test_terminated_under_somebody_elses_launcher(
    start, forks, run, verb, words, untouched, tmp_path, strategy, engine, command
):
    """The launcher is sent SIGTERM, as a scheduler does it; `ftdist resume` goes on under its own launcher.

    Accelerate and its ranks are forked here; tests/main/test_outside_launcher.py starts its script.
    """
    if command[0] == "-m":
        command = (forks.python, *command)
    run_dir = tmp_path / "run"
    given = [word for word in words(strategy, engine, *LONG) if not word.startswith(("engine=", "cluster."))]
    process = start(*command, *given, f"run_dir={run_dir}", cwd=REPOSITORY)
    until(lambda: steps_done(run_dir) >= 2, process)
    process.terminate()
    process.communicate(timeout=100)
    assert process.returncode != 0
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["status"]) == ("stopped", 75)
    assert outcome["step"] == metrics(run_dir)[-1]["step"]
    local = ("cluster=local", "cluster.processes=2", "cluster.oversubscribe=true")
    finished = (run if engine == "zero2" else verb)("resume", run_dir, *local)
    assert finished.status == 0 and finished.run_dir == run_dir, finished
    same(run_dir, untouched(strategy, engine, *LONG))


@pytest.mark.slow
def test_the_proof_that_users_run(run, words):
    """`ftdist doctor --fault-drill` on a model and engine of one's own."""
    own = [word for word in words("lora", "zero2") if not word.startswith("train.max_steps=")]
    finished = run("doctor", "--fault-drill", "--kills", "3", *own, timeout=900)
    assert finished.status == 0, finished
    assert finished.stdout.splitlines()[-1] == (
        "3 kills: the same losses in every step, the same bits in the final weights"
    )
    assert finished.stdout.count("inside a save") == 1
