"""SLURM as plain functions: a batch script from plain values, submit it, ask what became of jobs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from ftdist.errors import UserError

Answer = TypeVar("Answer")
SCRIPT = "job.sbatch"  # in a run directory
# Words of SLURM for jobs that are over. It has more and more for those that are not.
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
         "OUT_OF_MEMORY", "REVOKED")  # fmt: skip
TIME = r"\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){1,2}"  # D-HH[:MM[:SS]], H:MM:SS, M:SS
# Options that keys of `cluster` stand for, and the log that `ftdist logs` reads.
OWN = ("nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gpus-per-task", "gres", "cpus-per-task",
       "cpus-per-gpu", "mem", "mem-per-cpu", "mem-per-gpu", "time", "signal", "array", "partition", "requeue",
       "no-requeue", "output", "error", "open-mode", "wait", "test-only")  # fmt: skip
SLICE = re.compile(r"(?<![0-9])(\d)g\.(\d+)gb", re.I)  # of a GPU (MIG), in SLURM's names: 1g.10gb, a100_3g.20gb
# Keys of `cluster` that have other names than the options which they stand for.
KEYS = {"mem": "memory", "cpus-per-task": "cpus", "gres": "gpu_type", "gpus-per-node": "gpu_type"}
SECRET = r"(?i)(key|token|secret|password|passwd)$"  # names of variables that no file should hold
PATIENCE = 60  # seconds that a command of SLURM may take
AWAY = r"(?i)unable to contact|unexpected message|timed out|connection (refused|reset|failure)|zero bytes"
# A batch script keeps signals that come before the batch process listens: it asks for them (URG) as soon as it does.
# Until then it is deaf to them; bash stays its parent, and passes on what comes later. Only its end ends the script.
KEEPS = """signals='' batch=''
keep() { signals="$signals $1"; kill "-$1" "$batch"; } 2>/dev/null
tell() { for one in $signals; do kill "-$one" "$batch"; done; }
trap 'keep USR1' USR1
trap 'keep USR2' USR2
trap 'keep TERM' TERM
trap tell URG
"""
BEGINS = """set +e
(trap '' USR1 USR2 TERM; export FTDIST_SHELL=$$; exec %s) &
batch=$!
while true; do
  wait "$batch"; status=$?
  kill -0 "$batch" 2>/dev/null && continue
  wait "$batch" 2>/dev/null; last=$? # a signal may have interrupted the first one while the process ended
  [ "$last" = 127 ] || status=$last
  exit "$status"
done
"""


SITE = "site"  # cluster.memory or cluster.time: what SLURM gives to those who ask for nothing
HOST_MARGIN, HOST_FLOOR = 1.25, 2 << 30  # of what the plan needs, and bytes of files and shells beside it
TIME_MARGIN, TIME_FLOOR = 1.5, 1800  # of what the plan takes, and seconds to start, load, save, evaluate
QUARTER = 900  # seconds that times are rounded up to


class Away(UserError):
    """SLURM does not answer now. What was asked of it may be right."""


@dataclass(frozen=True)
class Job:
    """What the controller, or the accounting, says of a job. `left`: seconds of its time limit; None without one."""

    id: str
    state: str
    reason: str
    left: int | None
    nodes: str

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or is being ended."""
        return self.state not in ENDED


