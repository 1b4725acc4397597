"""What runs are doing, on this machine or in SLURM, from what lies in their directories. No torch, no Hydra."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftdist import checkpoint, launcher, lease, rundir, stops
from ftdist import scheduler as slurm
from ftdist.errors import FAILED, INTERRUPTED, OK, STOPPED, Failed, UserError
from ftdist.tracking import duration

JOB = "job.json"  # the run's job: {"job", "prepare"}
PREPARE = "prepare.sbatch"  # in a run directory
UNKNOWN = "unknown"  # in place of a number: the script was sent to SLURM, which has not said what job it is
STOP = "ftdist stop"  # the reason of such a stop
FOLDERS = ("runs/*", "sweeps/*/*")
POLL = 0.5  # seconds between looks at files
ASK = 10.0  # at most so many between questions to SLURM


def default_runs() -> list[Path]:
    """The runs below the default folders, oldest first."""
    found = [path for pattern in FOLDERS for path in sorted(Path().glob(pattern)) if is_run(path)]
    if not found:
        raise UserError("status: no runs below runs/ or sweeps/ here; ftdist status RUN")
    return [path.absolute() for path in found]


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, finished or only begun."""
    return any((path / name).is_file() for name in ("config.yaml", JOB, rundir.CLAIM))


def jobs_of(runs: Sequence[Path]) -> dict[Path, dict[str, slurm.Job]]:
    """The jobs of each run that SLURM still knows, by number; one question for all of them."""
    numbers = {}
    here = shutil.which("squeue") is not None  # the files tell a part of it everywhere
    for run_dir in runs:
        known = rundir.read_json(run_dir / JOB)
        if here and UNKNOWN in known.values():
            known = _found(run_dir, known)
        numbers[run_dir] = [str(known[key]) for key in ("job", "prepare") if known.get(key) not in (None, UNKNOWN)]
    jobs = slurm.jobs(sorted({number for own in numbers.values() for number in own})) if here else {}
    return {run_dir: {number: jobs[number] for number in own if number in jobs} for run_dir, own in numbers.items()}


