"""A SLURM of the tests' own on this machine, and how runs on it are looked at."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import string
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from offline import history, records

SCRIPT = Path(__file__).parents[2] / "slurm" / "cluster.sh"
PATH = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}:/usr/sbin:/sbin"  # as where ftdist is active
WAIT = 240  # seconds for anything; what comes is a matter of seconds on a quiet machine


class Cluster:
    """Nodes of SLURM, with what tests do to them."""

    def __init__(self, **settings):
        self.folder = Path(tempfile.mkdtemp(prefix="fts", dir="/tmp"))  # short: sockets lie in it
        self.folder.chmod(0o755)  # or munged refuses it
        self.name = "".join(random.choices(string.ascii_lowercase, k=5))  # control groups are the machine's
        nodes = int(settings.get("NODES", 2))
        self.nodes = [f"{self.name}{number}" for number in range(1, nodes + 1)]
        self.variables = {"CLUSTER": str(self.folder / "c"), "NAME": self.name, "PORT": str(free_ports(nodes + 1)),
                          **{key: str(value) for key, value in settings.items()}}  # fmt: skip
        self.environment = {"SLURM_CONF": f"{self.folder}/c/slurm.conf", "PATH": PATH}
        self.script("up")

    def script(self, *words):
        done = subprocess.run([SCRIPT, *words], env=os.environ | self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    def ask(self, *words):
        """What one of SLURM's commands says."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout

    def state(self, job):
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def first(self, job):
        """The node of a running job's batch process."""
        return re.search(r"BatchHost=(\S+)", self.ask("scontrol", "show", "job", "--oneliner", job))[1]

    def log(self, run_dir):
        return "".join(file.read_text() for file in sorted((run_dir / "logs").glob("job-*.log")))

    def close(self):
        self.script("down")
        shutil.rmtree(self.folder)


def free_ports(count):
    while True:
        first = random.randrange(21000, 31000)
        with socket.socket() as one:
            try:
                for number in range(first, first + count):
                    with socket.socket() as one:
                        one.bind(("127.0.0.1", number))
                return first
            except OSError:
                continue


def missing():
    """Programs that are not on this machine."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch")
    return [name for name in programs if shutil.which(name, path=PATH) is None]


def until(condition, seconds=WAIT, say=lambda: "", pause=0.05):
    """Wait for something; a test that waits in vain tells what was there instead."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, say()
        time.sleep(pause)


# Words before a command that is to have a network of IPv6 alone (needs root).
IPV6_ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "$@"', "sh")
NODES = ("cluster=slurm", "cluster.nodes=2", "cluster.processes=1", "cluster.memory=3G")


def ranks(run_dir):
    """Pid → node of every rank of a run."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().endswith(b"-m\0ftdist.worker\0%s\0" % bytes(run_dir)):
                found[int(process.name)] = variables(process.name)["SLURMD_NODENAME"]
    return found


def variables(pid):
    """Of a process' environment."""
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def held(run_dir, cluster, steps=5, count=2):
    """While open, the ranks of a run stand still after so many steps: it cannot be finished. Gives pid → node."""
    until(lambda: len(ranks(run_dir)) == count, say=lambda: cluster.log(run_dir))
    found = ranks(run_dir)
    until(lambda: steps_done(run_dir) >= steps, say=lambda: cluster.log(run_dir), pause=0.001)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    assert steps_done(run_dir) < 30, "too late"
    try:
        yield found
    finally:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wandb_has(run_dir, over=False):
    """One W&B run in the offline files, over every start: each step once, as metrics.jsonl has it.

    over: steps after the last checkpoint were trained twice, with the same numbers.
    """
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == len(events(run_dir, "job")) > 1
    headers = [record.run for file in files for record in records(file) if record.HasField("run")]
    assert {header.run_id for header in headers} == {json.loads((run_dir / "plan.json").read_text())["id"]}
    told = [(row["_step"], row["loss"]) for file in files for row in history(file) if "loss" in row]
    kept = [(row["step"], row["loss"]) for row in rows(run_dir) if "loss" in row]
    assert (sorted(set(told)) if over else told) == kept
    assert [step for step, _ in kept] == list(range(1, 31))


MEASURED = ("tokens_per_second", "memory_gib")


def rows(run_dir):
    """metrics.jsonl without what was measured on the machine."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def steps_done(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.exists() else 0


def events(run_dir, name):
    file = run_dir / "events.jsonl"
    found = [json.loads(line) for line in file.open()] if file.exists() else []
    return [event for event in found if event["event"] == name]


def same(run_dir, other):
    """The same numbers in every step, the same bits in the end."""
    assert rows(run_dir) == rows(other)
    for file in (other / "final").glob("*.safetensors"):
        assert file.read_bytes() == (run_dir / "final" / file.name).read_bytes()
