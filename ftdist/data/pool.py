"""Work over cores: an ordered map over processes with a bounded number of tasks in flight, and progress
on stderr."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from ftdist.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use (a SLURM task's share, not the node's)."""
    return len(os.sched_getaffinity(0))


def _start(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.set_threshold(200_000, 20, 50)  # millions of small objects live and die here, hardly one in a cycle
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no worker behind
    if os.getppid() != parent:
        os._exit(1)


class Pool:
    """`workers` spawned processes, or none: with one worker the tasks run in this process."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            self._executor = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
            )

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Results in the order of the tasks. At most two tasks a worker are held, so memory has a bound."""
        if self._executor is None:
            yield from map(function, tasks)
            return
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(self._executor.submit(function, task))
                if len(waiting) > 2 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"data.workers={self._workers}: a preparation process was killed (out of memory?); "
                "set a smaller data.workers"
            ) from None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def pool(workers: int) -> Iterator[Pool]:
    """A pool that is gone afterwards, whatever happened."""
    made = Pool(workers)
    try:
        yield made
    finally:
        made.close()


class Progress:
    """How far a stage is: a live line on a terminal, else a line every ten seconds."""

    def __init__(self, stage: str, unit: str) -> None:
        self._stage, self._unit = stage, unit
        self._count = 0
        self._live = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._live else 10):
            self._shown = now
            self._show("\r" if self._live else "", "" if self._live else "\n")

    def _show(self, start: str, end: str) -> None:
        rate = self._count / max(time.monotonic() - self._started, 1e-3)
        sys.stderr.write(f"{start}data: {self._stage}: {self._count:,} {self._unit}, {rate:,.0f}/s{end}")
        sys.stderr.flush()

    def done(self) -> None:
        if self._live:
            self._show("\r", "\n")
