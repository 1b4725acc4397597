"""Where things live on disk: the cache, and the run directory that is the only interface between steps."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftdist.errors import UserError

PRIVATE = 0o077  # what nobody but the owner may do with what a run writes
CLAIM = ".claim"
LEASE_FILES = ("lease.json", ".lease.lock")
SECRETS = r"(?i)((?:token|secret|password|api_?key)\w*=)\S+|(?<=//)[^/@\s]+(?=@)"  # in words of a command line
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets",
            "hydra-core", "wandb")  # fmt: skip


def cache_root() -> Path:
    """The directory of everything that can be made again: $FTDIST_CACHE, else the user's cache directory."""
    explicit = os.environ.get("FTDIST_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ftdist"


def fresh_name(model: str, strategy: str) -> str:
    """runs/<time>-<model>-<strategy>; microseconds keep two starts in one second apart."""
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")
    return f"runs/{now}-{Path(model).name}-{strategy}"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[int]:
    """Make `path` this run's own and private, with a lease; on an error inside, take away what was made, nothing else.

    Gives the lease's token. UserError if the directory holds anything already or cannot be written.
    """
    from ftdist import lease

    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = _used(path)
        if not taken:
            token = lease.take(path).token
            taken = _used(path)
            os.close(os.open(path / CLAIM, os.O_CREAT | os.O_EXCL)) if not taken else None
            path.chmod(0o700)
    except FileExistsError:
        taken = True
    except (OSError, NotADirectoryError) as failure:
        raise UserError(f"run_dir={path}: cannot be written ({failure.strerror}); choose another")
    if taken:
        raise UserError(f"run_dir={path}: holds a run or other files already; choose another or leave it out")
    try:
        yield token
    except BaseException:
        for child in path.iterdir():  # it was empty
            shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def clear_unfinished(path: Path) -> None:
    """Empty a run directory whose start was killed before anything was frozen; leave every other directory alone."""
    from ftdist import lease

    if (path / CLAIM).is_file() and not (path / "config.yaml").exists():
        with lease.held(path):  # refused while that start is alive
            for child in sorted(path.iterdir(), key=lambda child: child.name == CLAIM):  # the claim last
                if child.name not in LEASE_FILES:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()


def _used(path: Path) -> bool:
    """Whether there is anything but a lease, which a start that was given up leaves behind."""
    return any(child.name not in LEASE_FILES for child in path.iterdir())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    _flushed(partial, json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no such file, or no whole one."""
    with contextlib.suppress(OSError, ValueError):
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    return {}


def write_yaml(path: Path, value: Any) -> None:
    """Whole or not at all, keys in the order given."""
    import yaml

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    _flushed(partial, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    partial.replace(path)


def _flushed(path: Path, text: str) -> None:
    """Written, and on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def record(run_dir: Path, token: int | None, event: str, step: int | None, **facts: Any) -> None:
    """A line for RUN/events.jsonl, the run's time line: start, checkpoint, stop, fault, …

    token: of the lease that it is written under, Failed if somebody else has the run by now; None from who has the lock
    already, or speaks of a job that is in no process.
    """
    from ftdist import lease

    line = json.dumps({"time": time.time(), "event": event, "step": step, **facts})
    guard = contextlib.nullcontext() if token is None else lease.guarded(run_dir, token)
    try:
        with guard, (run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as failure:  # a full disk must not end the run that is to be told of it
        print(f"warning: events.jsonl: {failure.strerror}; not written: {line}", flush=True)


def forget_last_start(run_dir: Path) -> None:
    """What the ranks of an earlier start said is not this one's. For whoever has taken the lease.

    A request to stop stays: it was made after the lease was taken, which removes older ones.
    """
    logs = run_dir / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    for file in (*logs.glob("rank-*.json"), *(run_dir / name for name in ("outcome.json", ".training"))):
        file.unlink(missing_ok=True)


def leave_out(run_dir: Path, token: int, step: int) -> None:
    """From the next start on, this step changes nothing: its batch has broken the run."""
    from ftdist import lease

    with lease.guarded(run_dir, token):
        write_json(run_dir / "left_out.json", sorted({*left_out(run_dir), step}))


def left_out(run_dir: Path) -> list[int]:
    """The steps whose batches are not trained on."""
    file = run_dir / "left_out.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def read_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration that the run was frozen with. UserError if `run_dir` is no run."""
    import yaml

    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: no run directory (no config.yaml in it); runs are made by `ftdist train`")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as failure:
        raise UserError(
            f"{file}: cannot be read ({' '.join(str(failure).split())[:160]}); the run directory is not whole"
        )
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no configuration; the run directory is not whole")
    return config


def finished(run_dir: Path) -> dict[str, Any]:
    """`config`, `plan` and `environment` of a finished run. UserError: no run, not finished, or of another version."""
    from ftdist import __version__

    config = read_config(run_dir)
    if not (run_dir / "final").is_dir():
        raise UserError(f"{run_dir}: not finished (no final/ in it); let it finish first")
    found: dict[str, Any] = {"config": config}
    for name, file, keys in (
        ("plan", "plan.json", ("prepared", "precision", "strategy", "trainable_parameters", "total_parameters")),
        ("environment", "env.json", ("versions",)),
    ):
        try:
            found[name] = json.loads((run_dir / file).read_text(encoding="utf-8"))
            lost = [key for key in keys if key not in found[name]]
        except (OSError, ValueError) as failure:
            raise UserError(f"{run_dir / file}: cannot be read ({failure}); the run directory is not whole")
        if lost:
            by = found.get("environment", {}).get("versions", {}).get("ftdist", "another version")
            raise UserError(f"{run_dir}: made by ftdist {by}, which left no {lost[0]} in {file}; this is {__version__}")
    return found


def versions() -> dict[str, str]:
    """Of this package and of those that its runs depend on."""
    found = {}
    for package in ("ftdist", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment() -> dict[str, Any]:
    """Versions, commit, machine: what somebody needs who wants to run this again."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": [re.sub(SECRETS, lambda m: f"{m[1] or ''}***", word) for word in sys.argv],
        "commit": git.stdout.strip() or None,
        "versions": versions(),
    }


def again(environment: dict[str, Any]) -> str:
    """The command that made a run, for a shell."""
    first, *words = environment["command"]
    if Path(first).name == "train.py":  # by an outside launcher, whose settings the run directory has
        return shlex.join(["accelerate", "launch", "--config_file", "accelerate.yaml", "-m", "ftdist.train", *words])
    return shlex.join(["ftdist", *words])
