"""A sweep in SLURM: the members of a grid as one array, a search as an array of workers that share its storage.

The batch process of a member is that of a run (ftdist.batch): it requeues itself after pre-emption and time limits. A
worker is one that goes on to the next trial. What became of a member is written into the sweep by its own job.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftdist import batch, follow, job, launcher, lease, resume, rundir, schema, stops, submit
from ftdist import scheduler as slurm
from ftdist.errors import FAILED, OK, USAGE, Failed, UserError
from ftdist.sweep import directory, rank

ARRAYS = "arrays"  # SWEEP/arrays/N.json: the members of an array, by index
LOOK = 2.0  # seconds between two looks at a trial's evaluations
POLL = 5.0  # seconds between two questions to SLURM
SILENT = 600.0  # seconds without an answer until it is given up


def check(configs: list[dict[str, Any]], sweep: dict[str, Any]) -> None:
    """UserError for what a sweep in SLURM cannot do."""
    clusters = {json.dumps(config["cluster"], sort_keys=True) for config in configs}
    if sweep["name"] == "search" and len(clusters) > 1:
        raise UserError("sweep.space: cluster: every trial of a search in SLURM has the same resources")
    if sweep["name"] == "grid" and sweep["parallel"] > 1:
        raise UserError(f"sweep.parallel={sweep['parallel']}: is for this machine; cluster.array_throttle is SLURM's")
    if configs[0]["cluster"]["prepare"] == "job":
        raise UserError("cluster.prepare=job: a sweep prepares its data once, here; leave it out")


def freeze(sweep_dir: Path, names: list[str]) -> None:
    """The run directories of members that have none yet, with everything that their ranks read."""
    for name in names:
        run_dir, config = sweep_dir / name, directory.config(sweep_dir, name)
        if resume.begun(run_dir, config):
            with lease.held(run_dir):
                if not (run_dir / "final").is_dir():
                    resume.changed(run_dir, config, here=False)
                    rundir.forget_last_start(run_dir)
        else:
            with rundir.claimed(run_dir) as token:
                job.freeze(config, run_dir)
                lease.release(run_dir, token)


def would_start(sweep_dir: Path, sweep: dict[str, Any], clusters: list[dict[str, Any]]) -> list[str]:
    """When SLURM would start each array, in its own words. UserError if it never would. Nothing is left.

    clusters: of each member; of a search any number, all the same.
    """
    counts = Counter(json.dumps(cluster, sort_keys=True) for cluster in clusters)
    if sweep["name"] == "search":
        counts = Counter({key: min(sweep["parallel"], sweep["trials"]) for key in counts})
    said = []
    for cluster, count in counts.items():
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, slurm.SCRIPT)
            script.write_text(text(sweep_dir, json.loads(cluster), "member", count, "0"), encoding="utf-8")
            said.append(slurm.test_only(script))
    return said


def queue(sweep_dir: Path, names: list[str]) -> None:
    """Submit these members: one array for all that want the same of SLURM."""
    by_cluster: dict[str, list[str]] = {}
    for name in names:
        cluster = directory.config(sweep_dir, name)["cluster"]
        by_cluster.setdefault(json.dumps(cluster, sort_keys=True), []).append(name)
    for text, own in by_cluster.items():
        cluster = json.loads(text)
        number = _submitted(sweep_dir, cluster, "member", len(own), own)
        print(f"array job {number} is in the queue: {len(own)} member{'s' * (len(own) > 1)}", flush=True)


def queue_workers(sweep_dir: Path, cluster: dict[str, Any], count: int) -> None:
    """Submit `count` workers of a search, which share its trials."""
    number = _submitted(sweep_dir, cluster, "worker", count, [])
    print(f"array job {number} is in the queue: {count} worker{'s' * (count > 1)}", flush=True)


def _submitted(sweep_dir: Path, cluster: dict[str, Any], verb: str, count: int, names: list[str]) -> str:
    """The number of the array's job."""
    folder = sweep_dir / ARRAYS
    folder.mkdir(mode=0o700, exist_ok=True)
    (sweep_dir / "logs").mkdir(mode=0o700, exist_ok=True)
    array = str(len(list(folder.glob("*.json"))))
    told = {"count": count, "members": names}
    rundir.write_json(folder / f"{array}.json", told)  # before the job can start
    script = folder / f"{array}.sbatch"
    script.write_text(text(sweep_dir, cluster, verb, count, array), encoding="utf-8")
    try:
        number = slurm.submit(script)
    except slurm.Away:  # it may have been taken: its members need the file, and _arrays finds the job
        raise
    except UserError:
        (folder / f"{array}.json").unlink()
        raise
    _known(folder / f"{array}.json", number)
    return number


