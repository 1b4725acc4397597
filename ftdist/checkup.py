"""What is wrong with an installation, a machine or a cluster, before a run finds out: one line a subject."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ftdist import launcher, lease, rundir
from ftdist.errors import UserError

Level = Literal["ok", "warn", "wrong"]
OK: Level = "ok"
WARN: Level = "warn"
WRONG: Level = "wrong"
OPEN_FILES = 4096  # that shards, data files and sockets of a node's ranks may want
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm that NCCL and loaders want on a GPU machine
LITTLE = 20 << 30  # bytes free below which models and checkpoints soon do not fit
PATIENCE = 20  # seconds for an answer of SLURM's
ANSWER = 120  # seconds for a task on every node
LOCAL_FILE_SYSTEMS = ("ext2/ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlayfs", "zfs", "ramfs")
# Installed beside ftdist: versions that are known to break it, though nothing in their own metadata says so.
KNOWN_BAD = {
    "antlr4-python3-runtime": ("!=4.9.3", "Hydra and OmegaConf read their grammar with 4.9.3 alone"),
    "torch": ("<2.10", "loading a checkpoint file may run its code (CVE-2025-32434, CVE-2026-24747)"),
    "transformers": ("<5.5", "loading a model may run its code (CVE-2026-4372, CVE-2026-5241)"),
    "hydra-optuna-sweeper": (">=0", "made for Optuna 2; sweep=search needs no plug-in of Hydra's"),
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Finding:
    """One subject. fix: what to do, where something is to be done."""

    subject: str
    level: Level
    found: str
    fix: str = ""

    def line(self, width: int) -> str:
        return f"{self.level:<6} {self.subject:<{width}}  {self.found}" + (f"; {self.fix}" if self.fix else "")


def findings(shared: Path | None) -> Iterator[Finding]:
    """Everything that can be asked without importing torch. shared: a directory that every node has to see."""
    yield Finding("python", OK, sys.version.split()[0])
    yield from _packages()
    yield from _devices()
    yield _bitsandbytes()
    yield from _compilers()
    yield from _limits()
    yield from _environment()
    yield from _places()
    if shared is not None:
        yield from shared_directory(shared)
    yield _wandb()
    yield from _slurm()


# --- packages -------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    for package in rundir.PACKAGES:
        try:
            yield Finding(package, OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, WRONG, "missing", f"pip install {package}")
    wrong = list(conflicts())
    yield from (Finding("versions", WRONG, said, fix) for said, fix in wrong)
    yield from _known_bad()
    tried, other = _tried()
    if not wrong:
        yield Finding("versions", OK, "every requirement is met, to the last package")
    if other:
        yield Finding(
            "constraints",
            WARN,
            f"not the versions that were tested: {', '.join(other)}",
            f"pip install -c {tried} -e .",
        )
    elif tried:
        yield Finding("constraints", OK, "the versions that were tested")


def conflicts(root: str = "ftdist") -> Iterator[tuple[str, str]]:
    """(what is missing or of a version that its user does not take, the fix), for `root` and all below it."""
    from packaging.requirements import Requirement

    seen, left = set(), [(root, "")]
    while left:
        name, extras = left.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in texts:
            wanted = Requirement(text)
            wants = [wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in extras.split(",")]
            if not any(wants):
                continue
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{name} needs {wanted.name}, which is missing", f"pip install '{wanted.name}{wanted.specifier}'"
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                said = f"{name} needs {wanted.name}{wanted.specifier}, {version} is installed"
                yield said, f"pip install '{wanted.name}{wanted.specifier}'"
            left.append((wanted.name, ",".join(sorted(wanted.extras))))


def _known_bad() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    for package, (versions, why) in KNOWN_BAD.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if SpecifierSet(versions).contains(version, prereleases=True):
            fix = f"pip uninstall {package}" if versions == ">=0" else f"take another version of {package}"
            yield Finding("versions", WRONG, f"{package} {version}: {why}", fix)


def _tried() -> tuple[Path | None, list[str]]:
    """The constraints file of a source checkout, and the packages of ours that are not as in it."""
    file = Path(__file__).parents[1] / "constraints.txt"
    if not file.is_file():
        return None, []
    pins = dict(line.split("==") for line in file.read_text(encoding="utf-8").splitlines() if "==" in line)
    other = []
    for package in rundir.PACKAGES:
        try:
            version = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if package in pins and version != pins[package]:
            other.append(f"{package} {version} (tested {pins[package]})")
    return file, other


# --- devices --------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    count, kind = launcher.devices()
    build = torch_cuda()
    if kind != "GPU":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None and list(Path("/dev").glob("nvidia[0-9]*"))
        if hidden:
            yield Finding("devices", WARN, f"{count} CPU cores: CUDA_VISIBLE_DEVICES hides the GPUs", "unset it")
        else:
            yield Finding("devices", OK, f"{count} CPU cores, no GPU")
        return
    facts = launcher.gpu_facts()
    assert facts is not None
    name, memory, capability = facts
    yield Finding("devices", OK, f"{count} × {name}, {memory / 2**30:.0f} GiB, compute capability {capability}")
    driver, newest = _driver()
    yield driver_fits(build, driver, newest)


def torch_cuda() -> str | None:
    """The CUDA version that torch was built with; None for a CPU build. Its own file says so, without an import."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.M)
    return match[1] if match else None


