"""A thread that sees what the main thread cannot while it waits: a stalled collective, a launcher that is gone."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ftdist.errors import FAILED

BEAT = 5.0  # seconds between signs of life
ORPHANED = 60.0  # seconds without progress (a save is some) after which a rank without launcher ends


class Watch:
    """Signs of life of this rank in RUN/logs, and an end to waiting for what does not come."""

    def __init__(self, logs: Path, rank: int, world: int, stall_minutes: float, report: Any) -> None:
        """report: called with one line when this rank gives up; the process then ends."""
        self.logs, self.rank, self.world = logs, rank, world
        self.limit = stall_minutes * 60
        self.report = report
        self.done = 0  # rises with every micro-batch and every step: comparable between ranks
        self.step = 0
        self.changed = time.monotonic()
        self.watching = False
        self.launcher = os.getppid()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def progress(self, step: int) -> None:
        """Something was finished in this step."""
        self.done += 1
        self.step = step
        self.changed = time.monotonic()
        self.watching = True

    def pause(self) -> None:
        """What comes now may take any time (a save, an evaluation by other means)."""
        self.watching = False

    def _run(self) -> None:
        beat, orphan_since = 0.0, None
        while True:
            time.sleep(min(1.0, self.limit / 4))
            now = time.monotonic()
            if os.getppid() != self.launcher:
                orphan_since = orphan_since or now
                if now - max(orphan_since, self.changed) > ORPHANED:
                    os._exit(FAILED)
            if now - beat > min(BEAT, self.limit / 4):
                beat = now
                with contextlib.suppress(OSError):
                    self._beat()
            if self.watching and now - self.changed > self.limit:
                faulthandler.dump_traceback(sys.stderr)
                self.report(self.blame(time.time()))
                os._exit(FAILED)

    def _beat(self) -> None:
        partial = self.logs / f".rank-{self.rank}.alive.json"
        partial.write_text(json.dumps({"done": self.done, "step": self.step, "time": time.time()}))
        partial.replace(self.logs / f"rank-{self.rank}.alive.json")

    def blame(self, now: float) -> str:
        """Which rank the others wait for: one without a sign of life, else the one that has come least far."""
        lives: dict[int, dict[str, Any]] = {}
        for rank in range(self.world):
            with contextlib.suppress(OSError, ValueError):
                lives[rank] = json.loads((self.logs / f"rank-{rank}.alive.json").read_text())
        lives[self.rank] = {"done": self.done, "step": self.step, "time": now}
        text = f"no progress for {self.limit:.0f} s in step {self.step + 1}"
        missing = [rank for rank in range(self.world) if rank not in lives]
        silent = [rank for rank, life in lives.items() if now - life["time"] > 3 * min(BEAT, self.limit / 4)]
        if missing or silent:
            rank = (missing + silent)[0]
            return f"{text}: rank {rank} gives no sign of life (stopped, or its machine is gone)"
        behind = min(lives, key=lambda rank: lives[rank]["done"])
        if lives[behind]["done"] == max(life["done"] for life in lives.values()):
            return f"{text}: all ranks wait at the same place (rank {self.rank} says so)"
        return f"{text}: the others wait for rank {behind} (last finished step {lives[behind]['step']})"
