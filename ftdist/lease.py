"""Who may write into a run directory: a lease with a token that rises at every start (fencing).

A start takes the lease, every commit and every line of metrics checks it again. An old process that a scheduler gave
up on, and that goes on all the same, finds a higher token and ends without having written anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ftdist.errors import FENCED, Failed, UserError
from ftdist.stops import REQUEST

FILE = "lease.json"
LOCK = ".lease.lock"
VARIABLE = "FTDIST_LEASE"  # the token, from the process that took the lease to the ranks
BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one after which a holder on another machine counts as gone
PATIENCE = 30.0  # seconds to wait for the lock, which is held for milliseconds


@dataclass(frozen=True)
class Lease:
    """One start's right to write. `job`, `restart`: SLURM's, which starts a job again only when it gave up on it."""

    token: int
    host: str
    pid: int
    born: str  # the process's own start time: numbers of processes are used again
    boot: str
    since: float
    job: str | None
    restart: int
    released: bool = False


def take(run_dir: Path) -> Lease:
    """Take the run directory for this process, and show that it lives. UserError names who holds it and is alive."""
    with locked(run_dir):
        holder = read(run_dir)
        if holder is not None and _alive(run_dir, holder):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
            raise UserError(
                f"run_dir={run_dir}: in use by process {holder.pid} on {holder.host} since {since}; "
                "wait until it ends, or stop it (it saves first): kill -TERM that process"
            )
        mine = Lease(
            token=(holder.token if holder else 0) + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            boot=_boot(),
            since=time.time(),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )
        _write(run_dir, mine)
        (run_dir / REQUEST).unlink(missing_ok=True)  # whoever asked for an end, asked an earlier start
    keep_alive(run_dir, mine.token)
    return mine


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[int]:
    """Take the run directory while open; its token."""
    token = take(run_dir).token
    try:
        yield token
    finally:
        release(run_dir, token)


def read(run_dir: Path) -> Lease | None:
    """The lease as it stands; None before the first start."""
    try:
        return Lease(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def living(run_dir: Path) -> Lease | None:
    """Who has the run and is alive, for somebody who only looks: nothing is written, clocks are taken to agree."""
    holder = read(run_dir)
    if holder is None or holder.released:
        return None
    if holder.host == socket.gethostname() and holder.boot == _boot():
        return holder if _born(holder.pid) == holder.born else None
    return holder if time.time() - (run_dir / FILE).stat().st_mtime < STALE else None


def check(run_dir: Path, token: int) -> None:
    """Failed, if somebody else has taken the run over."""
    holder = read(run_dir)
    if holder is None or holder.token != token:
        who = f"process {holder.pid} on {holder.host}" if holder else "nobody (lease.json is gone)"
        raise Failed(f"this run was taken over by {who}; nothing more is written by this process", FENCED)


@contextlib.contextmanager
def guarded(run_dir: Path, token: int) -> Iterator[None]:
    """While open nobody can take the run over: check and write are one."""
    with locked(run_dir):
        check(run_dir, token)
        yield


def release(run_dir: Path, token: int) -> None:
    """Give the lease back, so that another machine need not wait until it is stale."""
    with contextlib.suppress(OSError, UserError), locked(run_dir):
        holder = read(run_dir)
        if holder is not None and holder.token == token:
            _write(run_dir, replace(holder, released=True))


def keep_alive(run_dir: Path, token: int) -> None:
    """Show signs of life from a thread of this process, for as long as the lease is its own."""

    def beat() -> None:
        while True:
            time.sleep(BEAT)
            try:
                check(run_dir, token)
                os.utime(run_dir / FILE)
            except Failed:
                return
            except OSError:
                continue  # a hiccup of the file system; the next beat may succeed

    threading.Thread(target=beat, name="lease", daemon=True).start()


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The lock around every change of the lease and every commit; the kernel lets go of it when a process dies."""
    with (run_dir / LOCK).open("a") as file:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as failure:
                if failure.errno not in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"run_dir={run_dir}: its file system has no locks ({failure.strerror}); mount it with them "
                        "(Lustre: -o flock), or choose another"
                    )
                if time.monotonic() > until:
                    holder = read(run_dir)
                    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
                    raise UserError(
                        f"run_dir={run_dir}: in use by {who}, and its lock was held for {PATIENCE:.0f} s; wait, or end "
                        "whoever stands still"
                    )
                time.sleep(0.05)
        yield


def _write(run_dir: Path, lease: Lease) -> None:
    partial = run_dir / f".{FILE}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(lease), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(run_dir / FILE)


def _alive(run_dir: Path, held: Lease) -> bool:
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if held.released or (held.job and held.job == os.environ.get("SLURM_JOB_ID") and restart > held.restart):
        return False
    if held.host == socket.gethostname() and held.boot == _boot():
        return _born(held.pid) == held.born
    probe = run_dir / f".clock.{os.getpid()}"  # the file system's own clock, which both machines see
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - (run_dir / FILE).stat().st_mtime < STALE


def _born(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
