"""What a profiled run has left (ftdist/profiling.py), read and summed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "profile"
PHASES = ("data", "forward", "loss", "backward", "communication", "optimizer", "logging", "save", "evaluation", "other")
OWN = ("data", "forward", "loss", "optimizer")  # in which no rank waits for another


def gathered(run_dir: Path) -> dict[str, Any]:
    """Of all starts of a run: `ranks` {rank: {seconds by phase}}, `steps` of rank 0, `slowest` {rank, share} where
    there are several; empty without a profile.

    share: by how much the slowest rank's time in OWN is above the fastest one's.
    """
    ranks: dict[int, dict[str, float]] = {}
    steps: list[float] = []
    parts = [json.loads(f.read_text(encoding="utf-8")) for f in (run_dir / FOLDER).glob("from-*-rank-*.json")]
    for part in sorted(parts, key=lambda part: (part["first_step"], part["rank"])):
        sums = ranks.setdefault(part["rank"], dict.fromkeys(PHASES, 0.0))
        for name, seconds in part["seconds"].items():
            sums[name] += seconds
        steps += part["step_seconds"] if part["rank"] == 0 else []
    if not ranks:
        return {}
    found: dict[str, Any] = {"ranks": ranks, "steps": steps}
    own = {rank: sum(seconds[name] for name in OWN) for rank, seconds in ranks.items()}
    if len(own) > 1 and min(own.values()) > 0:
        slowest = max(own, key=lambda rank: own[rank])
        found["slowest"] = {"rank": slowest, "share": own[slowest] / min(own.values()) - 1}
    return found
