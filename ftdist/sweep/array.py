"""A sweep in SLURM: the members of a grid as one array, a search as an array of workers that share its storage.

The batch process of a member is that of a run (ftdist.batch): it requeues itself after pre-emption and time limits. A
worker is one that goes on to the next trial. What became of a member is written into the sweep by its own job.
"""

from __future__ import annotations

import json
import os
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
DEAD = ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "CANCELLED")  # ends, of SLURM's words


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


def queue(sweep_dir: Path, names: list[str]) -> None:
    """Submit these members: one array for all that want the same of SLURM."""
    by_cluster: dict[str, list[str]] = {}
    for name in names:
        cluster = directory.config(sweep_dir, name)["cluster"]
        by_cluster.setdefault(json.dumps(cluster, sort_keys=True), []).append(name)
    for text, own in by_cluster.items():
        cluster = json.loads(text)
        number = _submitted(sweep_dir, cluster, "member", len(own), own)
        for index, name in enumerate(own):
            told = {"job": f"{number}_{index}", "prepare": None, "submitted": time.time()}
            rundir.write_json(sweep_dir / name / follow.JOB, told)
            directory.mark(sweep_dir, name, owner=f"{number}_{index}")
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
    number = slurm.submit(script)
    rundir.write_json(folder / f"{array}.json", {**told, "job": number})
    return number


def text(sweep_dir: Path, cluster: dict[str, Any], verb: str, count: int, array: str) -> str:
    """The batch script of an array of `count`."""
    indices = slurm.array(count, **schema.pick(slurm.array, cluster))
    return submit.text(sweep_dir, cluster, verb, array, array=indices)


def test(sweep_dir: Path, configs: list[dict[str, Any]]) -> None:
    """Say whether and when SLURM could start the arrays; nothing is left."""
    clusters = Counter(json.dumps(config["cluster"], sort_keys=True) for config in configs)
    for cluster, count in clusters.items():
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, slurm.SCRIPT)
            script.write_text(text(sweep_dir, json.loads(cluster), "member", count, "0"), encoding="utf-8")
            print(slurm.test_only(script))


def active(sweep_dir: Path) -> dict[str, slurm.Job]:
    """The jobs of this sweep that wait or run, by number: members' and workers' alike."""
    numbers = []
    for file in sorted((sweep_dir / ARRAYS).glob("*.json")):
        known = rundir.read_json(file)
        numbers += [f"{known['job']}_{index}" for index in range(known["count"])] if "job" in known else []
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
    states = {member.name: directory.state(sweep_dir, member.name) for member in directory.members(sweep_dir)}
    owners = {
        name: state.owner
        for name, state in states.items()
        if state.state in (directory.WAITING, directory.RUNNING) and state.owner
    }
    known = slurm.jobs(list(owners.values()))
    for name, owner in owners.items():
        ended = known.get(owner)
        if ended is not None and ended.state in DEAD:
            reason = f"job {owner}: {ended.state} {ended.reason}".strip()
            directory.mark(sweep_dir, name, state=directory.FAILED, status=FAILED, reason=reason)


# --- in the jobs ----------------------------------------------------------------------------------


def member(sweep_dir: Path, array: str) -> int:
    """The batch process of one member of an array; its exit status."""
    names = rundir.read_json(sweep_dir / ARRAYS / f"{array}.json")["members"]
    name = names[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    status = trained(sweep_dir, name, None)
    rank.settled(sweep_dir, name, directory.state(sweep_dir, name))
    return status


def worker(sweep_dir: Path, array: str) -> int:
    """The batch process of a worker: trial after trial until there were enough."""
    from ftdist.sweep import search

    asked = directory.read(sweep_dir)
    os.chdir(asked["directory"])  # relative paths of the configurations
    source = search.Search(sweep_dir, owner=_own_number(), alive=_is_active)
    print(f"worker {os.environ['SLURM_ARRAY_TASK_ID']} of array {array}", flush=True)
    while not stops.requested(sweep_dir) and (name := source.take()) is not None:
        try:
            if not (sweep_dir / name / "config.yaml").is_file():
                freeze(sweep_dir, [name])
        except UserError as failure:
            source.ended(name, directory.mark(sweep_dir, name, state=directory.FAILED, reason=str(failure)))
            continue
        told = {"job": _own_number(), "prepare": None, "submitted": time.time()}
        rundir.write_json(sweep_dir / name / follow.JOB, told)
        trained(sweep_dir, name, lambda name=name: source.look(name))  # type: ignore[misc]  # default binds it
        source.ended(name, directory.state(sweep_dir, name))
    return OK


def _is_active(number: str) -> bool:
    return any(known.active for known in slurm.jobs([number]).values())


def _own_number() -> str:
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


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
        before, began = directory.state(sweep_dir, name), time.time()
        directory.mark(sweep_dir, name, state=directory.RUNNING, reason=None, attempts=before.attempts + 1)
        status, reason = _once(run_dir, look)
        after = directory.ended(sweep_dir, name, status, reason, time.time() - began)
        if status != FAILED or after.retries >= retries:
            return status
        directory.mark(sweep_dir, name, retries=after.retries + 1)
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
