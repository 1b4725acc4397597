"""cluster=slurm: a configuration → a run directory, and a job in the queue that trains it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftdist import evaluate, follow, job, lease, resume, rundir, schema
from ftdist import scheduler as slurm
from ftdist.errors import OK, UserError


def run(config: dict[str, Any], run_dir: Path) -> int:
    """Submit a new run, or go on with the one in `run_dir` (resume=auto); wait for it if that is wanted."""
    refuse_active(run_dir)
    cluster = config["cluster"]
    if config["resume"] == "auto" and resume.begun(run_dir, config):
        return again(run_dir, config)
    cluster = slurm.filled(cluster, [dict(job.plan(config))])
    if asked(cluster, run_dir):
        return OK
    unknown = None
    with rundir.claimed(run_dir) as token:
        if cluster["prepare"] == "job":
            rundir.write_json(run_dir / job.ASKED, config)
        else:
            job.freeze(config, run_dir)
        with alone(run_dir):
            lease.release(run_dir, token)  # it is the job's now
            try:
                queue(run_dir, cluster, prepare=cluster["prepare"] == "job")
            except slurm.Away as away:  # what may be a job's by now stays
                unknown = away
    if unknown is not None:
        raise unknown
    return followed(run_dir, cluster)


def again(run_dir: Path, config: dict[str, Any]) -> int:
    """A new job for a run that was stopped or killed."""
    with alone(run_dir):
        refuse_active(run_dir)
        queued = _again(run_dir, config)
    return followed(run_dir, config["cluster"]) if queued else OK


def _again(run_dir: Path, config: dict[str, Any]) -> bool:
    """Whether there is a new job: there may be nothing to train, or nothing but a question."""
    if asked(_filled(run_dir, config["cluster"]), run_dir):
        return False
    with lease.held(run_dir):
        done = (run_dir / "final").is_dir() and (
            not evaluate.afterwards(config["eval"], config["stopping"]) or (run_dir / "eval" / "metrics.json").is_file()
        )
        if not done and not (run_dir / "final").is_dir():
            resume.changed(run_dir, config, here=False)
            rundir.forget_last_start(run_dir)
    if done:
        print("nothing to train: the run is finished", flush=True)
        return False
    queue(run_dir, _filled(run_dir, config["cluster"]), prepare=False)
    return True


def _filled(run_dir: Path, cluster: dict[str, Any]) -> dict[str, Any]:
    """What SLURM is asked for, from the frozen plan; one for another kind of cluster has nothing to say."""
    return slurm.filled(cluster, [{"asks": {}, **rundir.read_json(run_dir / "plan.json")}])


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """While open nobody else submits this run: the lease is the job's, which may begin before `sbatch` has ended."""
    with (run_dir / ".submit.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            if failure.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(f"run_dir={run_dir}: another ftdist submits it now; ftdist status {run_dir} tells what "
                            "became of it")  # fmt: skip
        yield


def asked(cluster: dict[str, Any], run_dir: Path) -> bool:
    """Ask SLURM whether the job could start, as far as that is wanted; whether nothing else is."""
    if cluster["test_only"]:
        print(would_start(cluster, run_dir), flush=True)
        return True
    if cluster["check"]:
        would_start(cluster, run_dir)
    return False


def refuse_active(run_dir: Path) -> None:
    """UserError if a job of this run waits or runs."""
    for number, known in follow.jobs_of([run_dir])[run_dir].items():
        if known.active:
            raise UserError(f"run_dir={run_dir}: its job {number} is {known.state.lower()}; "
                            f"ftdist stop {run_dir} ends it")  # fmt: skip


def queue(run_dir: Path, cluster: dict[str, Any], prepare: bool) -> str:
    """Write the batch script and submit it; the job's number. prepare: by a CPU job that this one waits for."""
    (run_dir / "logs").mkdir(mode=0o700, exist_ok=True)
    script = run_dir / slurm.SCRIPT
    script.write_text(text(run_dir, cluster), encoding="utf-8")
    words, before, earlier = [], None, rundir.read_json(run_dir / follow.JOB)

    def tell(job: str | None) -> None:
        rundir.write_json(run_dir / follow.JOB, {"job": job, "prepare": before, "submitted": time.time()})

    try:
        if prepare:
            file = run_dir / follow.PREPARE
            file.write_text(preparation(run_dir, cluster), encoding="utf-8")
            before = follow.UNKNOWN
            tell(None)
            before = slurm.submit(file)
            words = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
            print(f"job {before} prepares the data", flush=True)
        tell(follow.UNKNOWN)
        number = slurm.submit(script, *words)
    except slurm.Away:  # it may have been taken: job.json tells where to look
        raise
    except BaseException:
        if before not in (None, follow.UNKNOWN):
            slurm.cancel([before])
        if earlier:
            rundir.write_json(run_dir / follow.JOB, earlier)
        else:
            (run_dir / follow.JOB).unlink(missing_ok=True)
        raise
    tell(number)
    count = cluster["gpus"] or cluster["processes"]
    kind = "GPU" if cluster["gpus"] else "process"
    each = f"{count} {kind}" + (("es" if kind == "process" else "s") if count > 1 else "")
    nodes = f"{cluster['nodes']} nodes, {each} each" if cluster["nodes"] > 1 else f"1 node, {each}"
    print(f"job {number} is in the queue: {nodes}", flush=True)
    return number


def text(run_dir: Path, cluster: dict[str, Any], verb: str = "run", *words: str, **more: str) -> str:
    """The batch script that trains a run, or does something else with it (`verb` of ftdist.batch, with `words`).

    more: options of sbatch.
    """
    slurm.refuse_own(cluster["sbatch"])
    output = f"{slurm.pattern(run_dir / 'logs')}/job-%j.log"
    keys = {**schema.pick(slurm.options, cluster), "sbatch": {"output": output, **more, **cluster["sbatch"]}}
    chosen = slurm.options(run_dir.name, cluster["nodes"], **keys)
    lines = slurm.setup(**schema.pick(slurm.setup, cluster))
    return slurm.script(chosen, lines, slurm.batch_command(verb, str(run_dir), *words))


def preparation(run_dir: Path, cluster: dict[str, Any]) -> str:
    """The batch script that prepares its data, on one node without GPUs."""
    own = {"partition": cluster["prepare_partition"] or cluster["partition"], "cpus": cluster["prepare_cpus"],
           "memory": cluster["prepare_memory"], "time": cluster["prepare_time"]}  # fmt: skip
    plain: dict[str, Any] = {"nodes": 1, "gpus": 0, "exclusive": False, "constraint": None, "sbatch": {}}
    return text(run_dir, {**cluster, **own, **plain}, "prepare")


def would_start(cluster: dict[str, Any], run_dir: Path) -> str:
    """When SLURM would start the job, in its own words. UserError if it never would."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, slurm.SCRIPT)
        script.write_text(text(run_dir, cluster), encoding="utf-8")
        return slurm.test_only(script)


def followed(run_dir: Path, cluster: dict[str, Any]) -> int:
    """How to follow the job, or its output until it ends; the status."""
    if not cluster["wait"]:
        print(f"follow it: ftdist logs {run_dir} --follow    state: ftdist status {run_dir}    "
              f"end it: ftdist stop {run_dir}", flush=True)  # fmt: skip
        return OK
    return follow.logs(run_dir, follow=True)
