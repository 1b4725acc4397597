"""What a sweep is on the disk: the list of its members, how each is to run, and what has become of each.

SWEEP/sweep.yaml           what was asked for; members: name (of the run directory), override words
SWEEP/members/NAME.yaml    the member's whole configuration
SWEEP/members/NAME.json    its state
SWEEP/NAME/                its run directory
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftdist import errors, lease, rundir
from ftdist.errors import UserError

FILE = "sweep.yaml"
FOLDER = "members"
LOCK = ".lock"  # in it
WAITING, RUNNING, FINISHED, FAILED, STOPPED, PRUNED = "waiting", "running", "finished", "failed", "stopped", "pruned"
REFUSED = "refused"  # a combination of a search that cannot be
DONE = (FINISHED, PRUNED, REFUSED)
LONGEST = 60  # characters of a member's name


@dataclass(frozen=True)
class Member:
    """One run of a sweep. name: of its run directory; words: the overrides that are its own."""

    name: str
    words: list[str]


@dataclass(frozen=True)
class State:
    """What has become of a member. status: the exit status of its last start; attempts: starts so far."""

    state: str = WAITING
    reason: str | None = None
    status: int | None = None
    attempts: int = 0
    retries: int = 0  # of these, after failures and since the sweep was last started
    seconds: float = 0.0  # of all starts
    owner: str | None = None  # of a trial in SLURM: the job that has it
    since: float = 0.0  # when this was written, or the running start began


def fresh_name(model: str) -> str:
    """sweeps/<time>-<model>; microseconds keep two starts in one second apart."""
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")
    return f"sweeps/{now}-{Path(model).name}"


def own_words(members: list[list[str]]) -> list[list[str]]:
    """Of each member's overrides those that are not the same in all."""
    plain = [[word.lstrip("+") for word in words] for words in members]
    return [[word for word in words if any(word not in others for others in plain)] for words in plain]


def names(members: list[list[str]], first: int = 0) -> list[str]:
    """Number and values of each member, fit for a folder: `03-lora-0.0002`."""
    width = max(2, len(str(first + len(members) - 1)))
    found = []
    for number, words in enumerate(members, first):
        values = [re.sub(r"[^\w.+-]+", "_", _short(word.partition("=")[2])).strip("_") for word in words]
        found.append("-".join([f"{number:0{width}}", *filter(None, values)])[:LONGEST].rstrip("-._"))
    return found


def _short(value: str) -> str:
    """A value for a name; of a number four digits."""
    if not re.fullmatch(r"-?\d+\.\d{3,}(e-?\d+)?", value):
        return value
    return f"{float(value):.4g}"


def is_sweep(path: Path) -> bool:
    """Whether a directory is a sweep's."""
    return (path / FILE).is_file()


def write(sweep_dir: Path, asked: dict[str, Any], members: list[Member], configs: list[dict[str, Any]]) -> None:
    """Freeze a sweep: the configurations of its members first, their list last."""
    folder = sweep_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    for member, config in zip(members, configs, strict=True):
        rundir.write_yaml(folder / f"{member.name}.yaml", config)
    rundir.write_yaml(sweep_dir / FILE, {**asked, "members": [asdict(member) for member in members]})


def add(sweep_dir: Path, member: Member) -> None:
    """One more member, of a search; for whoever has the sweep's lock. How it is to run is written after it."""
    asked = read(sweep_dir)
    rundir.write_yaml(sweep_dir / FILE, {**asked, "members": [*asked["members"], asdict(member)]})


def is_configured(sweep_dir: Path, name: str) -> bool:
    """Whether it is written down how a member is to run."""
    return (sweep_dir / FOLDER / f"{name}.yaml").is_file()


def configure(sweep_dir: Path, name: str, config: dict[str, Any]) -> None:
    """Write down how a member is to run."""
    rundir.write_yaml(sweep_dir / FOLDER / f"{name}.yaml", config)


def change(sweep_dir: Path, **values: Any) -> None:
    """Other values of what the sweep was asked for, from now on."""
    with lease.locked(sweep_dir):
        rundir.write_yaml(sweep_dir / FILE, {**read(sweep_dir), **values})


def read(sweep_dir: Path) -> dict[str, Any]:
    """sweep.yaml: `name words later sweep members …`. UserError if it is not there or not whole.

    words: overrides that all share; later: those that a resume has added.
    """
    import yaml

    file = sweep_dir / FILE
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{sweep_dir}: no sweep (no {FILE} in it); sweeps are made by `ftdist train -m`")
    except (OSError, ValueError, yaml.YAMLError) as failure:
        raise UserError(f"{file}: cannot be read ({' '.join(str(failure).split())[:160]})")
    if not isinstance(found, dict) or not {"words", "sweep", "members"} <= set(found):
        raise UserError(f"{file}: no sweep's file (words, sweep, members are wanted in it)")
    return {"later": [], **found}


def members(sweep_dir: Path) -> list[Member]:
    """The members in order."""
    return [Member(**entry) for entry in read(sweep_dir)["members"]]


def config(sweep_dir: Path, name: str) -> dict[str, Any]:
    """A member's configuration as it was frozen."""
    import yaml

    found: dict[str, Any] = yaml.safe_load((sweep_dir / FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def state(sweep_dir: Path, name: str) -> State:
    """What has become of a member so far."""
    try:
        return State(**json.loads((sweep_dir / FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return State()


@contextlib.contextmanager
def locked(sweep_dir: Path) -> Iterator[None]:
    """The lock of what is known of the members, held for milliseconds; the kernel lets go of it when a holder dies.

    However many jobs of an array start at once, each has its turn. Nothing else is locked while it is held.
    """
    with (sweep_dir / FOLDER / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _changed(sweep_dir: Path, name: str, change: Callable[[State], dict[str, Any]]) -> State:
    with locked(sweep_dir):
        before = state(sweep_dir, name)
        after = replace(before, **{"since": time.time(), **change(before)})
        rundir.write_json(sweep_dir / FOLDER / f"{name}.json", asdict(after))
    return after


def mark(sweep_dir: Path, name: str, **values: Any) -> State:
    """Write down what is new about a member. Several processes may do it at once."""
    return _changed(sweep_dir, name, lambda _: values)


def begins(sweep_dir: Path, name: str) -> State:
    """Write down that a member is started, or gone on with."""
    return _changed(sweep_dir, name, lambda before: {"state": RUNNING, "reason": None, "status": None,
                                                     "attempts": before.attempts + 1})  # fmt: skip


def again(sweep_dir: Path, name: str) -> State:
    """Write down that a member which has failed is to be started once more."""
    return _changed(sweep_dir, name, lambda before: {"retries": before.retries + 1})


def ended(sweep_dir: Path, name: str, status: int, reason: str | None, seconds: float) -> State:
    """Write down how a start of a member has ended. seconds: that it took."""
    words = {errors.OK: FINISHED, errors.STOPPED: STOPPED, errors.INTERRUPTED: STOPPED}
    word = words.get(status, FAILED)
    return _changed(sweep_dir, name, lambda before: {"state": word, "status": status, "reason": reason,
                                                     "seconds": before.seconds + seconds})  # fmt: skip


def unfinished(sweep_dir: Path) -> list[str]:
    """Members that a start of the sweep has still to run, in order."""
    return [member.name for member in members(sweep_dir) if state(sweep_dir, member.name).state not in DONE]


def reopen(sweep_dir: Path, names: list[str]) -> None:
    """These members are to be run, or gone on with, by a start of the sweep."""
    for name in names:
        mark(sweep_dir, name, state=WAITING, reason=None, status=None, retries=0, owner=None)
