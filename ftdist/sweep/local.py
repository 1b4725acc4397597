"""Members as processes of this machine: so many at once, each on devices of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftdist import launcher, stops
from ftdist.errors import FAILED, INTERRUPTED, STOPPED, UserError
from ftdist.sweep import directory

LOGS = "logs"
ALIVE = ".alive"  # SWEEP/members/.alive: locked, shared, by every member's process for as long as it lives
LOOK = 0.25  # seconds between two looks at the members


@dataclass(frozen=True)
class Share:
    """The devices of one member at a time; None: all of the machine's."""

    gpus: tuple[str, ...] | None = None
    cores: tuple[int, ...] | None = None


@dataclass
class Running:
    """A member's process."""

    name: str
    process: subprocess.Popen[bytes]
    share: Share
    looked: float = 0.0


def shares(parallel: int, processes: int, oversubscribe: bool) -> list[Share]:
    """`parallel` equal shares of this machine's devices. UserError where it has too few for `processes` each."""
    if parallel == 1:
        return [Share()]
    count, kind = launcher.devices()
    if parallel * processes > count:
        if oversubscribe:
            return [Share()] * parallel
        raise UserError(
            f"sweep.parallel={parallel}: {parallel} members of {processes} process{'es' * (processes > 1)} want "
            f"{parallel * processes} {kind}s, this machine has {count}; use at most "
            f"sweep.parallel={max(1, count // processes)}, or cluster.oversubscribe=true"
        )
    size = count // parallel
    if kind == "GPU":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = [part.strip() for part in visible.split(",")] if visible else [str(i) for i in range(count)]
        return [Share(gpus=tuple(ids[i * size : (i + 1) * size])) for i in range(parallel)]
    cores = sorted(os.sched_getaffinity(0))
    return [Share(cores=tuple(cores[i * size : (i + 1) * size])) for i in range(parallel)]


def run(
    sweep_dir: Path,
    take: Callable[[], str | None],
    look: Callable[[str], None],
    ended: Callable[[str, directory.State], None],
    places: list[Share],
    retries: int,
    limit: stops.Limit,
) -> str | None:
    """Start members until `take` has no other, and wait for all; why it stopped before that, if it did.

    take: the next member's name; look: told of each running member now and then; ended: told what became of it.
    """
    running: list[Running] = []
    free = list(places)
    again: list[str] = []
    with _passing_on(running) as (asked, ask):
        while True:
            if not asked and (reason := stops.requested(sweep_dir)):
                ask(reason, signal.SIGTERM)
            late = limit.at is not None and time.time() >= limit.at
            while free and not asked and not late:
                name = again.pop(0) if again else take()
                if name is None:
                    break
                running.append(_start(sweep_dir, name, free.pop(0), alone=len(places) == 1))
                if asked:  # a signal that came while it was started has missed it
                    running[-1].process.terminate()
            if not running:
                return asked[0] if asked else f"train_until={limit.text}" if late else None
            for member in list(running):
                if member.process.poll() is None:
                    if time.monotonic() - member.looked > 4 * LOOK:
                        member.looked = time.monotonic()
                        look(member.name)
                    continue
                running.remove(member)
                free.append(member.share)
                state = settled(sweep_dir, member.name, member.process.returncode, bool(asked))
                if state.state == directory.FAILED and state.status == FAILED and state.retries < retries and not asked:
                    directory.again(sweep_dir, member.name)
                    print(f"{member.name}: failed, retry {state.retries + 1} of {retries}: {state.reason}", flush=True)
                    again.append(member.name)
                else:
                    ended(member.name, state)
            if running:
                time.sleep(LOOK)


def command(sweep_dir: Path, name: str) -> list[str]:
    """What starts a member, or goes on with it."""
    return [sys.executable, "-m", "ftdist.sweep.member", str(sweep_dir), name]


def _start(sweep_dir: Path, name: str, share: Share, alone: bool) -> Running:
    environment = dict(os.environ)
    if share.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    directory.begins(sweep_dir, name)
    words = command(sweep_dir, name)
    prepare = partial(_child, share.cores, os.getpid())
    if alone:
        return Running(
            name, subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=prepare), share
        )
    (sweep_dir / LOGS).mkdir(exist_ok=True)
    with (sweep_dir / LOGS / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare
        )
    print(f"{name}: started (log: {sweep_dir / LOGS / name}.log)", flush=True)
    return Running(name, process, share)


def _child(cores: tuple[int, ...] | None, parent: int) -> None:
    launcher.end_with_parent()
    if os.getppid() != parent:  # it was killed before that was said
        os._exit(STOPPED)
    if cores:
        os.sched_setaffinity(0, cores)


@contextmanager
def present(sweep_dir: Path) -> Iterator[None]:
    """While open, another start of the sweep sees that a member's process lives."""
    with (sweep_dir / directory.FOLDER / ALIVE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_earlier(sweep_dir: Path) -> None:
    """Until the members of an earlier start that was killed have ended: each was asked to save by the kernel."""
    with (sweep_dir / directory.FOLDER / ALIVE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("members of an earlier start still save; waiting until they have ended", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def settled(sweep_dir: Path, name: str, returncode: int, asked: bool) -> directory.State:
    """What became of a member whose process has ended; one that was killed could not write it down itself."""
    state = directory.state(sweep_dir, name)
    if state.state != directory.RUNNING:
        return state
    if returncode in (STOPPED, INTERRUPTED) or (asked and returncode < 0):
        return directory.mark(sweep_dir, name, state=directory.STOPPED, status=STOPPED, reason="stopped")
    reason = f"killed by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"
    return directory.mark(sweep_dir, name, state=directory.FAILED, status=FAILED, reason=reason)


@contextmanager
def _passing_on(running: list[Running]) -> Iterator[tuple[list[str], Callable[[str, int], None]]]:
    """While open a signal that asks for an end goes to every member, which saves and stops.

    Gives the list of who has asked, and what asks for an end by another way.
    """
    asked: list[str] = []

    def ask(reason: str, number: int) -> None:
        asked.append(reason)
        print(f"\n{reason}: the running members save, then the sweep stops", flush=True)
        for member in running:
            if member.process.poll() is None:
                member.process.send_signal(number)

    def signalled(number: int, _: Any) -> None:
        ask(stops.SIGNALS[signal.Signals(number)], number)

    previous = {number: signal.signal(number, signalled) for number in stops.SIGNALS}
    try:
        yield asked, ask
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
