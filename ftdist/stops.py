"""Why a run should stop: signals to this process, a request in the run directory, a limit of time or steps.

Each is only noted here. The ranks agree on it at the next step boundary, save, and end with status 75.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftdist.errors import INTERRUPTED, STOPPED, UserError

REQUEST = "stop.json"
STARTED = "FTDIST_STARTED"  # when the first process of a start began, in seconds since the epoch
RUNNING = ".training"  # there while steps are trained: from then on a stop has something to save
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGUSR2: "SIGUSR2", signal.SIGINT: "Ctrl-C"}
AGAIN = 1.0  # seconds: the terminal and the launcher both pass on one Ctrl-C; a second one comes later
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_noted: dict[str, Any] = {}
_nothing_to_save = True
_last_word: Callable[[str, int, str], None] | None = None


def listen(last_word: Callable[[str, int, str], None]) -> None:
    """From now on signals that ask for an end are noted; until training begins they end the process at once.

    last_word: told a line, the status, and the signal, before it ends.
    """
    global _last_word
    _last_word = last_word
    for number in SIGNALS:
        signal.signal(number, _note)


def training_begins() -> None:
    """From now on a stop has something to save, and afterwards a model to write."""
    global _nothing_to_save
    _nothing_to_save = False


def _note(number: int, _: Any) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and "Ctrl-C" in _noted and now - _noted["Ctrl-C"] > AGAIN:
        os._exit(INTERRUPTED)
    _noted.setdefault(SIGNALS[signal.Signals(number)], now)
    _noted.setdefault("reason", SIGNALS[signal.Signals(number)])
    if _nothing_to_save:
        status = INTERRUPTED if number == signal.SIGINT else STOPPED
        assert _last_word is not None
        _last_word(f"stopped ({_noted['reason']}) before training began", status, _noted["reason"])
        os._exit(status)


def noted() -> str | None:
    """The signal that this process was sent, if any."""
    reason: str | None = _noted.get("reason")
    return reason


def request(run_dir: Path, reason: str) -> None:
    """Ask a run to save and stop; whoever may write into its directory can."""
    partial = run_dir / f".{REQUEST}.{os.getpid()}"
    partial.write_text(json.dumps({"reason": reason, "time": time.time()}), encoding="utf-8")
    partial.replace(run_dir / REQUEST)


def requested(run_dir: Path) -> str | None:
    """The reason of such a request. An empty file named stop.json is one too."""
    file = run_dir / REQUEST
    if not file.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    return REQUEST


class Limit:
    """`train_until`: a duration from the start of the command (90m, 2h30m), a date and time, or `step N`."""

    def __init__(self, text: str | None) -> None:
        self.step: int | None = None
        self.at: float | None = None
        self.text = text
        if text is None:
            return
        words = str(text).strip()
        if match := re.fullmatch(r"step\s*(\d+)", words):
            self.step = int(match[1])
        elif re.fullmatch(r"(\d+(\.\d+)?[smhd])+", words):
            seconds = sum(float(n) * UNITS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", words))
            self.at = float(os.environ.get(STARTED, time.time())) + seconds
        else:
            try:
                self.at = datetime.datetime.fromisoformat(words).timestamp()
            except ValueError:
                raise UserError(
                    f"train_until={text}: should be a duration (90m, 2h30m), a date and time (2026-01-31T08:00), "
                    "or a step (step 500)"
                )

    def reached(self, step: int, reserve: float) -> str | None:
        """The reason to stop after `step` steps, if another one and a save (`reserve` seconds) no longer fit."""
        by_step = self.step is not None and step >= self.step
        by_time = self.at is not None and time.time() + reserve >= self.at
        return f"train_until={self.text}" if by_step or by_time else None
