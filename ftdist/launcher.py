"""Run directory → processes: the engines' files, the command, and what happens when a rank or the user ends it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import lease, rundir, stops
from ftdist.errors import FAILED, INTERRUPTED, OK, STOPPED, USAGE, Failed, UserError
from ftdist.schema import nearest
from ftdist.trainkeys import fields

# torchrun names the lowest rank that it found failed, and lists the others; accelerate speaks of its one child.
KILLED = (
    r"failed \(exitcode: -(?!15\))(\d+)\) local_rank: (\d+)|died with <Signals\.\w+: (\d+)>"
    r"|\(local_rank: (\d+)\)\s+exitcode *: -(?!15 )(\d+) "
)


def torch_engine(*, name: Literal["single", "ddp"]) -> None:
    """One process, or DistributedDataParallel: torch alone, no DeepSpeed file."""


def zero_engine(*, name: Literal["zero1", "zero2", "zero3", "zero3_offload"], zero: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed file of an engine, with the user's own keys for its `zero_optimization` section."""
    return _deepspeed(name, zero)


def nvme_engine(*, name: Literal["zero3_nvme"], zero: dict[str, Any], nvme_path: str) -> dict[str, Any]:
    """The same for the engine that keeps states and weights on a disk."""
    deepspeed = _deepspeed(name, zero)
    for part in ("offload_optimizer", "offload_param"):
        deepspeed["zero_optimization"][part]["nvme_path"] = str(Path(nvme_path).expanduser().absolute())
    return deepspeed


def _deepspeed(name: str, zero: dict[str, Any]) -> dict[str, Any]:
    deepspeed: dict[str, Any] = json.loads((resources.files("ftdist.launch") / f"{name}.json").read_text())
    known = [key for key in fields("deepspeed.runtime.zero.config:DeepSpeedZeroConfig") if key != "stage"]
    for key in zero:
        if key not in known:
            raise UserError(f"engine.zero.{key}: no such key; {nearest(key, known, 'engine.zero.')}")
    deepspeed["zero_optimization"].update(zero)
    return deepspeed


def engine_function(name: Any) -> Any:
    """The function whose signature is the schema of this engine's keys."""
    if name in ("single", "ddp"):
        return torch_engine
    return nvme_engine if name == "zero3_nvme" else zero_engine


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def devices() -> tuple[int, str]:
    """How many devices this machine offers, and of which kind (`GPU`, `CPU core`). No driver is loaded."""
    found = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(found) if visible is None else len([part for part in visible.split(",") if part.strip()])
    if found and count:
        return count, "GPU"
    return cores(), "CPU core"