def options(
    name: str,
    nodes: int,
    *,
    job_name: str | None,
    account: str | None,
    partition: str | None,
    qos: str | None,
    constraint: str | None,
    reservation: str | None,
    time: str | None,
    gpus: Literal["auto"] | Annotated[int, Field(ge=0)],
    gpu_type: str | None,
    gpu_option: Literal["gpus-per-node", "gres"],
    cpus: Annotated[int, Field(ge=1)] | None,
    memory: str | None,
    exclusive: bool,
    mail_type: str | None,
    mail_user: str | None,
    signal_seconds: Annotated[int, Field(ge=1, le=65535)],
    sbatch: dict[str, str | int | bool],
) -> dict[str, str | int | bool]:
    """sbatch's options → values for one task a node; `True`: an option without a value. `gpus` is a number by now.

    sbatch: more of them, as the user gives them, which win.
    """
    assert gpus != "auto"
    if time == SITE:
        time = None
    if time is not None and not re.fullmatch(TIME, _one_line("cluster.time", time)):
        raise UserError(f"cluster.time={time}: should be H:MM:SS or D-HH:MM:SS, in quotes in a YAML file, or site")
    device = f"{gpu_type}:{gpus}" if gpu_type else str(gpus)
    chosen: dict[str, Any] = {
        "job-name": job_name or name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "account": account,
        "partition": partition,
        "qos": qos,
        "constraint": constraint,
        "reservation": reservation,
        "time": time,
        "gres": f"gpu:{device}" if gpus and gpu_option == "gres" else None,
        "gpus-per-node": device if gpus and gpu_option == "gpus-per-node" else None,
        "cpus-per-task": cpus,
        "mem": None if memory == SITE else memory,
        "exclusive": exclusive,
        "mail-type": mail_type,
        "mail-user": mail_user,
        "signal": f"B:USR1@{signal_seconds}",
        "requeue": True,
        "open-mode": "append",  # a start after a requeue goes on in the same log
    }
    for option, value in chosen.items():
        _one_line(f"cluster.{KEYS.get(option, option.replace('-', '_'))}", value)
    for key, value in sbatch.items():
        _one_line(f"cluster.sbatch.{key}", value)
    chosen |= {key.replace("_", "-"): value for key, value in sbatch.items()}
    return {key: value for key, value in chosen.items() if value is not None and value is not False}


def wanted(host_bytes: int, seconds: float | None, longest: int | None) -> dict[str, str]:
    """`memory` and `time` of a job, from a plan's need of a node and its duration, with room for the plan's error.

    longest: seconds that the partition allows; a job that needs more goes back into the queue and goes on.
    """
    asks = {"memory": f"{math.ceil((HOST_MARGIN * host_bytes + HOST_FLOOR) / 2**30)}G"}
    if seconds is not None:
        whole = QUARTER * math.ceil((TIME_MARGIN * seconds + TIME_FLOOR) / QUARTER)
        minutes = int(min(whole, longest or whole)) // 60
        asks["time"] = f"{minutes // 60}:{minutes % 60:02}:00"
    return asks


