"""The devices that a plan is made for: the choice in `hardware`, completed by what the machine says of itself."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ftdist.errors import UserError
from ftdist.rundir import cache_root
from ftdist.schema import nearest

CONTEXT = 550_000_000  # of a CUDA context with torch's kernels, and of cuBLAS' workspace; a band of a third
NCCL = 350_000_000  # NCCL's buffers, once a rank talks to others; likewise
CPU_RUNTIME = 570_000_000  # resident set of a rank of the test matrix, whose tensors are a few megabytes
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Hardware:
    """One kind of device, alike on every node."""

    name: str
    gpu: bool
    memory: int | None  # bytes; on CPUs of the whole node
    runtime: int
    host_memory: int | None
    capability: float | None
    flops: dict[str, float]  # element type -> operations a second
    bandwidth: float
    link: float  # bytes a second between devices of a node
    network: float  # of one port between nodes
    ports: int | None  # of a node; None: one a device
    host_bandwidth: float  # of a node's own memory
    nvme: float  # of a node's local disks, reading or writing
    efficiency: float
    calibrated: bool
    price_per_hour: float | None


def hardware(
    *,
    name: str,
    match: str | None,
    memory: Positive | None,
    runtime: Annotated[float, Field(ge=0)] | None,
    host_memory: Positive | None,
    capability: Positive | None,
    bf16_flops: Positive | None,
    fp32_flops: Positive | None,
    bandwidth: Positive | None,
    link: str | None,
    network: str | float,
    ports: Annotated[int, Field(ge=1)] | None,
    host_bandwidth: Positive,
    nvme: Positive,
    efficiency: Annotated[float, Field(gt=0, le=1)],
    price_per_hour: Annotated[float, Field(ge=0)] | None,
    links: dict[str, float],
    here: bool,
    world: int,
    cores: int,
    ask: Callable[[], tuple[str, int, float] | None],
) -> Hardware:
    """The devices of `hardware`. here: the ranks run on this machine; ask: name, bytes and capability of its GPU."""
    given = {
        "memory": memory,
        "capability": capability,
        "bf16_flops": bf16_flops,
        "fp32_flops": fp32_flops,
        "bandwidth": bandwidth,
        "link": link,
    }
    if name == "auto":
        found = ask()
        table = _table()
        if found is None:
            name = "cpu"
        else:
            name = next((k for k, v in table.items() if v.get("match") and re.search(v["match"], found[0])), found[0])
            given["memory"] = given["memory"] or found[1] or None
            given["capability"] = given["capability"] or found[2] or None
        own = table.get(name) or table["l4"]  # a card that is not in the table: the slowest of those that are
        asked = ("memory", "capability")  # what the machine says of itself is not taken from a table
        given = {k: own.get(k) if v is None and k not in asked else v for k, v in given.items()}
    elif match is None and name != "cpu":
        raise UserError(f"hardware.name={name}: no such hardware; {nearest(name, list(_table()))}")
    gpu = name != "cpu"
    measured = _calibration("cuda" if gpu else "cpu") if here else None
    if measured:
        given |= measured
    scale: float = 1
    if not gpu:
        world = max(world, 1)
        scale = cores // world if world <= cores else cores / world  # figures are of a core
        given["memory"] = given["memory"] or (_host_memory() if here else None)
    memory_bytes = None if given["memory"] is None else int(given["memory"])  # type: ignore[arg-type]
    known = {key: float(value) for key, value in given.items() if isinstance(value, (int, float))}
    return Hardware(
        name=name,
        gpu=gpu,
        memory=memory_bytes,
        runtime=int(runtime) if runtime is not None else CONTEXT + (NCCL if world > 1 else 0) if gpu else CPU_RUNTIME,
        host_memory=int(host_memory) if host_memory else _host_memory() if here else None,
        capability=known.get("capability"),
        flops={
            "bfloat16": known["bf16_flops"] * scale,
            "float16": known["bf16_flops"] * scale,
            "float32": known["fp32_flops"] * scale,
        },
        bandwidth=known["bandwidth"] * scale,
        link=_speed("link", given["link"], links),
        network=_speed("network", network, links),
        ports=ports,
        host_bandwidth=host_bandwidth,
        nvme=nvme,
        efficiency=efficiency,
        calibrated=bool(measured),
        price_per_hour=price_per_hour,
    )


def elsewhere(values: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """`hardware=auto` for the devices of a scheduler, which calls its GPUs `kind`; None: it gives none.

    UserError for a kind that the table does not have: nothing of it would be known.
    """
    table = _table()
    word = re.sub(r"[^a-z0-9]?\d+g\.\d+gb.*", "", kind, flags=re.I) if kind is not None else "cpu"
    fitting = (n for n, row in table.items() if n == word or (row.get("match") and re.search(row["match"], word, re.I)))
    name = next(fitting, None)
    if name is None:
        raise UserError(
            f"hardware=auto: SLURM does not say which GPUs these are ({kind or 'no type'}); say it: hardware=h100 "
            f"(known: {', '.join(table)})"
        )
    return {key: table[name].get(key) if value is None or key == "name" else value for key, value in values.items()}


def sliced(values: Mapping[str, Any], compute: int, gigabytes: int) -> dict[str, Any]:
    """One instance of a partitioned GPU (MIG): so many of its seven compute slices, and a part of its memory."""
    whole = values["memory"]
    memory = min(float(gigabytes) * 1e9, whole or math.inf)
    share = {"bf16_flops": compute / 7, "fp32_flops": compute / 7, "bandwidth": memory / whole if whole else 1.0}
    less = {key: part * values[key] for key, part in share.items() if values[key] is not None}
    return {**values, "memory": memory, **less}


def _speed(key: str, value: Any, links: Mapping[str, float]) -> float:
    try:
        speed = float(links.get(value, value))
    except (TypeError, ValueError):
        raise UserError(f"hardware.{key}={value}: {nearest(str(value), list(links))}; or bytes a second")
    if not speed > 0:
        raise UserError(f"hardware.{key}={value}: bytes a second, more than 0 (or one of {', '.join(links)})")
    return speed


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """Every choice of conf/hardware with the choice that it starts from; read without Hydra."""
    import yaml

    folder = resources.files("ftdist.conf") / "hardware"
    raw: dict[str, dict[str, Any]] = {}
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            raw[file.name[:-5]] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}

    def whole(name: str) -> dict[str, Any]:
        parents = [part for part in raw[name].get("defaults", ()) if part != "_self_"]
        made: dict[str, Any] = {}
        for parent in parents:
            made |= whole(parent)
        return made | {key: value for key, value in raw[name].items() if key != "defaults"}

    return {name: whole(name) for name in sorted(raw) if name not in ("default", "auto")}


def _host_memory() -> int | None:
    """Bytes of this machine, or of the control group that it runs in if that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def calibration_file() -> Path:
    """Where `ftdist doctor --calibrate` leaves what this machine can do."""
    return cache_root() / "hardware.json"


def _calibration(device: str) -> dict[str, float] | None:
    try:
        stored = json.loads(calibration_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if stored.get("device") != device:
        return None
    return {key: float(stored[key]) for key in ("bf16_flops", "fp32_flops", "bandwidth")}