def workers(ranks: int = 1, core_ranks: int = 1) -> int:
    """Processes for work before training: one for each GPU, or up to eight on the cores (each holds a matrix).

    ranks: that share the GPUs; core_ranks: that share the cores.
    """
    count, kind = devices()
    return max(1, count // ranks if kind == "GPU" else min(8, count // core_ranks))


@functools.cache
def gpu() -> tuple[int, float] | None:
    """Bytes of memory and compute capability of this machine's smallest GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if devices()[1] != "GPU" or shutil.which(query[0]) is None:
        return None
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    rows = [line.split(",") for line in answer.splitlines() if re.fullmatch(r"\s*\d+,\s*[\d.]+\s*", line)]
    return min(((int(memory) << 20, float(capability)) for memory, capability in rows), default=None)


@functools.cache
def gpu_facts() -> tuple[str, int, float] | None:
    """Product name, bytes of memory and compute capability of this machine's smallest GPU; None without one.

    Zeros where no nvidia-smi tells them.
    """
    facts = gpu()
    if facts is None:
        return ("GPU", 0, 0.0) if devices()[1] == "GPU" else None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return (answer.splitlines() or ["GPU"])[0], *facts


def processes(
    *,
    name: Literal["local", "outside", "slurm"],
    nodes: Annotated[int, Field(ge=1)],
    processes: Literal["auto"] | Annotated[int, Field(ge=1)],
    oversubscribe: bool,
    here: bool,
) -> int:
    """Processes on each node; `auto`: one for each GPU, one without.

    here: they are to start on this machine now; UserError for more processes than devices, or more nodes than one.
    """
    count, kind = devices()
    wanted = (count if kind == "GPU" else 1) if processes == "auto" else processes
    if here and name == "outside":
        raise UserError("cluster=outside: only for ranks that accelerate launch or torchrun starts; use cluster=local")
    if here:
        if nodes > 1:
            raise UserError(f"cluster.nodes={nodes}: cluster=local is one machine; use cluster=slurm, or "
                            "start accelerate launch --num_machines … -m ftdist.train on every node")  # fmt: skip
        if wanted > count and not oversubscribe:
            raise UserError(f"cluster.processes={wanted}: this machine has {count} devices ({kind}s); use at most "
                            f"cluster.processes={count}, or cluster.oversubscribe=true")  # fmt: skip
    return wanted


def accelerate_file(engine: str, count: int, deepspeed_file: Path) -> dict[str, Any]:
    """The accelerate configuration of a run on this machine."""
    import yaml

    source = "single" if engine in ("single", "ddp") and count == 1 else engine
    values: dict[str, Any] = yaml.safe_load((resources.files("ftdist.launch") / f"{source}.yaml").read_text())
    values["num_processes"] = count
    values["use_cpu"] = devices()[1] != "GPU"
    if "deepspeed_config" in values:
        values["deepspeed_config"]["deepspeed_config_file"] = str(deepspeed_file)
    return values


def command(run_dir: Path, alone: bool) -> list[str]:
    """What starts every rank of a frozen run on this machine. alone: one process needs no launcher, which would import
    torch a second time."""
    if alone:
        return [sys.executable, "-m", "ftdist.worker", str(run_dir)]
    return [
        sys.executable,
        *("-m", "accelerate.commands.launch", "--config_file", str(run_dir / "accelerate.yaml")),
        *("--main_process_port", "0", "-m", "ftdist.worker", str(run_dir)),
    ]


def told_alone(environment: Mapping[str, str], deepspeed: bool, gpu: bool) -> dict[str, str]:
    """Variables of a rank that no launcher starts. DeepSpeed wants to find its one rank; transformers would spread a
    process that sees several GPUs over all of them (DataParallel)."""
    from ftdist import node  # which starts ranks by means of this module

    told = node.place(0, 0, 1, 1, 0, "127.0.0.1", 0) if deepspeed else {}
    if gpu:
        told["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return told


def run(run_dir: Path, count: int, token: int, grace: float) -> None:
    """Start the ranks, wait, leave no process behind. Failed or UserError carry the first failing rank's own words.

    A signal that asks for an end is passed on as a request in the run directory (torchrun would kill its workers): the
    ranks save and stop. Before training begins, and at a second Ctrl-C, they are ended at once.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment[lease.VARIABLE] = str(token)
    environment.setdefault(stops.STARTED, str(time.time()))
    if devices()[1] != "GPU":
        environment.setdefault("DS_ACCELERATOR", "cpu")
    rundir.forget_last_start(run_dir)
    last = run_dir / "logs" / "launcher.log"
    if last.exists():
        last.rename(last.with_name(f"launcher.{len(list(last.parent.glob('launcher.*.log'))) + 1}.log"))
    asked: dict[str, float] = {}

    def ask(number: int, _: Any) -> None:
        name = stops.SIGNALS[signal.Signals(number)]
        again = number == signal.SIGINT and time.monotonic() - asked.get(name, math.inf) > stops.AGAIN
        asked.setdefault(name, time.monotonic())
        if again or not (run_dir / stops.RUNNING).exists():
            raise KeyboardInterrupt
        stops.request(run_dir, name)
        print(f"\n{name}: saving, then stopping (Ctrl-C again: at once, without saving)", flush=True)

    with (run_dir / "logs" / "launcher.log").open("ab") as log:
        child = None
        previous = {number: signal.signal(number, ask) for number in stops.SIGNALS}
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the others in order.
            alone = count == 1
            if alone:
                environment |= told_alone(environment, (run_dir / "deepspeed.json").exists(), devices()[1] == "GPU")
            child = subprocess.Popen(
                command(run_dir, alone), env=environment, stderr=log, start_new_session=True, preexec_fn=end_with_parent
            )
            status = _wait(child, run_dir / "logs", grace)
            if alone and status < 0:  # as accelerate's launcher says it of its child
                log.write(f"the rank died with <Signals.{signal.Signals(-status).name}: {-status}>\n".encode())
        except KeyboardInterrupt:
            if "Ctrl-C" in asked:
                raise
            raise Failed(
                f"stopped ({next(iter(asked))}) outside training: go on with: ftdist resume {run_dir}", STOPPED
            )
        finally:
            if child is not None:
                _stop(child, grace if (run_dir / stops.RUNNING).exists() and "Ctrl-C" not in asked else 0)
            for number, handler in previous.items():
                signal.signal(number, handler)
    judge(run_dir, status)


def judge(run_dir: Path, status: int, token: int | None = None) -> None:
    """What the ranks left behind, as an exception, unless they have finished. status: of whatever started them.

    token: their lease, where ranks of an earlier start may still be alive.
    """
    outcome = outcome_of(run_dir)
    if outcome.get("status") == STOPPED:
        again = INTERRUPTED if outcome["reason"] == "Ctrl-C" else STOPPED
        raise Failed(
            f"stopped ({outcome['reason']}) after step {outcome['step']}; everything is saved, "
            f"go on with: ftdist resume {run_dir}",
            again,
        )
    if status != OK and outcome.get("status") != OK:
        raise _failure(first_error(run_dir, token))


def _wait(child: subprocess.Popen[bytes], logs: Path, grace: float) -> int:
    """The launcher's exit status; once a rank has failed, it and the others have `grace` seconds to end."""
    failed = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.25)
        if failed is None and (any(logs.glob("rank-*.error.json")) or _killed(logs / "launcher.log")):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > grace:
            _stop(child, 0)
            return FAILED