def filled(cluster: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`cluster` with the memory and the time that the plans want where it says nothing: the most of any."""
    made = dict(cluster)
    sizes: dict[str, Callable[[str], int]] = {
        "memory": lambda text: memory_bytes(text) or 0,
        "time": lambda text: seconds(text) or 0,
    }
    for key, size in sizes.items():
        asked = [plan["asks"].get(key) for plan in plans]
        if made[key] is None and all(asked):
            made[key] = max(asked, key=size)
    return made


def longest(partition: str | None) -> int | None:
    """Seconds that a job may take in a partition, or the default one; None without a limit, or where nobody tells."""
    words = ("--noheader", "--format=%P|%l", *((f"--partition={partition}",) if partition else ()))
    try:
        rows = [line.strip().split("|") for line in command("sinfo", *words).stdout.splitlines() if "|" in line]
    except UserError:
        return None
    limits = [seconds(limit) for name, limit in rows if partition or name.endswith("*")]
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def refuse_own(sbatch: Mapping[str, Any]) -> None:
    """UserError for an option of the user's that would change what the plan, or `ftdist logs`, knows.

    sbatch takes the beginning of a name for the name.
    """
    for key, value in sbatch.items():
        if "clusters".startswith(key):
            raise UserError(f"cluster.sbatch.{key}={value}: SLURM's other commands would not know of it; set "
                            f"SLURM_CLUSTERS={value} in the environment, which all of them read")  # fmt: skip
        if any(option.startswith(key.replace("_", "-")) for option in OWN):
            raise UserError(f"cluster.sbatch.{key}={value}: the plan would not know of it; use the key of `cluster` "
                            "that is for it")  # fmt: skip


def resolved(
    *,
    processes: int | str,
    oversubscribe: bool,
    partition: str | None,
    constraint: str | None,
    gpus: int | str,
    gpu_type: str | None,
    cpu: bool,
    known: bool,
) -> dict[str, int]:
    """`gpus` and `processes` of a node as numbers, asked from the partition where they are `auto`.

    cpu: the plan is for CPUs; known: it is for a GPU that the user has named.
    """
    count = gpus
    if count == "auto":
        if cpu:
            count = 0
        elif processes != "auto" and known:
            count = processes
        else:
            there, kind = chosen_gpus(partition, constraint, gpu_type)
            there = min(there, 1) if SLICE.search(kind or "") else there
            count = there if processes == "auto" else min(int(processes), there)
    wanted = max(int(count), 1) if processes == "auto" else int(processes)
    if int(count) and wanted > int(count) and not oversubscribe:
        raise UserError(f"cluster.processes={wanted}: {count} GPUs on a node are asked for or there; use at most "
                        f"cluster.processes={count}, or cluster.oversubscribe=true")  # fmt: skip
    if gpu_type is None and int(count) and shutil.which("sinfo"):
        gpu_type = chosen_gpus(partition, constraint, gpu_type)[1]
    if SLICE.search(gpu_type or "") and max(int(count), wanted) > 1:
        raise UserError(f"cluster.gpus={count} cluster.processes={wanted}: {gpu_type} is a slice of a GPU (MIG); a job "
                        "can use one: NCCL joins none of them; use cluster.gpus=1")  # fmt: skip
    return {"gpus": int(count), "processes": wanted}


def in_task(
    *,
    container_image: str | None,
    container_mounts: str | None,
    wrapper: list[str],
    python: str | None,
) -> tuple[list[str], list[str]]:
    """(more options of srun, words before `-m MODULE`): Pyxis' container, a wrapper such as `apptainer exec IMAGE`."""
    pyxis = [f"--container-image={container_image}"] if container_image else []
    pyxis += [f"--container-mounts={container_mounts}"] if container_mounts else []
    return pyxis, [*wrapper, python or sys.executable]


def in_job(
    *,
    interface: str | None,
    max_requeues: Annotated[int, Field(ge=0)],
    preflight_seconds: Annotated[float, Field(gt=0)],
    local_disk: Annotated[float, Field(ge=0)],
    network_check: Annotated[int, Field(ge=0)],
) -> None:
    """The keys of `cluster` that ftdist.batch reads."""


def submission(
    *,
    prepare: Literal["here", "job"],
    prepare_partition: str | None,
    prepare_cpus: Annotated[int, Field(ge=1)],
    prepare_memory: str | None,
    prepare_time: str | None,
    check: bool,
    wait: bool,
    test_only: bool,
) -> None:
    """The keys of `cluster` that ftdist.submit reads."""


def array(count: int, *, array_throttle: Annotated[int, Field(ge=1)] | None) -> str:
    """sbatch's --array for so many members, at most `array_throttle` of them at once."""
    return f"0-{count - 1}" + (f"%{array_throttle}" if array_throttle else "")


def memory_bytes(text: str | None) -> int | None:
    """`64G` → bytes, as sbatch reads it; None for none, and for 0, which means all of the node."""
    if text is None or text == SITE:
        return None
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", str(text).upper())
    if not match:
        raise UserError(f"cluster.memory={text}: should be a size such as 64G, or site")
    return int(match[1]) * 1024 ** ("KMGT".index(match[2] or "M") + 1) or None


def setup(*, modules: list[str], environment: dict[str, str | int | float], setup: list[str]) -> list[str]:
    """Shell lines before the program: modules, variables, and the user's own lines as they are."""
    for line in setup:
        _one_line("cluster.setup", line)
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"cluster.environment.{name}: no name of an environment variable")
        if re.search(SECRET, name):
            raise UserError(f"cluster.environment.{name}: would stand in job.sbatch and config.yaml for all to read; "
                            f"export {name} where you submit, SLURM passes it on")  # fmt: skip
    load = ["type module >/dev/null 2>&1 || { . /etc/profile || true; }"] if modules else []
    load += [f"module load {shlex.quote(_one_line('cluster.modules', name))}" for name in modules]
    exports = [
        f"export {name}={shlex.quote(_one_line(f'cluster.environment.{name}', value))}"
        for name, value in environment.items()
    ]
    return [*load, *exports, *setup]