def _found(run_dir: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The run's job.json with the numbers of jobs that SLURM has taken without an answer, as far as they are queued."""
    scripts = {"job": slurm.SCRIPT, "prepare": PREPARE}
    for key in (key for key in scripts if known[key] == UNKNOWN):
        known[key] = slurm.job_of(run_dir / scripts[key]) or UNKNOWN
    with contextlib.suppress(OSError):  # somebody else's run
        rundir.write_json(run_dir / JOB, known)
    return known


def status(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """`run state detail step steps seconds_left job` of each; while SLURM is away, what files tell."""
    try:
        jobs = jobs_of(runs)
    except slurm.Away as away:
        print(f"{away} What follows is what files tell", file=sys.stderr, flush=True)
        return [_by_files(state(run_dir, {})) for run_dir in runs]
    return [state(run_dir, jobs[run_dir]) for run_dir in runs]


def _by_files(one: dict[str, Any]) -> dict[str, Any]:
    """A state that SLURM was not asked about: a run without a sign of life may wait in the queue."""
    if one["job"] and one["state"] in ("killed", "stopped"):
        return {**one, "state": "unknown", "detail": "SLURM does not answer; no process has the run"}
    return one


def state(run_dir: Path, jobs: dict[str, slurm.Job]) -> dict[str, Any]:
    """What one run is doing. jobs: those of it that SLURM knows."""
    plan = rundir.read_json(run_dir / "plan.json")
    metrics = last_line(run_dir / "metrics.jsonl")
    known = rundir.read_json(run_dir / JOB)
    step, steps = metrics.get("step", checkpoint_step(run_dir)), plan.get("total_steps")
    word, detail = _word(run_dir, known, jobs)
    left = None
    pace = metrics.get("tokens_per_second")
    if word == "running" and pace and step is not None and steps and plan.get("real_tokens_per_step"):
        left = round((steps - step) * plan["real_tokens_per_step"] / pace)
    return {"run": str(run_dir), "state": word, "detail": detail, "step": step, "steps": steps, "seconds_left": left,
            "job": known.get("job")}  # fmt: skip


def _word(run_dir: Path, known: dict[str, Any], jobs: dict[str, slurm.Job]) -> tuple[str, str]:
    """(state, detail)"""
    outcome, event = launcher.outcome_of(run_dir), last_event(run_dir)
    final = (run_dir / "final").is_dir()
    job, prepare = (jobs.get(str(known.get(key))) for key in ("job", "prepare"))
    if prepare is not None and prepare.active:
        return "preparing", f"job {prepare.id}, {prepare.state.lower()}"
    if job is not None and job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"):
        if event.get("time", 0) > known.get("submitted", 0):
            why = event.get("reason") or outcome.get("reason") or "by SLURM"
            word = "pre-empted" if why == "pre-empted" else "requeued"
            return word, f"{why}; waits again" + (f" ({job.reason})" if job.reason else "")
        return "queued", job.reason
    alive = lease.living(run_dir)
    if alive is not None and alive.job is not None and job is not None and not job.active:
        alive = None  # ended with its job, before it could give the lease back
    if (job is not None and job.active) or alive is not None:
        if not (run_dir / "config.yaml").is_file():
            return "preparing", ""
        if final:
            return "evaluating", ""
        if (run_dir / stops.RUNNING).exists():
            reason = stops.requested(run_dir)
            where = f"on {job.nodes}" if job is not None and job.nodes else ""
            return "running", f"saving, then stopping ({reason})" if reason else where
        return ("ending", "") if outcome else ("starting", "")
    evaluated = (run_dir / "eval" / "metrics.json").is_file()
    completed = job is not None and job.state == "COMPLETED"
    if final and (evaluated or completed or outcome.get("outcome") not in ("stopped", "failed")):
        return "done", ""
    if outcome.get("outcome") in ("stopped", "failed"):
        return str(outcome["outcome"]), str(outcome["reason"])
    if event.get("event") in ("failed", "stopped"):
        return event["event"], event["reason"]
    bad = next((one for one in (prepare, job) if one is not None and one.state != "COMPLETED"), None)
    if bad is not None:
        return ("cancelled" if bad.state == "CANCELLED" else "failed"), f"{bad.state} {bad.reason}".strip()
    if any((run_dir / "logs").glob("rank-*.error.json")):
        holder = lease.read(run_dir) if known.get("job") else None
        return "failed", launcher.first_error(run_dir, holder.token if holder else None)["message"]
    return "killed", "left no word; ftdist resume goes on"


def checkpoint_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint, where nothing was logged."""
    return next(iter(checkpoint.steps(run_dir)), None)


def last_event(run_dir: Path) -> dict[str, Any]:
    """The last of events.jsonl that tells how a start went: not checkpoints, not what was set aside."""
    last: dict[str, Any] = {}
    for line in lines(run_dir / "events.jsonl"):
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["event"] in ("job", "requeue", "failed", "stopped", "finished", "start", "resume", "restart"):
                last = event
    return last


def last_line(file: Path) -> dict[str, Any]:
    """The last whole row of training metrics."""
    for line in reversed(lines(file)):
        with contextlib.suppress(ValueError):
            row: dict[str, Any] = json.loads(line)
            if "loss" in row:
                return row
    return {}


def lines(file: Path) -> list[str]:
    """Of a text file; none if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def table(states: Sequence[dict[str, Any]]) -> str:
    """A line for each run."""
    rows = []
    for one in states:
        path = Path(one["run"])
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        step = "" if one["step"] is None else f"step {one['step']}" + (f"/{one['steps']}" if one["steps"] else "")
        left = "" if one["seconds_left"] is None else f"{duration(one['seconds_left'])} left"
        job = f"job {one['job']}" if one["job"] else ""
        rows.append((str(path), one["state"], step, left, job, one["detail"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    keep = [i for i, width in enumerate(widths) if width]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in keep).rstrip() for row in rows)


def stop(run_dir: Path) -> str:
    """Ask a run to save and stop, or take its job out of the queue; what was done. UserError: it is not active."""
    try:
        jobs = jobs_of([run_dir])[run_dir]
    except slurm.Away as away:
        stops.request(run_dir, STOP)
        if lease.living(run_dir) is None:
            raise slurm.Away(f"{away} A job that runs saves and ends; one that waits has to be stopped again")
        return f"asked to stop; it saves at the end of its step and goes on with `ftdist resume` ({away})"
    now = state(run_dir, jobs)
    waiting = [job for job in jobs.values() if job.active]
    if waiting and not any(_begun(run_dir, job) for job in waiting):
        slurm.cancel([job.id for job in waiting])
        rundir.record(run_dir, None, "stopped", now["step"], reason=STOP)
        return f"job {waiting[0].id} is taken out of the queue"
    if now["state"] == "preparing" and waiting:
        slurm.cancel([job.id for job in waiting])
        return "its jobs are cancelled; nothing was trained yet"
    if now["state"] not in ("running", "starting", "preparing", "evaluating"):
        raise UserError(f"{run_dir}: not active ({now['state']}); nothing to stop")
    holder = None if waiting or now["state"] == "running" else lease.living(run_dir)
    if holder is None or holder.job is not None:
        stops.request(run_dir, STOP)
        return "asked to stop; it saves at the end of its step and goes on with `ftdist resume`"
    # A process that nobody has queued, and that reads no requests outside training.
    if holder.host != socket.gethostname():
        raise UserError(f"{run_dir}: {now['state']} on {holder.host}, another machine; there: kill -TERM {holder.pid}")
    stops.request(run_dir, STOP)
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    return f"ended while {now['state']}"


def _begun(run_dir: Path, job: slurm.Job) -> bool:
    """Whether this start of a job has the run by now: before that it has nothing to save, and reads no request."""
    if job.state not in ("RUNNING", "SUSPENDED"):
        return job.state == "COMPLETING"
    holder, known = lease.read(run_dir), slurm.show(job.id)
    if not known:
        return True
    if holder is None or holder.released:
        return False
    return (holder.job, str(holder.restart)) == (known["JobId"], known["Restarts"])


def logs(run_dir: Path, follow: bool, rank: int | None = None) -> int:
    """Print what a run has said; with `follow` what it says until it ends, and its exit status then.

    Ctrl-C or a signal ends the following, not the run.
    """
    signals = [number for number in stops.SIGNALS if number != signal.SIGINT]
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        return _logs(run_dir, follow, rank)
    except KeyboardInterrupt:
        raise Failed(f"no longer followed; the run goes on (ftdist stop {run_dir} ends it)", INTERRUPTED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _logs(run_dir: Path, follow: bool, rank: int | None) -> int:
    watched: dict[Path, int] = {}
    asked, pause, known = 0.0, 1.0, None
    while True:
        if follow and time.monotonic() - asked > pause:
            with contextlib.suppress(UserError):  # the controller does not answer for a while; the run goes on
                known = state(run_dir, jobs_of([run_dir])[run_dir])["state"]
            asked, pause = time.monotonic(), min(pause * 1.5, ASK)
        if _print_news(run_dir, rank, watched):
            pause = 1.0
        if not follow or known in ("done", "stopped", "failed", "cancelled", "killed"):
            _print_news(run_dir, rank, watched)
            return OK if not follow else status_of(run_dir, str(known))
        time.sleep(POLL)


def status_of(run_dir: Path, word: str) -> int:
    """The exit status that a run in this state has ended with."""
    said = launcher.outcome_of(run_dir).get("status")
    if word == "done":
        return OK
    return int(said) if said else STOPPED if word == "stopped" else FAILED


def _print_news(run_dir: Path, rank: int | None, watched: dict[Path, int]) -> bool:
    """Print what has been added to the run's logs since the last look."""
    if rank is not None:
        files = [run_dir / "logs" / f"rank-{rank}.log"]
    else:
        files = sorted((run_dir / "logs").glob("job-*.log"), key=lambda file: file.stat().st_mtime)
    if files:
        news = [line for file in files for line in _added(file, watched)]
    else:  # of this machine: what its terminal has
        news = in_order(*(_added(run_dir / name, watched) for name in ("metrics.jsonl", "events.jsonl")))
    for line in news:
        print(line)
    sys.stdout.flush()
    return bool(news)


def _added(file: Path, watched: dict[Path, int]) -> list[str]:
    """The whole lines of a file since the last look."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as handle:
        handle.seek(watched.get(file, 0))
        data = handle.read()
        end = data.rfind(b"\n") + 1
        watched[file] = watched.get(file, 0) + end
        return data[:end].decode(errors="replace").splitlines()
    return []


def in_order(metrics: Sequence[str], events: Sequence[str]) -> list[str]:
    """Rows of both files as the terminal has them: what a step measured before what came after it."""
    told, left = [], [*_rows(metrics)]
    for event in _rows(events):
        while left and event.get("step") is not None and left[0].get("step", 0) <= event["step"]:
            told.append(_readable(left.pop(0)))
        told.append(_readable(event))
    return [*told, *map(_readable, left)]


def _rows(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):  # cut when the run was killed
            yield json.loads(line)


def _readable(row: dict[str, Any]) -> str:
    """A row of metrics or events as the terminal shows it."""
    if "event" in row:
        at = "" if row["step"] is None else f" at step {row['step']}"
        reason = f": {row['reason']}" if row.get("reason") else ""
        return f"{time.strftime('%H:%M:%S', time.localtime(row['time']))} {row['event']}{at}{reason}"
    if "eval_loss" in row:
        return f"step {row['step']}: held-out loss {row['eval_loss']:.4f}"
    told = [name for name in ("loss", "learning_rate", "tokens_per_second") if row.get(name) is not None]
    return " · ".join([f"step {row['step']}", *(f"{name} {row[name]:.4g}" for name in told)])