def _killed(log: Path) -> re.Match[str] | None:
    """Where torchrun's log tells of a rank that was killed, and so has no words of its own."""
    return re.search(KILLED, log.read_text(errors="replace"))


def outcome_of(run_dir: Path) -> dict[str, Any]:
    """How the run's last start ended, as its ranks left it; empty if they left nothing."""
    with contextlib.suppress(OSError, ValueError):
        outcome: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text(encoding="utf-8"))
        return outcome
    return {}


def _failure(error: dict[str, Any]) -> Exception:
    """What a rank said, as this process would have said it."""
    if error["status"] == USAGE:
        return UserError(error["message"])
    where = f" on {error['node']}" if error.get("node") else ""
    return Failed(f"rank {error['rank']}{where}: {error['message']} (log: {error['log']})", error["status"])


def first_error(run_dir: Path, token: int | None = None) -> dict[str, Any]:
    """The error of the rank that failed first; what the launcher said if none could say anything.

    token: the ranks' lease, where srun has started them: the launcher's log is of an earlier start on one machine then.
    """
    log = run_dir / "logs" / "launcher.log"
    text = log.read_text(errors="replace") if token is None and log.exists() else ""
    # A killed rank says nothing itself, while the others complain of the connection to it.
    if killed := re.search(KILLED, text):
        number = killed[1] or killed[3] or killed[5]
        message = f"killed by signal {number}" + (" (out of memory?)" if number == "9" else "")
        return {"rank": killed[2] or killed[4] or 0, "message": message, "log": str(log), "status": FAILED}
    found = [json.loads(f.read_text()) for f in (run_dir / "logs").glob("rank-*.error.json")]
    reports = [r for r in found if token is None or r.get("lease") == str(token)]
    if reports:
        report: dict[str, Any] = min(reports, key=lambda r: (not r.get("killed"), r["time"]))
        return report
    lines = [line for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line.strip())), "")
    return {"rank": "?", "message": said or "the ranks ended without a word (killed from outside?)",
            "log": str(log if token is None else log.parent), "status": FAILED}  # fmt: skip


def end_with_parent() -> None:
    """In the child: should `ftdist` itself be killed, the kernel asks this process to stop (Linux, 1 = PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the whole session to stop, then make it."""
    if child.poll() is None and grace:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
            child.wait(grace)
    ranks = _descendants(child.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in ranks:  # torchrun puts its workers into sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _descendants(pid: int) -> list[int]:
    import psutil

    try:
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []
