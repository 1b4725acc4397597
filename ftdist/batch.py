"""The batch process of a SLURM job, on its first node: checks the nodes, starts the ranks, and decides what follows.

`python -m ftdist.batch run RUN`       train the frozen run, or go on with it
`python -m ftdist.batch prepare RUN`   prepare its data and freeze it, as a job of its own
`python -m ftdist.batch finish RUN`    evaluate what was trained (in a task, where the devices are)
`python -m ftdist.batch member SWEEP N`, `worker SWEEP N`   a member of a sweep's array N; a worker of a search
`python -m ftdist.batch words …`       overrides as for `ftdist train`: all of it inside the job (slurm/train.sbatch)

A signal of the scheduler becomes RUN/stop.json: the ranks agree, save and end; then the job goes back into the queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ftdist import checkpoint, follow, launcher, lease, rundir, schema, stops
from ftdist import scheduler as slurm
from ftdist.errors import FAILED, FENCED, OK, STOPPED, USAGE, Failed, UserError

PORTS = 20000, 10000  # first port, and how many: below those that systems hand out by themselves
GOES_ON = ("RUNNING", "TIMEOUT", "PREEMPTED", "SUSPENDED")  # states in which SLURM does not requeue by itself
LEAVE = 300.0  # seconds to be ended after a requeue was accepted
ABSENCE = 1800.0  # seconds that a controller may be away, as for an update, at most
POLITE, ABORT = 5.0, 10.0  # seconds that the tasks of a step have to end by themselves, and to be ended by srun
ATTEMPTS = 3  # ports that are tried
TAKEN = "EADDRINUSE"  # in torch's words when somebody else listens at the port
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM")  # that ask for an end

_signals: list[str] = []  # that this process was sent


def main(argv: list[str]) -> int:
    """The exit status of the job."""
    verb, words = argv[0], argv[1:]
    if verb not in ("prepare", "finish"):  # which have nothing to save: nobody waits for them
        listen()
    os.umask(rundir.PRIVATE)
    os.environ[stops.STARTED] = str(time.time())  # of this job, not of whoever has submitted it
    try:
        if verb == "words":
            run_dir = from_words(words)
            status = run(run_dir)
            if status == OK:
                print(f"run: {run_dir}", flush=True)
            return status
        if verb in ("member", "worker"):
            from ftdist.sweep import array

            return {"member": array.member, "worker": array.worker}[verb](Path(words[0]), words[1])
        run_dir = Path(words[0])
        return {"run": run, "prepare": prepare, "finish": finish}[verb](run_dir)
    except UserError as failure:
        print(f"ftdist: {failure}", file=sys.stderr, flush=True)
        return FAILED if isinstance(failure, slurm.Away) else USAGE
    except Failed as failure:
        print(f"ftdist: {failure}", file=sys.stderr, flush=True)
        return failure.status


def listen() -> None:
    """Note signals that ask for an end, from now on and those that the batch script has kept."""
    for name in SIGNALS:
        signal.signal(signal.Signals[name], _note)
    if os.environ.get("FTDIST_SHELL") == str(os.getppid()):
        os.kill(os.getppid(), signal.SIGURG)


def _note(number: int, _: FrameType | None) -> None:
    _signals.append(signal.Signals(number).name)


def told_to_end() -> bool:
    """Whether the scheduler has sent this process a signal; in a sweep, nothing else is begun then."""
    return bool(_signals)


def prepare(run_dir: Path) -> int:
    """Data and everything else that the ranks read, from the configuration that was asked for."""
    from ftdist import job

    try:
        with lease.held(run_dir):
            job.freeze(json.loads((run_dir / job.ASKED).read_text(encoding="utf-8")), run_dir)
    except (UserError, Failed) as failure:
        rundir.record(run_dir, None, "failed", None, reason=str(failure))
        raise
    return OK


def finish(run_dir: Path) -> int:
    """What follows training."""
    from ftdist import job

    job.finish(run_dir)
    return OK


def run(run_dir: Path) -> int:
    """Train, and leave the job with the status that says what is to follow: 0, 1, 2, 75, 93."""
    config = rundir.read_config(run_dir)
    number = os.environ["SLURM_JOB_ID"]
    with lease.held(run_dir) as token:
        job = Job(run_dir, config, number, token)
        rundir.record(run_dir, token, "job", newest(run_dir), job=number, restart=restarts(), nodes=job.nodes)
        try:
            failure = job.train()
        except UserError as mistake:
            failure = Failed(str(mistake), FAILED if isinstance(mistake, slurm.Away) else USAGE)
        except OSError as broken:  # a full disk, a quota: there is a verdict all the same
            failure = Failed(f"{type(broken).__name__}: {broken}")
        failure, again = job.verdict(failure)
        if again is None:
            job.ended(failure)
    if again is not None:
        return requeue(run_dir, number, again, job.time_left())
    if failure is not None:
        print(f"ftdist: {failure}", file=sys.stderr, flush=True)
        return failure.status
    print(f"finished: {run_dir}", flush=True)
    return OK


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def newest(run_dir: Path) -> int | None:
    """The step of the newest checkpoint."""
    return next(iter(checkpoint.steps(run_dir)), None)


def fruitless(run_dir: Path, number: str) -> int:
    """How often, up to now, SLURM has started this job with no newer checkpoint than the start before it had.

    What a sweep tries again inside one such start (`sweep.retries`) is not counted.
    """
    starts: dict[int, int | None] = {}
    for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["event"] == "job" and event["job"] == number:
                starts.setdefault(event["restart"], event["step"])
    now, count = newest(run_dir), 0
    for step in reversed(starts.values()):
        if step != now:
            break
        count += 1
    return max(count - 1, 0)


def requeue(run_dir: Path, number: str, reason: str, seconds: float) -> int:
    """Ask SLURM, for as long as `seconds`, to start the job again, and wait for the end that comes with it."""
    step = newest(run_dir)
    then = "begins again" if step is None else f"goes on from the checkpoint of step {step}"
    print(f"{reason}: back into the queue, {then}", flush=True)
    rundir.record(run_dir, None, "requeue", step, reason=reason, job=number)
    heard = 0

    def ask() -> str:
        nonlocal heard
        heard = len(_signals)
        return slurm.requeue(slurm.own_name())

    try:
        refused = slurm.patiently(ask, seconds)
    except slurm.Away as away:
        refused = str(away)
    if refused:
        print(f"ftdist: not requeued ({refused}); go on with: ftdist resume {run_dir}", file=sys.stderr, flush=True)
        return STOPPED
    end = time.monotonic() + LEAVE
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which SLURM ends this process: it is not kept waiting
    if "SIGTERM" in _signals[heard:]:
        os.kill(os.getpid(), signal.SIGTERM)
    while time.monotonic() < end:  # had it gone by itself, the job would be done, not queued
        time.sleep(1)
    return STOPPED


class Job:
    """This job and the run that it trains."""

    def __init__(self, run_dir: Path, config: dict[str, Any], number: str, token: int) -> None:
        self.run_dir, self.number, self.token = run_dir, number, token
        self.cluster, self.health = config["cluster"], config["health"]
        self.nodes = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
        self.reason: str | None = None  # why the scheduler wanted an end, once it was asked
        self.told: str | None = None  # the signal that ended a task outside training
        left = slurm.left(slurm.own_name())
        self.end = None if left is None else time.monotonic() + left
        self.more, self.before = slurm.in_task(**schema.pick(slurm.in_task, self.cluster))
        os.environ[lease.VARIABLE] = str(token)
        os.environ["FTDIST_GRACE"] = str(self.health["grace_seconds"])
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if self.cluster["interface"]:
                os.environ[name] = self.cluster["interface"]

    def train(self) -> Failed | None:
        """None when the run is finished; else what ended it."""
        from ftdist import job

        if len(self.nodes) != self.cluster["nodes"]:
            return Failed(f"cluster.nodes={self.cluster['nodes']}: the job has {len(self.nodes)} nodes, which the plan "
                          "does not know of", USAGE)  # fmt: skip
        limit = self.cluster["max_requeues"]
        if (count := fruitless(self.run_dir, self.number)) > limit:
            return Failed(f"not started again: {count} starts of this job in a row without a new checkpoint "
                          f"(cluster.max_requeues={limit})", FENCED)  # fmt: skip
        try:
            if (self.run_dir / "final").is_dir():
                print("nothing to train: the run is finished", flush=True)
                if not (self.run_dir / "eval" / "metrics.json").is_file():
                    job.conclude(self.run_dir, self.token, self.evaluate)
            else:
                job.launch(self.run_dir, self.token, self.start, self.evaluate)
        except Failed as failure:
            return failure
        return None

    def start(self) -> None:
        """The ranks, once: checked nodes, then training. Failed or UserError carry the first failing rank's words.

        Somebody may take the port that the check has found free before rank 0 listens: then another one.
        """
        for attempt in range(1, ATTEMPTS + 1):
            rundir.forget_last_start(self.run_dir)
            try:
                self.attempt()
                break
            except Failed as failure:
                said = rundir.read_json(self.run_dir / "logs" / "rank-0.error.json")
                if said.get("lease") != str(self.token) or TAKEN not in said["message"] or attempt == ATTEMPTS:
                    if failure.status == FAILED and preempted(slurm.show(slurm.own_name())):
                        raise Failed(str(failure), STOPPED) from failure  # what follows are the signals' marks
                    raise
                print(f"{failure}\nthe port was taken meanwhile: checking and starting again", flush=True)

    def attempt(self) -> None:
        """The same, at the first port that the check finds."""
        head, port = self.preflight()
        address = slurm.patiently(lambda: slurm.address(head), self.time_left())
        ranks = (self.run_dir, address, port, self.cluster["processes"])
        if self.cluster["network_check"] and len(self.nodes) * self.cluster["processes"] == 1:
            print("network check: left out, one process has no network", flush=True)
        elif self.cluster["network_check"]:
            os.environ["FTDIST_NETWORK_CHECK"] = str(self.cluster["network_check"])
            status = self.follow(self.task("ftdist.node", *ranks, "ftdist.preflight"))
            launcher.judge(self.run_dir, status, self.token)
            print("network check: passed", flush=True)
        status = self.follow(self.task("ftdist.node", *ranks, "ftdist.worker"), trains=True)
        # A node is content with ranks that stop as asked; whether anything is finished is in outcome.json.
        launcher.judge(self.run_dir, status or FAILED, self.token)

    def time_left(self) -> float:
        """Seconds to wait for a controller that is away: what the job has left, and no more than ABSENCE."""
        return ABSENCE if self.end is None else max(0.0, min(ABSENCE, self.end - time.monotonic()))

    def evaluate(self) -> None:
        """What follows training, in a task on the first node."""
        status = self.follow(self.task("ftdist.batch", "finish", self.run_dir, nodes=1))
        self.refuse_signalled(status)
        if status != OK:
            known = status if status in (FAILED, USAGE, STOPPED) else FAILED
            raise Failed(f"the evaluation ended with status {status}; its words are above", known)

    def refuse_signalled(self, status: int) -> None:
        """Failed if that status of srun tells that a task was ended by a signal that asks for an end."""
        self.told = next((name for name in SIGNALS if status == 128 + signal.Signals[name]), None)
        if self.told is not None:
            raise Failed(f"stopped ({self.told}) outside training", STOPPED)

    def preflight(self) -> tuple[str, int]:
        """Every node can do what training needs, or Failed names it. The first node, and a port that is free there."""
        from ftdist import preflight

        folder, word = self.run_dir / preflight.WORD, secrets.token_hex(8)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "word").write_text(word, encoding="utf-8")
        gpus = self.cluster["gpus"]
        port = PORTS[0] + 16 * int(self.number) % PORTS[1]  # apart: whoever looks upwards is not where the next job is
        found: list[dict[str, Any]] = []
        other: list[str] = []

        def read(line: str) -> None:
            now = time.time()
            try:
                answer = json.loads(line)
                found.append({**answer, "late": now - answer["time"]})
            except (ValueError, KeyError, TypeError):
                other.append(line.strip())

        wants = min(gpus, self.cluster["processes"])
        status = self.follow(self.task("ftdist.preflight", self.run_dir, word, wants, port), read,
                             limit=self.cluster["preflight_seconds"])  # fmt: skip
        if status != OK and len(found) < len(self.nodes):
            print("\n".join(other), flush=True)
            if not any("Exited with exit code" in line for line in other):  # else srun has ended the rest because of it
                self.refuse_signalled(status)
        try:
            preflight.judge(found, self.nodes, self.run_dir, word, wants, self.cluster["local_disk"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        first = min(found, key=lambda one: one["id"])
        return first["node"], int(first["port"])

    def task(self, module: str, *words: Any, nodes: int | None = None) -> list[str]:
        """srun, one task a node."""
        count = str(nodes or len(self.nodes))
        bound = slurm.patiently(slurm.binds, self.time_left())
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun no longer takes it from there by itself
        return ["srun", "--kill-on-bad-exit=1", "--wait=60", f"--nodes={count}", f"--ntasks={count}",
                "--ntasks-per-node=1", "--export=ALL", "--mpi=none", "--input=none",
                *(("--cpu-bind=none",) if bound else ()),
                *((f"--cpus-per-task={cpus}",) if cpus else ()), *self.more, *self.before,
                "-m", module, *map(str, words)]  # fmt: skip

    def follow(
        self,
        command: list[str],
        read: Callable[[str], None] | None = None,
        trains: bool = False,
        limit: float | None = None,
    ) -> int:
        """Wait for srun; pass on what asks for an end. Its exit status; Failed if it was ended with nothing to save.

        read: told every line of output. trains: its ranks save before they end. limit: seconds until it is given up.
        """
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if read else None,
                                 stderr=subprocess.STDOUT if read else None, text=True)  # fmt: skip
        reader = threading.Thread(target=_lines, args=(child, read), daemon=True)
        if read:
            reader.start()
        began, passed_on = time.monotonic(), False
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(0.2)
                if asked := self.asked():
                    if not trains or not (self.run_dir / stops.RUNNING).exists():
                        raise Failed(f"stopped ({asked}) outside training", STOPPED)
                    if not passed_on and not (self.run_dir / stops.REQUEST).exists():
                        print(f"{asked}: saving, then stopping", flush=True)
                        self.pass_on(child, asked)
                    passed_on = True
                if limit is not None and time.monotonic() - began > limit:
                    return FAILED
        finally:
            if child.poll() is None:
                _end(child)
            if read:
                reader.join(5)

    def pass_on(self, child: subprocess.Popen[str], asked: str) -> None:
        """Ask the ranks to save and stop: in a file, or with a signal where it cannot be written."""
        try:
            stops.request(self.run_dir, asked)
        except OSError as broken:
            print(f"{stops.REQUEST}: {broken.strerror}; the ranks are told by SIGTERM", flush=True)
            child.send_signal(signal.SIGTERM)

    def asked(self) -> str | None:
        """Why to stop: the signal that this process was sent, or what is in stop.json. SLURM is asked later what the
        signal means: the save comes first."""
        return next(iter(_signals), None) or stops.requested(self.run_dir)

    def verdict(self, failure: Failed | None) -> tuple[Failed | None, str | None]:
        """What is to be said, and why the job should go back into the queue, if it should.

        It should if the scheduler has ended it, or if a node was lost, and SLURM does not start it again by itself.
        """
        if failure is None or failure.status in (USAGE, FENCED):
            return failure, None
        try:
            lease.check(self.run_dir, self.token)
        except Failed as gone:  # SLURM has started the job elsewhere: nothing here is ours to decide
            return gone, None
        sent, user = next(iter(_signals), None), stops.requested(self.run_dir)
        if failure.status == STOPPED and sent is None:  # the tasks were signalled, this process was not
            sent = self.told or launcher.outcome_of(self.run_dir).get("reason")
            sent = sent or launcher.first_error(self.run_dir, self.token).get("signal")
        if user not in (None, sent) or sent not in (None, *SIGNALS):
            return failure, None  # somebody asks for an end
        job = slurm.show(slurm.own_name())
        reason = self.reason = meaning(job, sent, self.cluster["signal_seconds"])
        self.explain()
        if reason is None and failure.status == FAILED and (lost := self.lost()):
            reason, job = f"node {lost} is lost", slurm.show(slurm.own_name())  # which may have decided by now
        if reason is None or job.get("JobState", "RUNNING") not in GOES_ON:
            return failure, None  # a failure, or SLURM has decided already: cancelled, or in the queue again
        limit = self.cluster["max_requeues"]
        if (count := fruitless(self.run_dir, self.number)) >= limit:
            return Failed(f"{failure}; not requeued: {count + 1} starts in a row without a new checkpoint "
                          f"(cluster.max_requeues={limit})", FENCED), None  # fmt: skip
        return failure, reason

    def explain(self) -> None:
        """Tell in outcome.json what the signal meant whose name the ranks have left there."""
        outcome = launcher.outcome_of(self.run_dir)
        if self.reason is not None and outcome.get("reason") in SIGNALS:
            with contextlib.suppress(Failed, UserError, OSError), lease.guarded(self.run_dir, self.token):
                rundir.write_json(self.run_dir / "outcome.json", {**outcome, "reason": self.reason})

    def lost(self) -> str | None:
        """A node that does not answer any more; none, as far as a controller that is away can tell."""
        for node in self.nodes:
            try:
                state = slurm.patiently(partial(slurm.node_state, node), slurm.PATIENCE)
            except UserError:  # the rank's own error is what there is to say
                return None
            if "*" in state or state.startswith(("DOWN", "FAIL", "NOT_RESPONDING")):
                return node
        count = len(self.nodes)
        probe = ["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--mem=0",
                 "--mpi=none", "bash", "-c", "echo $SLURMD_NODENAME"]  # fmt: skip
        try:
            answered = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=slurm.PATIENCE).stdout
        except subprocess.TimeoutExpired as late:
            answered = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        if not answered.split():
            return None  # the question itself fails
        return next((node for node in self.nodes if node not in answered.split()), None)

    def ended(self, failure: Failed | None) -> None:
        """Leave word of an end that the ranks have left none of, unless somebody else has the run by now."""
        if failure is None or (failure.status == STOPPED == launcher.outcome_of(self.run_dir).get("status")):
            return
        name = "stopped" if failure.status == STOPPED else "failed"
        reason = self.reason or self.asked() or str(failure) if name == "stopped" else str(failure)
        with contextlib.suppress(Failed, UserError, OSError), lease.guarded(self.run_dir, self.token):
            rundir.record(self.run_dir, None, name, newest(self.run_dir), reason=reason, job=self.number)
            outcome = {"outcome": name, "reason": reason, "step": newest(self.run_dir), "status": failure.status}
            rundir.write_json(self.run_dir / "outcome.json", outcome)


def preempted(job: Mapping[str, str]) -> bool:
    """Whether SLURM ends this start of a job for a more important one: a date, which an earlier start may have left."""
    return job.get("PreemptTime", "None")[:1].isdigit() and job["PreemptTime"] >= job.get("StartTime", "")


def meaning(job: Mapping[str, str], name: str | None, lead: int) -> str | None:
    """Why the scheduler wants an end. job: what SLURM shows of it, if it answers; name: of its signal, if one is known.

    Without `preempt_send_user_signal` a site's pre-emption sends signals to the tasks alone.
    """
    if job.get("JobState", "").startswith("CANCELLED"):
        return "cancelled"
    if preempted(job):
        return "pre-empted"
    limit, ran = (slurm.seconds(job.get(key, "")) for key in ("TimeLimit", "RunTime"))
    early = 60  # seconds that SLURM may be
    if name is not None and limit is not None and ran is not None and limit - ran <= lead + early:
        return "time limit"
    return name


def from_words(words: list[str]) -> Path:
    """The run directory of `slurm/train.sbatch`: made by its first start, found by the later ones."""
    from ftdist import compose, forecast, job, resume, stages

    number = os.environ["SLURM_JOB_ID"]
    given = {word.partition("=")[0].lstrip("+") for word in words}
    told = [f"cluster.nodes={os.environ['SLURM_JOB_NUM_NODES']}"]
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    told += [f"cluster.gpus={gpus}"]
    if gpus and (facts := launcher.gpu_facts()):
        told += [f"cluster.gpu_type='{facts[0]}'"]
    told_by_sbatch = {"name", "nodes"}
    for function in (slurm.options, slurm.setup, slurm.submission, slurm.array):
        told_by_sbatch.update(schema.keys_of(function))
    for key in sorted(given):
        group, _, name = key.partition(".")
        if group == "cluster" and (not name or name.partition(".")[0] in told_by_sbatch):
            raise UserError(
                f"{key}: read by ftdist train when it submits; give it to sbatch, or write it into the script"
            )
    if {"-m", "--multirun", "--cfg"} & set(words):
        raise UserError(
            "slurm/train.sbatch: a job is one run; leave out -m and --cfg, or use ftdist train cluster=slurm"
        )
    (config,) = compose.compose("train", ["cluster=slurm", *words, *told])
    job.check(config)
    stages.refuse(config)
    if config["run_dir"] is None:
        config["run_dir"] = f"runs/job-{number}-{Path(config['model']['path']).name}-{config['strategy']['name']}"
    run_dir = Path(config["run_dir"]).expanduser().absolute()
    config["run_dir"] = str(run_dir)
    job.decide(config)
    forecast.refuse_what_cannot_fit(dict(job.plan(config)), config["must_fit"])
    mine = rundir.read_json(run_dir / follow.JOB).get("job") == number
    if (mine or config["resume"] == "auto") and resume.begun(run_dir, config):
        with lease.held(run_dir):
            if not (run_dir / "final").is_dir():
                resume.changed(run_dir, config, here=False)
    else:
        with rundir.claimed(run_dir) as token:
            rundir.write_json(run_dir / follow.JOB, {"job": number, "prepare": None, "submitted": time.time()})
            job.freeze(config, run_dir)
            lease.release(run_dir, token)
    rundir.write_json(run_dir / follow.JOB, {"job": number, "prepare": None, "submitted": time.time()})
    _as_submitted(run_dir)
    return run_dir


def _as_submitted(run_dir: Path) -> None:
    """Freeze what `ftdist resume` asks sbatch for: what this job was given, in SLURM's words, not the driver's."""
    from ftdist.plan.hardware import elsewhere

    config = rundir.read_config(run_dir)
    if config["cluster"]["gpu_type"] and config["hardware"]["name"] == "auto":  # SLURM may have no name for it
        config["hardware"] = elsewhere(config["hardware"], config["cluster"]["gpu_type"])
    node = os.environ["SLURMD_NODENAME"]
    config["cluster"] |= slurm.patiently(lambda: slurm.around(slurm.own_name(), node, os.environ), ABSENCE)
    rundir.write_yaml(run_dir / "config.yaml", config)


def _lines(child: subprocess.Popen[str], read: Callable[[str], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        read(line)


def _end(child: subprocess.Popen[str]) -> None:
    """End srun and its tasks: it passes SIGTERM on; two SIGINTs within a second make it end the step itself.

    Were it killed before that, its tasks would live on.
    """
    for number, seconds in (
        (signal.SIGTERM, POLITE),
        (signal.SIGINT, 0.2),
        (signal.SIGINT, ABORT),
        (signal.SIGKILL, 2),
    ):
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return


if __name__ == "__main__":
    from ftdist import batch  # by its name, as a sweep's members have it: what is noted here, would not be known there

    sys.exit(batch.main(sys.argv[1:]))