def _driver() -> tuple[str | None, str | None]:
    """The driver's version and the newest CUDA that it runs."""
    if shutil.which("nvidia-smi") is None:
        return None, None
    text = _answer("nvidia-smi") or ""
    driver, cuda = re.search(r"Driver Version: ([\d.]+)", text), re.search(r"CUDA Version: ([\d.]+)", text)
    return (driver[1] if driver else None), (cuda[1] if cuda else None)


def driver_fits(build: str | None, driver: str | None, newest: str | None) -> Finding:
    """Whether torch's build and the driver go together; inside one major version any minor does."""
    if build is None:
        return Finding("cuda", WRONG, "GPUs, and a torch without CUDA", "pip install the CUDA build of torch")
    if driver is None or newest is None:
        return Finding("cuda", WARN, f"torch for CUDA {build}; nvidia-smi does not answer", "install it, to be sure")
    if int(build.split(".")[0]) > int(newest.split(".")[0]):
        said = f"torch for CUDA {build}, driver {driver} runs up to CUDA {newest}"
        return Finding("cuda", WRONG, said, f"a newer driver, or a torch for CUDA {newest.split('.')[0]}")
    return Finding("cuda", OK, f"torch for CUDA {build}, driver {driver} (up to CUDA {newest})")


def _bitsandbytes() -> Finding:
    spec = find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return Finding("4-bit", WRONG, "bitsandbytes is missing: no strategy=qlora", "pip install bitsandbytes")
    there = [
        file.stem.removeprefix("libbitsandbytes_") for file in Path(spec.origin).parent.glob("libbitsandbytes_*.so")
    ]
    build = torch_cuda() if launcher.devices()[1] == "GPU" else None
    return backend(build, sorted(there))


def backend(build: str | None, there: list[str]) -> Finding:
    """Whether bitsandbytes has a library for torch's CUDA (None: for CPUs)."""
    wanted = "cpu" if build is None else "cuda" + "".join(build.split(".")[:2])
    if wanted in there:
        return Finding("4-bit", OK, f"bitsandbytes has {wanted}")
    said = f"bitsandbytes has no {wanted}, only {', '.join(there) or 'nothing'}: no strategy=qlora"
    return Finding("4-bit", WRONG, said, "pip install --upgrade bitsandbytes, or a torch that it has a library for")


def _compilers() -> Iterator[Finding]:
    missing = [tool for tool in ("g++", "ninja") if not _there(tool)]
    if missing:
        said = f"{' and '.join(missing)} missing: DeepSpeed cannot build its own operators (fused optimizers, NVMe)"
        yield Finding("compiler", WARN, said, "apt-get install g++ ninja-build")
    else:
        yield Finding("compiler", OK, "g++ and ninja")
    build = torch_cuda()
    if launcher.devices()[1] == "GPU" and build is not None:
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        nvcc = shutil.which("nvcc") or (f"{home}/bin/nvcc" if Path(f"{home}/bin/nvcc").exists() else None)
        match = re.search(r"release ([\d.]+)", _answer(nvcc, "--version") or "") if nvcc else None
        if match is None:
            yield Finding("nvcc", WARN, "missing: DeepSpeed builds no operators for the GPU", f"CUDA toolkit {build}")
        elif match[1].split(".")[0] != build.split(".")[0]:
            said = f"{match[1]}, torch was built with {build}: DeepSpeed refuses to build its operators"
            yield Finding("nvcc", WARN, said, f"CUDA toolkit {build}, and CUDA_HOME at it")
        else:
            yield Finding("nvcc", OK, match[1])
    if Path("/usr/include/libaio.h").exists():
        yield Finding("libaio", OK, "there")
    else:
        yield Finding("libaio", OK, "not there; engine=zero3_nvme alone needs it (apt-get install libaio-dev)")


