"""The long drill (`make drill`): every fault many times, over strategies and engines; ends with a table."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from drills import DAMAGES, LONG, committed, drill, kill, steps_done, until
from runs import events, last_words, same

from ftdist import lease
from ftdist.errors import UserError

pytestmark = pytest.mark.slow
CELLS = [(s, e) for s in ("full", "lora", "qlora", "spectrum") for e in ("ddp", "zero2", "zero3")]
KILLS, SIGNALS, DAMAGED = 17, 2, 2  # in each of the 12 cells: 204 kills, 24 of each signal, 24 of each damage


RACER = """
import sys
from pathlib import Path
from ftdist import errors, lease
print("ready", flush=True)
sys.stdin.readline()
try:
    lease.take(Path(sys.argv[1]))
    print("taken", flush=True)
except errors.UserError:
    print("refused", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def counted(record_property):
    """`counted(fault, engine, count)`: a line of the table, once the outcome is as promised."""

    def counted(fault, engine, count):
        record_property("fault", json.dumps([fault, engine, count]))

    return counted


@pytest.fixture
def prepared(forks, words, untouched, tmp_path):
    """`prepared(strategy, engine)`: a frozen run, and the one that nothing happened to."""

    def prepared(strategy, engine, *more):
        run_dir = forks.freeze(tmp_path / "run", *words(strategy, engine, *LONG, *more))
        return run_dir, untouched(strategy, engine, *LONG)

    return prepared


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_kills(forks, prepared, counted, strategy, engine):
    frozen, expected = prepared(strategy, engine)
    for where, count in drill(forks, frozen, expected, KILLS, seed=f"long {strategy} {engine}").items():
        counted(f"SIGKILL of all ranks, {where}", engine, count)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_signals(forks, prepared, counted, strategy, engine, number):
    run_dir, expected = prepared(strategy, engine)
    chance = random.Random(f"{strategy} {engine} {number}")
    stops = 0
    while stops < SIGNALS:
        (run_dir / ".training").unlink(missing_ok=True)
        pids = forks.begin(run_dir)
        target = committed(run_dir) + chance.randint(1, 10)
        ready = lambda target=target: (run_dir / ".training").exists() and steps_done(run_dir) >= target  # noqa: E731
        until(lambda ready=ready: ready() or (run_dir / "outcome.json").exists())
        kill(chance.sample(pids, chance.randint(1, 2)), number)
        assert forks.end() == [75, 75], last_words(run_dir)
        (run_dir / "outcome.json").unlink()
        stops += 1
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, expected)
    counted(f"{signal.Signals(number).name} to some ranks", engine, stops)


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_damage(forks, prepared, counted, strategy, engine, tmp_path):
    run_dir, expected = prepared(strategy, engine, 'train_until="step 17"')
    assert forks.start(run_dir) == [75, 75], last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    for name, damage in DAMAGES.items():
        for attempt in range(DAMAGED):
            broken = shutil.copytree(run_dir, tmp_path / f"{name} {attempt}")
            damage(broken / "checkpoints" / "step-00000017")
            assert forks.start(broken) == [0, 0], last_words(broken)
            assert [event["step"] for event in events(broken, "set-aside")] == [17]
            same(broken, expected)
            shutil.rmtree(broken)
        counted(f"newest checkpoint: {name}", engine, DAMAGED)


def fill(ballast, left):
    """Take what the file system has but `left` bytes; the run takes from it at the same time, so try again."""
    with ballast.open("wb") as file:
        while True:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(ballast.parent).free - left))
                return
            except OSError as failure:
                if failure.errno != errno.ENOSPC:
                    raise


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_full_disk(forks, words, untouched, counted, tmp_path, request, strategy, engine):
    """The disk is full from a moment on, and has room again later: the run goes on without saves, then with them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk], check=True))
    run_dir = forks.freeze(disk / "run", *words(strategy, engine, *LONG, "checkpoint.max_failed_saves=99"))
    for _ in range(DAMAGED):
        (run_dir / ".training").unlink(missing_ok=True)
        pids = forks.begin(run_dir)
        until(lambda: (run_dir / ".training").exists() and steps_done(run_dir) >= 1)
        ballast = disk / "ballast"
        fill(ballast, 200 << 10)
        failures = len(events(run_dir, "save-failed"))
        until(lambda n=failures: len(events(run_dir, "save-failed")) > n or (run_dir / "outcome.json").exists())
        ballast.unlink()
        kill(pids)
        forks.end()
        (run_dir / "outcome.json").unlink(missing_ok=True)
        shutil.rmtree(run_dir / "final", ignore_errors=True)
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, untouched(strategy, engine, *LONG))
    counted("full disk during saves, then SIGKILL", engine, DAMAGED)


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_two_starts_at_once(forks, prepared, counted, strategy, engine):
    """Of several starts in one moment one gets the run; a later one is refused, even while that one stands still."""
    run_dir, expected = prepared(strategy, engine)
    for _ in range(DAMAGED):
        racers = [
            subprocess.Popen([sys.executable, "-c", RACER, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        assert all(racer.stdout.readline() == b"ready\n" for racer in racers)
        for racer in racers:
            racer.stdin.write(b"go\n")
            racer.stdin.flush()
        assert sorted(racer.stdout.readline() for racer in racers) == [b"refused\n", b"refused\n", b"taken\n"]
        for racer in racers:
            racer.communicate()
        pids = forks.begin(run_dir)
        until(lambda pids=pids: lease.read(run_dir).pid in pids)
        kill(pids, signal.SIGSTOP)
        with pytest.raises(UserError, match="in use by process"):
            lease.take(run_dir)
        kill(pids, signal.SIGCONT)
        kill(pids)
        forks.end()
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, expected)
    counted("starts at once, and one while another is alive", engine, DAMAGED)
