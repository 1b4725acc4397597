"""Before training, on every node of a job: what would otherwise show as a hang, or as a wrong result, much later.

`python -m ftdist.preflight RUN WORD GPUS PORT` prints one line of JSON. The batch process reads the lines of all nodes.
`python -m ftdist.preflight RUN` as a rank: all-reduces of rising size, with the right sums.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdist import rundir
from ftdist.errors import FAILED, OK, Failed

CLOCK = 10.0  # seconds that a node's clock may be away from the first node's; the answer's way is in it
WORD = ".preflight"  # a file that every node must see, and its answers
LARGEST = 2**26  # float32 numbers in the largest all-reduce, 256 MiB


def look(run_dir: Path, word: str, gpus: int, port: int) -> dict[str, Any]:
    """What this node sees and has; the first port from `port` on that nobody uses here."""
    found: dict[str, Any] = {"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
                             "id": int(os.environ["SLURM_NODEID"])}  # fmt: skip
    try:
        read = (run_dir / WORD / "word").read_text(encoding="utf-8")
        (run_dir / WORD / f"node-{found['id']}").write_text(word, encoding="utf-8")
        found["sees"] = read == word or "an old file in it"
    except OSError as failure:
        found["sees"] = failure.strerror
    found["versions"] = versions()
    found["free"] = shutil.disk_usage(tempfile.gettempdir()).free
    found["temporary"] = tempfile.gettempdir()
    if gpus:
        import torch

        found["gpus"] = torch.cuda.device_count()
    found["port"] = next(number for number in range(port, port + 1000) if _free(number))
    found["time"] = time.time()
    return found


def _free(port: int) -> bool:
    """Whether rank 0 could listen there, as torch does: at every address of both kinds."""
    for family, anywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104  # nothing is served
        try:
            with socket.socket(family) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((anywhere, port))
        except OSError as failure:
            if failure.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # this node has no such addresses
                return False
    return True


def versions() -> dict[str, str]:
    """Of everything that the ranks compute with."""
    known = {"python": platform.python_version()}
    for package in ("ftdist", *rundir.PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[package] = importlib.metadata.version(package)
    return known


def judge(found: Sequence[Mapping[str, Any]], nodes: Sequence[str], run_dir: Path, word: str, gpus: int,
          local_disk: float) -> None:  # fmt: skip
    """Failed names the first node with something wrong, and the check. `late`: seconds of its clock beside ours.

    The first node's versions are the ones that count.
    """
    answered = {one["node"] for one in found}
    for node in nodes:
        if node not in answered:
            _wrong(node, "answer", "did not start or did not answer; can it run this interpreter?")
    first = min(found, key=lambda one: one["id"])
    for one in sorted(found, key=lambda one: one["id"]):
        node = one["node"]
        if one["sees"] is not True:
            _wrong(node, "run directory", f"cannot use {run_dir} ({one['sees']}); it must be on storage that all share")
        mine = run_dir / WORD / f"node-{one['id']}"
        if not _holds(mine, word):
            _wrong(node, "run directory", f"what it writes into {run_dir} is not seen on {first['node']}")
        for name, version in first["versions"].items():
            if (other := one["versions"].get(name)) != version:
                _wrong(node, "versions", f"{name} {other}, {version} on {first['node']}")
        if gpus and one["gpus"] < gpus:
            _wrong(node, "devices", f"torch sees {one['gpus']} of {gpus} GPUs")
        if one["free"] < local_disk * 2**30:
            _wrong(node, "local disk", f"{one['free'] / 2**30:.1f} GiB free in {one['temporary']}, "
                                       f"cluster.local_disk={local_disk}")  # fmt: skip
        if abs(one["late"]) > CLOCK:
            _wrong(node, "clock", f"{abs(one['late']):.0f} s {'behind' if one['late'] > 0 else 'ahead'}")


def _wrong(node: str, check: str, what: str) -> None:
    raise Failed(f"preflight: node {node}: {check}: {what}")


def _holds(file: Path, word: str) -> bool:
    """Network file systems show another machine's file after some seconds, at the latest when its directory is read."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # noqa: PTH208  # asks the server again
            if file.read_text(encoding="utf-8") == word:
                return True
        time.sleep(0.5)
    return False


def network(run_dir: Path, seconds: float) -> int:
    """As a rank: all-reduces until `seconds` are over; rank 0 prints the speed. FAILED, and a line, for a wrong sum."""
    import torch
    import torch.distributed as dist

    rank, world, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    began, size = time.monotonic(), 2**10
    while True:
        numbers = torch.full((size,), float(rank + 1), device=device)
        start = time.monotonic()
        dist.all_reduce(numbers)
        if gpu:
            torch.cuda.synchronize()
        took = time.monotonic() - start
        if not bool((numbers == world * (world + 1) / 2).all()):
            from ftdist.worker import fail

            fail(run_dir, f"network check: an all-reduce of {size:,} numbers gave a wrong sum")
            return FAILED
        over = torch.tensor([float(time.monotonic() - began > seconds)], device=device)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        if over.item() or size < LARGEST:
            if rank == 0:
                moved = 2 * (world - 1) / world * numbers.nbytes / took
                print(f"network check: {numbers.nbytes / 2**20:,.2f} MiB in {took * 1e3:.1f} ms, "
                      f"{moved / 1e9:.2f} GB/s a rank", flush=True)  # fmt: skip
            if over.item():
                break
            size *= 4
    dist.destroy_process_group()
    return OK


def as_rank(run_dir: Path, seconds: float) -> int:
    """`network`; what goes wrong is left as the rank's last word."""
    try:
        return network(run_dir, seconds)
    except Exception as failure:
        from ftdist.worker import fail

        traceback.print_exc()
        lines = str(failure).strip().splitlines() or [""]
        fail(run_dir, f"network check: {type(failure).__name__}: {lines[0]}")
        return FAILED


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(as_rank(Path(sys.argv[1]), float(os.environ["FTDIST_NETWORK_CHECK"])))
    os.umask(rundir.PRIVATE)
    print(json.dumps(look(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
