"""What the short and the long drill do to a run."""

import os
import random
import shutil
import signal
import time

from runs import last_words, same

LONG = ("train.max_steps=30", "checkpoint.every_steps=3", "train.num_train_epochs=9")  # past the first epoch's end


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def steps_done(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.exists() else 0


def saving(run_dir):
    return any((run_dir / "checkpoints").glob(".*.draft"))


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        os.kill(pid, number)


def drill(forks, frozen, expected, kills, seed, world=2):
    """SIGKILL to every rank, `kills` times: inside a save, after a step, at any time. How many of each.

    No committed checkpoint may be lost, and each run that gets to its end must have the bits of the `expected` one; a
    fresh copy of the `frozen` one is then taken on.
    """
    chance = random.Random(seed)
    counts = {"inside a save": 0, "inside a step": 0, "at any time": 0}
    number, run_dir = 0, None
    while sum(counts.values()) < kills:
        if run_dir is None:
            number += 1
            run_dir = shutil.copytree(frozen, frozen.with_name(f"{frozen.name}-{number}"))
        (run_dir / ".training").unlink(missing_ok=True)
        pids = forks.begin(run_dir, world)
        where = list(counts)[sum(counts.values()) % 3]
        target, moment = committed(run_dir) + chance.randint(1, 5), time.monotonic() + chance.uniform(0, 4)
        until(lambda r=run_dir, w=where, t=target, m=moment: (r / "outcome.json").exists() or reached(r, w, t, m))
        before, ended = committed(run_dir), (run_dir / "outcome.json").exists()
        if ended:
            assert forks.end() == [0] * world, last_words(run_dir)
            same(run_dir, expected)
            run_dir = None
            continue
        kill(pids)
        forks.end()
        counts[where] += 1
        assert committed(run_dir) >= before, "a committed checkpoint was lost"
        if (run_dir / "outcome.json").exists():  # it got to its end all the same
            run_dir = None
    if run_dir is not None:
        assert forks.start(run_dir, world) == [0] * world, last_words(run_dir)
        same(run_dir, expected)
    return counts


def reached(run_dir, where, target, moment):
    """Whether the moment of a kill has come."""
    if where == "inside a save":
        return saving(run_dir)
    if where == "inside a step":
        return (run_dir / ".training").exists() and steps_done(run_dir) >= target
    return time.monotonic() >= moment


def committed(run_dir):
    found = [
        int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*") if (path / "manifest.json").exists()
    ]
    return max(found, default=-1)


def truncate(checkpoint):
    file = checkpoint / "rank-00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(checkpoint, name="rank-00000.safetensors"):
    with (checkpoint / name).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))


def flip_manifest(checkpoint):
    file = checkpoint / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"tokens": ', '"tokens": 1', 1))


def lose(checkpoint):
    (checkpoint / "rank-00001.json").unlink()


def unmake(checkpoint):
    (checkpoint / "manifest.json").unlink()


DAMAGES = {
    "truncated shard": truncate,
    "flipped byte": flip,
    "flipped manifest": flip_manifest,
    "deleted rank file": lose,
    "no manifest": unmake,
}