def _known(file: Path, number: str) -> None:
    """Write down which job an array has become, for the sweep and for each member."""
    told = rundir.read_json(file)
    rundir.write_json(file, {**told, "job": number})
    for index, name in enumerate(told["members"]):
        _tell_job(file.parent.parent / name, f"{number}_{index}")


def _tell_job(run_dir: Path, number: str) -> None:
    rundir.write_json(run_dir / follow.JOB, {"job": number, "prepare": None, "submitted": time.time()})


def owners(sweep_dir: Path) -> dict[str, str]:
    """Member → the job that has it, or had it last; those that had none are left out."""
    found = {}
    for told in _arrays(sweep_dir):
        for index, name in enumerate(told["members"]):
            found[name] = f"{told['job']}_{index}"
    for member in directory.members(sweep_dir):
        if owner := directory.state(sweep_dir, member.name).owner:
            found[member.name] = owner
    return found


def _arrays(sweep_dir: Path) -> list[dict[str, Any]]:
    """`job count members` of every array that was submitted, in order.

    One whose submission was killed before it could write the job's number down is found by its script.
    """
    found = []
    for file in sorted((sweep_dir / ARRAYS).glob("*.json"), key=lambda file: int(file.stem)):
        told = rundir.read_json(file)
        if "job" not in told and (number := slurm.job_of(file.with_suffix(".sbatch"))):
            _known(file, number)
            told = rundir.read_json(file)
        found += [told] if "job" in told else []
    return found


def text(sweep_dir: Path, cluster: dict[str, Any], verb: str, count: int, array: str) -> str:
    """The batch script of an array of `count`."""
    indices = slurm.array(count, **schema.pick(slurm.array, cluster))
    return submit.text(sweep_dir, cluster, verb, array, array=indices)


def active(sweep_dir: Path) -> dict[str, slurm.Job]:
    """The jobs of this sweep that wait or run, by number: members' and workers' alike."""
    numbers = [f"{told['job']}_{index}" for told in _arrays(sweep_dir) for index in range(told["count"])]
    return {name: known for name, known in slurm.jobs(numbers).items() if known.active}


def wait(sweep_dir: Path, ended: Callable[[str, directory.State], None]) -> str | None:
    """Until no job of the sweep is left. Ctrl-C leaves the jobs alone and gives its name."""
    told: set[str] = set()
    answered = time.monotonic()
    try:
        while True:
            try:
                left = active(sweep_dir)
            except UserError:
                if time.monotonic() - answered > SILENT:
                    raise
                time.sleep(POLL)
                continue
            answered = time.monotonic()
            if not left:
                mark_dead(sweep_dir)
            for member in directory.members(sweep_dir):
                state = directory.state(sweep_dir, member.name)
                if state.state not in (directory.WAITING, directory.RUNNING) and member.name not in told:
                    told.add(member.name)
                    ended(member.name, state)
            if not left:
                return None
            time.sleep(POLL)
    except KeyboardInterrupt:
        print("\nthe jobs go on; ftdist stop ends them", flush=True)
        return "Ctrl-C"


def mark_dead(sweep_dir: Path) -> None:
    """Members whose job has ended without a word have failed."""
    left = {
        name: owner
        for name, owner in owners(sweep_dir).items()
        if directory.state(sweep_dir, name).state in (directory.WAITING, directory.RUNNING)
    }
    known = slurm.jobs(list(left.values()))
    for name, owner in left.items():
        ended = known.get(owner)
        if ended is not None and not ended.active and ended.state != "COMPLETED":
            reason = f"job {owner}: {ended.state} {ended.reason}".strip()
            directory.mark(sweep_dir, name, state=directory.FAILED, status=FAILED, reason=reason)


