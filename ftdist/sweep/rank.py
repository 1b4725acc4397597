"""What came out of a sweep: its members best first, as rows, as a table, as results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftdist import lease, rundir
from ftdist.errors import USAGE
from ftdist.sweep import directory, objective
from ftdist.tracking import duration

FILE = "results.json"
INTERRUPTED = "interrupted"  # killed, or back in the queue of SLURM


def results(sweep_dir: Path) -> list[dict[str, Any]]:
    """`name words state reason objective seconds attempts` of every member, best first; results.json has them too."""
    asked = directory.read(sweep_dir)
    sweep, rows = asked["sweep"], {}
    for entry in asked["members"]:
        name = entry["name"]
        state = judged(sweep_dir / name, directory.state(sweep_dir, name), sweep["objective"])
        rows[name] = {
            "name": name,
            "words": entry["words"],
            "state": _word(sweep_dir / name, state),
            "reason": state.reason,
            "objective": value(sweep_dir / name, state, sweep["objective"]),
            "seconds": round(state.seconds, 1),
            "attempts": state.attempts,
        }
    best = objective.order({name: row["objective"] for name, row in rows.items()}, sweep["direction"])
    found = [rows[name] for name in best]
    rundir.write_json(
        sweep_dir / FILE, {"objective": sweep["objective"], "direction": sweep["direction"], "members": found}
    )
    return found


def _word(run_dir: Path, state: directory.State) -> str:
    """The state for people: a member that was begun, and has nobody now, was interrupted."""
    if state.state == directory.RUNNING and lease.living(run_dir) is None:
        return INTERRUPTED
    return state.state


def table(rows: list[dict[str, Any]], name: str) -> str:
    """The rows for a terminal, with the reasons of what failed below."""
    head = ("", "member", "state", name, "time", "tries")
    lines = [head]
    for place, row in enumerate(rows, 1):
        ranked = row["objective"] is not None
        number = f"{row['objective']:.6g}" if ranked else "–"
        time = duration(row["seconds"])
        lines.append((str(place) if ranked else "", row["name"], row["state"], number, time, str(row["attempts"])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = []
    for line in lines:
        cells = [c.ljust(w) if i in (1, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        shown.append("  ".join(cells))
    reasons = [
        f"{row['name']}: {row['reason']}" for row in rows if row["state"] in (directory.FAILED, directory.REFUSED)
    ]
    return "\n".join(line.rstrip() for line in [*shown, *reasons])


def value(run_dir: Path, state: directory.State, wanted: str) -> float | None:
    """The objective of a member that is finished."""
    return objective.value(run_dir, wanted) if state.state == directory.FINISHED else None


def judged(run_dir: Path, state: directory.State, wanted: str) -> directory.State:
    """The state of a member by now: one that is finished, and has recorded no objective, has failed."""
    if state.state != directory.FINISHED or value(run_dir, state, wanted) is not None:
        return state
    there = ", ".join(objective.seen(run_dir)) or "nothing"
    reason = f"sweep.objective={wanted}: not among what it recorded: {there}"
    return directory.mark(run_dir.parent, run_dir.name, state=directory.FAILED, status=USAGE, reason=reason)


def settled(run_dir: Path, state: directory.State, wanted: str) -> None:
    """Say what has become of a member that has ended."""
    state = judged(run_dir, state, wanted)
    found = value(run_dir, state, wanted)
    number = f", {wanted} {found:.6g}" if found is not None else ""
    print(f"{run_dir.name}: {state.state}{number}{f': {state.reason}' if state.reason else ''}", flush=True)
    if state.state == directory.FINISHED:
        print(f"run: {run_dir}", flush=True)