def script(options: Mapping[str, str | int | bool], lines: Iterable[str], command: Sequence[str]) -> str:
    """A batch script: `#SBATCH` lines, safely quoted, shell lines, and the command that is the batch process.

    A line that fails ends the job, unless a signal that asks for an end has come meanwhile, which may be why: then the
    batch process decides. UserError for a value with a newline.
    """
    head = [_sbatch_line(key, value) for key, value in options.items()]
    checked = [*("""trap 'status=$?; [ -n "$signals" ] || exit $status' ERR""", *lines, "trap - ERR")] if lines else []
    return "\n".join(["#!/bin/bash", *head, KEEPS + "\n".join(checked), BEGINS % shlex.join(command)])


def _sbatch_line(key: str, value: str | int | bool) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise UserError(f"cluster.sbatch.{key}: no option of sbatch")
    return f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={shlex.quote(_one_line(key, value))}"


def _one_line(key: str, value: Any) -> str:
    text = str(value)
    if not text.isprintable():
        raise UserError(f"{key}={text!r}: a batch script has no place for line breaks and control characters")
    return text


def pattern(path: Path) -> str:
    """A path for sbatch's --output, where % begins a pattern; UserError for a backslash, which switches that off."""
    if "\\" in str(path):
        raise UserError(f"run_dir={path}: sbatch can name no log in a directory with a backslash; choose another")
    return str(path).replace("%", "%%")


def submit(file: Path, *words: str, cwd: Path | None = None) -> str:
    """Submit a batch script; the job's number. words: more options, such as --dependency=afterok:12.

    UserError with sbatch's own words if it is refused; Away if nobody knows whether it was taken. Variables of a job
    around us do not leak into the new one. Ctrl-C waits for the answer, and takes the job out of the queue again.
    """
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        answer = _sbatch([*words, "--parsable", str(file)], cwd)
        number = answer.splitlines()[-1].partition(";")[0].strip()
    except Away as away:
        number = _taken(file, away)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        cancel([number])
        raise KeyboardInterrupt
    return number


def _taken(file: Path, away: Away) -> str:
    """The job that the controller has made of a script without saying so."""
    with contextlib.suppress(UserError):
        if number := job_of(file):
            return number
    raise Away(f"{away} Whether it has taken {file} is not known, so nothing is removed; ftdist status tells once it "
               "answers, and ftdist resume submits what it has not taken")  # fmt: skip


def test_only(file: Path, *words: str, cwd: Path | None = None) -> str:
    """What `sbatch --test-only` says: when and where the job would start. UserError if it never would."""
    return _sbatch([*words, "--test-only", str(file)], cwd)


def _sbatch(words: list[str], cwd: Path | None) -> str:
    environment = {key: value for key, value in os.environ.items() if not re.match(INHERITED, key)}
    done = command("sbatch", *words, environment=environment, cwd=cwd)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode != 0:
        reason = next(
            (line for line in said if "error" in line.lower() or "failure" in line.lower()), "no reason given"
        )
        raise UserError(f"cluster=slurm: sbatch refused the job: {reason.removeprefix('sbatch: ').strip()}")
    return done.stdout.strip() or "\n".join(said)


# What SLURM sets in a job, as opposed to what steers its commands.
INHERITED = r"SLURM_(?!CONF$|CONF_SERVER$|CLUSTERS$|TIME_FORMAT$)|FTDIST_(STARTED|LEASE|GRACE|SHELL)$"