# --- in the jobs ----------------------------------------------------------------------------------


def member(sweep_dir: Path, array: str) -> int:
    """The batch process of one member of an array; its exit status."""
    names = rundir.read_json(sweep_dir / ARRAYS / f"{array}.json")["members"]
    name = names[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    status = trained(sweep_dir, name, None)
    if not taken_over(sweep_dir / name):
        wanted = directory.read(sweep_dir)["sweep"]["objective"]
        rank.settled(sweep_dir / name, directory.state(sweep_dir, name), wanted)
    return status


def worker(sweep_dir: Path, array: str) -> int:
    """The batch process of a worker: trial after trial until there were enough."""
    from ftdist.sweep import search

    asked = directory.read(sweep_dir)
    os.chdir(asked["directory"])  # relative paths of the configurations
    source = search.Search(sweep_dir, owner=slurm.own_name(), alive=_is_active)
    print(f"worker {os.environ['SLURM_ARRAY_TASK_ID']} of array {array}", flush=True)
    while not told_to_end(sweep_dir) and (name := source.take()) is not None:
        try:
            if not (sweep_dir / name / "config.yaml").is_file():
                freeze(sweep_dir, [name])
        except UserError as failure:
            source.ended(name, directory.mark(sweep_dir, name, state=directory.FAILED, reason=str(failure)))
            continue
        _tell_job(sweep_dir / name, slurm.own_name())
        status = trained(sweep_dir, name, lambda name=name: source.look(name))  # type: ignore[misc]  # default binds it
        if taken_over(sweep_dir / name):  # SLURM has given this worker up, and started it elsewhere
            return status
        source.ended(name, directory.state(sweep_dir, name))
        if told_to_end(sweep_dir):
            return status
    return OK


def told_to_end(sweep_dir: Path) -> bool:
    """Whether nothing else is to be begun here: SLURM wants this job's end, or somebody the sweep's."""
    return batch.told_to_end() or stops.requested(sweep_dir) is not None


def taken_over(run_dir: Path) -> bool:
    """Whether another process has this run by now: what became of it is not ours to say."""
    holder = lease.read(run_dir)
    return holder is not None and (holder.host, holder.pid) != (socket.gethostname(), os.getpid())


def _is_active(number: str) -> bool:
    try:
        return any(known.active for known in slurm.jobs([number]).values())
    except UserError:  # who does not answer has not said that it is gone
        return True


def trained(sweep_dir: Path, name: str, look: Callable[[], None] | None) -> int:
    """Train a frozen member in this job, again after failures as often as `sweep.retries` says; its exit status."""
    run_dir = sweep_dir / name
    (run_dir / "logs").mkdir(exist_ok=True)
    file = run_dir / "logs" / f"job-{os.environ['SLURM_JOB_ID']}.log"
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    retries = directory.read(sweep_dir)["sweep"]["retries"]
    while True:
        began = time.time()
        directory.begins(sweep_dir, name)
        status, reason = _once(run_dir, look)
        if taken_over(run_dir):
            print(f"ftdist: {reason}", flush=True)
            return status
        after = directory.ended(sweep_dir, name, status, reason, time.time() - began)
        if status != FAILED or after.retries >= retries or told_to_end(sweep_dir):
            return status
        directory.again(sweep_dir, name)
        print(f"retry {after.retries + 1} of {retries}", flush=True)


def _once(run_dir: Path, look: Callable[[], None] | None) -> tuple[int, str | None]:
    over = threading.Event()

    def watch() -> None:
        while look is not None and not over.wait(LOOK):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        status, said = batch.run(run_dir), None
    except UserError as failure:
        status, said = USAGE, str(failure)
    except Failed as failure:
        status, said = failure.status, str(failure)
    finally:
        over.set()
        thread.join()
    return status, None if status == OK else said or launcher.outcome_of(run_dir).get("reason")