def _there(tool: str) -> bool:
    return shutil.which(tool) is not None or Path(sys.executable).with_name(tool).exists()


# --- the machine ----------------------------------------------------------------------------------


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        level = WRONG if soft < 512 else WARN
        yield Finding("open files", level, f"at most {soft} (hard limit {hard})", f"ulimit -n {OPEN_FILES}")
    else:
        yield Finding("open files", OK, f"at most {soft}")
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield Finding("/dev/shm", WRONG, "not there", "mount it: NCCL and data loaders share memory in it")
    else:
        size, gpu = shutil.disk_usage(memory).total, launcher.devices()[1] == "GPU"
        if gpu and size < SHARED_MEMORY:
            yield Finding(
                "/dev/shm", WARN, f"{size >> 20} MiB", "1 GiB or more: docker run --shm-size=8g or --ipc=host"
            )
        else:
            yield Finding("/dev/shm", OK, f"{size >> 20} MiB")
    if Path("/dev/infiniband").is_dir():
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked != resource.RLIM_INFINITY:
            yield Finding("locked memory", WARN, f"at most {locked >> 10} KiB, and InfiniBand", "ulimit -l unlimited")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        yield Finding("host name", OK, socket.gethostname())
    except OSError:
        name = socket.gethostname()
        yield Finding("host name", WRONG, f"{name} has no address: ranks cannot meet", f"put {name} into /etc/hosts")


def _environment() -> Iterator[Finding]:
    left = [name for name in LAUNCHERS if name in os.environ]
    if left:
        yield Finding("environment", WARN, f"{', '.join(left)} set, as by a launcher", f"unset {' '.join(left)}")


def _places() -> Iterator[Finding]:
    places = {"cache": rundir.cache_root(), "here": Path.cwd(), "models": _hub_cache()}
    for subject, place in places.items():
        above = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(above).free
        said = f"{place}, {free / 2**30:.0f} GiB free"
        if not os.access(above, os.W_OK):
            fix = "set FTDIST_CACHE" if subject == "cache" else "set HF_HOME" if subject == "models" else "set run_dir"
            yield Finding(subject, WRONG if subject == "cache" else WARN, f"{place} cannot be written", fix)
        elif free < LITTLE:
            yield Finding(subject, WARN, said, "models and checkpoints may not fit; clear it, or choose another place")
        else:
            yield Finding(subject, OK, said)


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface"


def shared_directory(directory: Path) -> Iterator[Finding]:
    """Whether runs can live in `directory`: written, renamed and locked here, and seen by every node of the job."""
    if not directory.is_dir():
        yield Finding("shared", WRONG, f"{directory}: no such directory", "make it, or name another with --shared DIR")
        return
    if not os.access(directory, os.W_OK):
        yield Finding("shared", WRONG, f"{directory} cannot be written by you", "its owner has to let you")
        return
    try:
        probe = Path(tempfile.mkdtemp(prefix=".ftdist-doctor-", dir=directory))
    except OSError as failure:
        yield Finding("shared", WRONG, f"{directory}: {failure}", "choose another directory")
        return
    try:
        rundir.write_json(probe / "word.json", {"word": uuid.uuid4().hex})
        with lease.locked(probe):
            pass
        kind = (_answer("stat", "-f", "-c", "%T", str(directory)) or "unknown").strip()
        yield from _seen_by_nodes(probe, kind)
    except (UserError, OSError) as failure:
        yield Finding("shared", WRONG, f"{directory}: {failure}", "choose another directory")
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _seen_by_nodes(probe: Path, kind: str) -> Iterator[Finding]:
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    directory = probe.parent
    if nodes > 1:
        script = f"cat {shlex.quote(str(probe / 'word.json'))} && touch {shlex.quote(str(probe))}/$SLURM_NODEID"
        words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "sh", "-c", script]
        beside = os.environ | {"SLURM_OVERLAP": "1"}  # other steps; before 20.11 all are, and the option is unknown
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER, env=beside)
        except subprocess.TimeoutExpired:
            fix = "a node hangs, or the directory does on it: sinfo -R, and ls there"
            yield Finding("shared", WRONG, f"{directory}: not every node answers within {ANSWER} s", fix)
            return
        blind = [number for number in range(nodes) if not (probe / str(number)).exists()]
        if done.returncode or blind:
            said = f"{directory}: nodes {', '.join(map(str, blind)) or '?'} of {nodes} do not see it"
            yield Finding("shared", WRONG, said, "mount it on every node, or name another")
        else:
            yield Finding("shared", OK, f"{directory} ({kind}): written, locked, seen by all {nodes} nodes")
    elif kind in LOCAL_FILE_SYSTEMS and shutil.which("sbatch"):
        said = f"{directory} is {kind}, a file system of this machine alone"
        yield Finding("shared", WARN, said, "other nodes will not see it; salloc --nodes=2 ftdist doctor --shared DIR")
    else:
        yield Finding("shared", OK, f"{directory} ({kind}): written and locked here")


# --- services -------------------------------------------------------------------------------------


def _wandb() -> Finding:
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("wandb", OK, f"WANDB_MODE={mode}")
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = re.sub(r"^\w+://", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).split("/")[0].split(":")[0]
    known = netrc.is_file() and re.search(rf"machine\s+{re.escape(host)}\b", netrc.read_text(errors="replace"))
    if os.environ.get("WANDB_API_KEY") or known:
        return Finding("wandb", OK, f"logged in ({host})")
    fix = "wandb login; or tracking=none"
    return Finding("wandb", WARN, "not logged in: runs stay offline in their directories (wandb sync sends them)", fix)


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("slurm", OK, "no sbatch here: cluster=local")
        return
    version = (_answer("sbatch", "--version") or "sbatch does not answer").strip()
    ping = _answer("scontrol", "ping") or ""
    if not re.search(r"\bis UP\b", ping, re.I):
        said = f"{version}; the controller does not answer ({' '.join(ping.split())[:120] or 'scontrol ping fails'})"
        yield Finding("slurm", WRONG, said, "ask your administrators; slurm.conf and munge have to be the cluster's")
        return
    yield Finding("slurm", OK, f"{version}, the controller answers")
    yield partitions(_answer("sinfo", "--noheader", "--format=%P %a %D %T") or "")


def cluster(words: list[str]) -> Finding:
    """Whether a configuration of `cluster` could be submitted (overrides, as for `ftdist train`)."""
    from ftdist import compose, job, submit
    from ftdist import scheduler as slurm

    try:
        (config,) = compose.compose("doctor", words)
        job.decide(config)
        job.per_node(config["cluster"], here=True)
        if config["cluster"]["name"] != "slurm":
            return Finding("cluster", OK, f"cluster={config['cluster']['name']} can be had here")
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, slurm.SCRIPT)
            script.write_text(submit.text(Path(config["run_dir"]), config["cluster"]), encoding="utf-8")
            return Finding("cluster", OK, " ".join(slurm.test_only(script).split()))
    except UserError as failure:
        return Finding("cluster", WRONG, str(failure), "change these keys, or what they ask for")


def partitions(text: str) -> Finding:
    """What `sinfo` tells: a line each partition and state of nodes, `name availability nodes state`."""
    usable: dict[str, int] = {}
    for line in text.splitlines():
        name, available, count, state = [*line.split(), "", "", "", ""][:4]
        usable.setdefault(name, 0)
        if available == "up" and not re.match(r"down|drain|fail|unk|maint|powered_down", state) and "*" not in state:
            usable[name] += round(float(count.rstrip("K") or 0) * (1000 if count.endswith("K") else 1))
    if not usable:
        return Finding("partitions", WRONG, "sinfo shows none", "ask your administrators for access")
    words = ", ".join(f"{name} ({count} nodes)" for name, count in usable.items())
    if not any(usable.values()):
        return Finding("partitions", WRONG, f"no node is usable: {words}", "sinfo -R tells why")
    return Finding("partitions", OK, f"usable: {words}")


def _answer(*words: str) -> str | None:
    """What a command prints; None if it fails, is not there or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def text(found: list[Finding], as_json: bool) -> str:
    """For people, or as JSON: `subject level found fix`."""
    if as_json:
        return json.dumps([vars(finding) for finding in found], indent=2)
    width = max(len(finding.subject) for finding in found)
    return "\n".join(finding.line(width) for finding in found)
