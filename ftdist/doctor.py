"""A proof on this machine that a run survives being killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ftdist import checkpoint
from ftdist.errors import OK, Failed

DRILL = ("train.max_steps=40", "checkpoint.every_steps=5", "checkpoint.keep_last=2", "eval.samples=0",
         "train.logging_steps=1", "tracking=none", "cluster.oversubscribe=true")  # fmt: skip
MEASURED = ("tokens_per_second", "memory_gib")  # on the machine: all other numbers of a run must be the same


def fault_drill(words: list[str], kills: int, seed: int) -> None:
    """Train one run untouched and one that is killed `kills` times; Failed unless both end the same, bit by bit.

    Every third kill falls into a save, the others at a moment by chance. `words`: overrides, such as the strategy,
    engine and model in question; the demo otherwise.
    """
    folder = Path(tempfile.mkdtemp(prefix="ftdist-drill-"))
    chance = random.Random(seed)
    began = time.monotonic()
    print(f"untouched run … (in {folder})", flush=True)
    _end(_start(folder / "untouched", words))
    length = time.monotonic() - began
    print(f"untouched run: {length:.0f} s", flush=True)
    run_dir, done, lost = folder / "killed", 0, 0
    while done < kills:
        process = _start(run_dir, words)
        in_save = done % 3 == 0
        moment = time.monotonic() + chance.uniform(0.2, 1.0) * length
        while process.poll() is None and (not _saving(run_dir) if in_save else time.monotonic() < moment):
            time.sleep(0.002)
        if process.poll() is not None:
            if process.returncode != OK:
                raise Failed(f"the drilled run failed by itself (status {process.returncode}): {run_dir}")
            print("the run was finished before the moment of the kill; a new one", flush=True)
            _compare(folder / "untouched", run_dir)
            shutil.rmtree(run_dir)
            continue
        before = checkpoint.steps(run_dir)[:1]
        _kill(process)
        done += 1
        after = checkpoint.steps(run_dir)[:1]
        lost += after < before
        where = "inside a save" if in_save else "at a moment by chance"
        print(f"kill {done} of {kills}: {where}; newest checkpoint: {after or 'none yet'}", flush=True)
    _end(_start(run_dir, words))
    _compare(folder / "untouched", run_dir)
    if lost:
        raise Failed(f"{lost} committed checkpoints were lost: {run_dir}")
    print(f"{kills} kills: the same losses in every step, the same bits in the final weights", flush=True)
    shutil.rmtree(folder)


def _start(run_dir: Path, words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ftdist.cli", "train", *words, *DRILL, f"run_dir={run_dir}", "resume=auto"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)  # Ctrl-C reaches it too


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != OK:
        raise Failed(f"the drill's run ended with status {process.returncode}; its own line is above")


def _saving(run_dir: Path) -> bool:
    folder = run_dir / checkpoint.FOLDER
    return folder.is_dir() and any(folder.glob(".*.draft"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Everything at once, as a power cut does it: stopped first, so that nobody sees another one die."""
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        process.wait()
        return
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in family:
            try:
                os.kill(member.pid, number)
            except ProcessLookupError:
                continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def _compare(one: Path, other: Path) -> None:
    for a, b in itertools.zip_longest(_metrics(one), _metrics(other)):
        if a != b:
            raise Failed(f"metrics.jsonl differs: {a} untouched, {b} after the kills ({one.parent} is kept)")
    files = sorted((one / "final").glob("*.safetensors"))
    if not files:
        raise Failed(f"{one / 'final'}: no weights in it ({one.parent} is kept)")
    for file in files:
        if file.read_bytes() != (other / "final" / file.name).read_bytes():
            raise Failed(f"{file.name}: the final weights differ ({one.parent} is kept)")


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