def command(
    name: str, *words: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. UserError if it is not there; Away if it, or the controller, does not answer.

    A terminal's Ctrl-C is for this process alone. Names in other encodings, of other users' jobs, are read as well.
    """
    program = shutil.which(name)
    if program is None:
        raise UserError(f"cluster=slurm: no {name} here; start this on a machine that can submit jobs")
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, errors="replace", check=False,
                              timeout=PATIENCE, env=environment, cwd=cwd, start_new_session=True)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Away(f"cluster=slurm: {name} does not answer within {PATIENCE} s; is the controller up?")
    if done.returncode != 0 and re.search(AWAY, done.stderr):
        said = " ".join(done.stderr.split())
        raise Away(f"cluster=slurm: {name}: {said[:200]}; is the controller up?")
    return done


def patiently(ask: Callable[[], Answer], seconds: float) -> Answer:
    """What SLURM answers, asked again while it is away. Away after so many seconds."""
    until, pause, told = time.monotonic() + seconds, 1.0, False
    while True:
        try:
            return ask()
        except Away as away:
            if time.monotonic() + pause > until:
                raise
            if not told:
                print(f"{away} Asking again for {seconds:.0f} s", flush=True)
                told = True
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def jobs(ids: Sequence[str]) -> dict[str, Job]:
    """Number → what is known of the job: from the queue, which remembers ended ones for minutes, then the accounting.

    Jobs that nothing knows any more are left out. Members of an array are `12_3`.
    """
    if not ids:
        return {}
    found: dict[str, Job] = {}
    done = command("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}",
                   "--format=%i|%A|%T|%L|%N|%r")  # fmt: skip
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise UserError(f"cluster=slurm: {' '.join(done.stderr.split())}")
    for line in done.stdout.splitlines():
        name, own, state, left, nodes, reason = line.strip().split("|", 5)
        job = Job(name, state, "" if reason == "None" else reason, seconds(left), nodes)
        found |= {key: job for key in (name, own) if key in ids}
    lost = [name for name in ids if name not in found]
    if lost and shutil.which("sacct"):
        with contextlib.suppress(Away):  # the database of the accounting is away, not the controller
            done = command("sacct", "-X", "-n", "-P", f"--jobs={','.join(lost)}", "--format=JobID,State,NodeList")
            for line in done.stdout.splitlines() if done.returncode == 0 else ():
                name, state, nodes = line.split("|")
                found[name] = Job(name, state.split()[0], "", None, nodes)  # "CANCELLED by 1000"
    return found


def job_of(script: Path) -> str | None:
    """The job in the queue that a batch script has become; of an array, the array's."""
    done = command("squeue", "--noheader", "--format=%F|%o")
    found = [line.split("|", 1) for line in done.stdout.splitlines()]
    return next((number.strip() for number, path in found if path.strip() == str(script)), None)


def own_name() -> str:
    """What SLURM's commands call this job alone: the number of an array's member may mean the whole array too."""
    member = os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ["SLURM_JOB_ID"] if member is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{member}"


def show(job: str) -> dict[str, str]:
    """`scontrol show job`: its fields; nothing for a job that is unknown, or when SLURM does not answer."""
    try:
        done = command("scontrol", "show", "job", "--oneliner", job)
    except UserError:
        return {}
    return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def left(job: str) -> int | None:
    """Seconds until the job's time limit; None without one, or when SLURM does not answer."""
    try:
        return seconds(command("squeue", "--noheader", "--jobs", job, "--format=%L").stdout)
    except UserError:
        return None


@functools.cache
def binds() -> bool:
    """Whether this SLURM pins tasks to cores, and so can be told not to."""
    found = re.search(r"^TaskPlugin\s*=\s*(\S+)", command("scontrol", "show", "config").stdout, re.M)
    return found is not None and bool(re.search("affinity|cgroup", found[1]))


def node_state(node: str) -> str:
    """IDLE, ALLOCATED, DOWN, …; with a `*` for one that does not answer."""
    found = re.search(r"\bState=(\S+)", command("scontrol", "show", "node", "--oneliner", node).stdout)
    return found[1] if found else ""


def cancel(ids: Sequence[str]) -> None:
    """Take jobs out of the queue, or end them; SLURM lets a running one save for KillWait seconds."""
    done = command("scancel", *ids)
    if done.returncode != 0:
        raise UserError(f"scancel {' '.join(ids)}: {' '.join(done.stderr.split())}")


def requeue(job: str) -> str:
    """Back into the queue, under the same number; ends the calling job. What was wrong, if it was refused."""
    done = command("scontrol", "requeue", job)
    return "" if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


def hosts(nodes: str) -> list[str]:
    """`node[1-3]` → the names."""
    done = command("scontrol", "show", "hostnames", nodes)
    if done.returncode != 0:
        raise UserError(f"cluster=slurm: scontrol show hostnames {nodes}: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def address(node: str) -> str:
    """Where SLURM itself reaches a node: its NodeAddr, which may differ from its name and from its host name."""
    found = re.search(r"\bNodeAddr=(\S+)", command("scontrol", "show", "node", "--oneliner", node).stdout)
    return found[1].strip("[]") if found else node


@functools.cache
def partition_gpus(partition: str | None, constraint: str | None = None) -> dict[str, int]:
    """Kind of GPU → how many of it a node of a partition, or of the default one, has at least, where it has some.

    Kinds are SLURM's names for them, `` where it names none. constraint: nodes with these features alone, as far as it
    is names with `&` and `|`. UserError if there is no such partition, or no SLURM to ask.
    """
    done = command("sinfo", "--noheader", "--format=%P|%f|%G", *((f"--partition={partition}",) if partition else ()))
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") > 1]
    if partition is None:
        rows = [row for row in rows if row[0].strip().endswith("*")] or rows
    if done.returncode != 0 or not rows:
        known = sorted(set(command("sinfo", "--noheader", "--format=%R").stdout.split()))
        raise UserError(f"cluster.partition={partition}: no such partition; known: {', '.join(known) or 'none'}")
    least: dict[str, int] = {}
    for _, features, gres in rows:
        if constraint is not None and not _meets(set(features.split(",")), constraint):
            continue
        for kind, number in _gpus(gres).items():
            least[kind] = min(number, least.get(kind, number))
    return least


def _gpus(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),shard:8` → kind and number of GPUs."""
    here: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *words = part.strip().split(":")
        count = int(words.pop()) if words and words[-1].isdigit() else 1
        if name == "gpu":
            here[":".join(words)] = here.get(":".join(words), 0) + count
    return here


def around(job: str, node: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Keys of `cluster` that ask for a job as sbatch was asked for the one around us, as far as SLURM tells."""
    told = show(job)
    names = {"partition": "Partition", "account": "Account", "qos": "QOS", "constraint": "Features",
             "reservation": "Reservation", "time": "TimeLimit"}  # fmt: skip
    found: dict[str, Any] = {key: told[name] for key, name in names.items() if told.get(name, "(null)") != "(null)"}
    if not re.fullmatch(TIME, found.get("time", "")):  # no limit
        found.pop("time", None)
    if memory := environment.get("SLURM_MEM_PER_NODE"):
        found["memory"] = f"{memory}M"
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        found["cpus"] = int(cpus)
    gres = re.search(r"\bGres=(\S+)", command("scontrol", "show", "node", "--oneliner", node).stdout)
    kinds = _gpus(gres[1]) if gres else {}
    return {**found, "gpu_type": next(iter(kinds)) or None if len(kinds) == 1 else None}


def _meets(features: set[str], constraint: str) -> bool:
    """Whether a node fits; one fits a constraint with brackets or numbers, which only SLURM can read."""
    if not re.fullmatch(r"[\w.&|-]+", constraint):
        return True
    return any(set(together.split("&")) <= features for together in constraint.split("|"))


def chosen_gpus(partition: str | None, constraint: str | None, gpu_type: str | None) -> tuple[int, str | None]:
    """(GPUs of a node, their kind) that a job would get; (0, None) where there are none.

    UserError where nodes have several kinds and none is chosen, or where none has the chosen one.
    """
    there = partition_gpus(partition, constraint)
    names = ", ".join(f"{kind or 'without a name'} ({count} on a node)" for kind, count in sorted(there.items()))
    where = f"cluster.partition={partition}" if partition else "the default partition"
    if gpu_type is not None:
        found = next((kind for kind in there if kind.lower() == gpu_type.lower()), None)
        if found is None:
            raise UserError(f"cluster.gpu_type={gpu_type}: {where} has {names or 'no GPUs'}")
        return there[found], found
    if len(there) > 1:
        raise UserError(f"{where} has several kinds of GPU: {names}; say which: "
                        f"cluster.gpu_type={next(kind for kind in sorted(there) if kind)}")  # fmt: skip
    return next(((count, kind or None) for kind, count in there.items()), (0, None))


def seconds(text: str) -> int | None:
    """`1-02:03:04`, `2:03:04`, `3:04` → seconds; None for UNLIMITED, NOT_SET and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def batch_command(verb: str, *words: str) -> list[str]:
    """What a batch script runs: ftdist.batch with the interpreter that submits, which the nodes must see too."""
    return [sys.executable, "-m", "ftdist.batch", verb, *words]
