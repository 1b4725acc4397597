"""The SNR scan: every weight is measured once, shared by processes, machines and killed attempts.

Results go to `<cache>/spectrum/<content of the weights>/<version>/<worker>.jsonl`, a line for each tensor
with both thresholds. A scan first reads what is there, so it goes on where one was killed, and workers need
no connection but this directory: under `accelerate launch`, torchrun or srun each rank takes its share, and
rank 0 writes `snr.json` when every tensor is there.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from ftdist.errors import USAGE, UserError
from ftdist.launcher import workers
from ftdist.rundir import cache_root
from ftdist.spectrum import names, reader, work
from ftdist.spectrum.formats import dumps
from ftdist.spectrum.names import Threshold
from ftdist.spectrum.reader import Stored

_VERSION = 2  # of the numbers: a change of method must not meet old results
_METHODS = ("norm", "gram32", "gram64", "svd")  # the one of a stack is the last that any of its matrices needed
_STALL = 1800.0  # seconds without a new result from any rank before a rank stops waiting


def scan(
    *,
    model_path: str,
    revision: str | None = None,
    output: Path,
    processes: int | None,
    device: Literal["auto", "cpu", "cuda"],
    threshold: Threshold,
    group_experts: bool,
    alone: bool = False,
) -> Path:
    """Measures the weights at `model_path` and writes `output` (snr.json); returns it.

    `processes`: worker processes of each rank; on GPUs they take the devices in turn; None: as many as
    `launcher.workers` gives. `alone`: no other rank scans, although a launcher may have started some.
    Results are kept by the content of the weights: a second scan of the same weights is read from the cache.
    UserError: weights that are missing, damaged, quantised or not finite, or without a matrix.
    """
    rank, world = (0, 1) if alone else launched_as()
    here, here_on_cores = (1, 1) if alone else _ranks_here()
    cores = max(1, len(os.sched_getaffinity(0)) // here_on_cores)
    if processes is None:
        processes = workers(here, here_on_cores)
    if processes < 1:
        raise UserError(f"processes={processes}: must be at least 1")
    model_dir = reader.find(model_path, revision)
    weights = {n: t for n, t in reader.tensors(model_dir).items() if names.is_scanned(n, t.shape)}
    if not any(len(tensor.shape) > 1 for tensor in weights.values()):
        raise UserError(f"model.path={model_path}: has no 2-D weights, there is nothing to scan; give a language model")
    key = reader.content_key(reader.shards(model_dir), rank=rank, world=world)
    results = cache_root() / "spectrum" / key / f"v{_VERSION}"
    results.mkdir(parents=True, exist_ok=True)

    done = work.read_results(results)
    if world == 1:  # one rank sees everything that is missing; several would not see the same
        share = [tensor for name, tensor in weights.items() if name not in done]
        shares = assign(share, processes)
    else:
        every = assign(list(weights.values()), world * processes)
        shares = [[t for t in part if t.name not in done] for part in every[rank::world]]
    shares = [part for part in shares if part]
    if shares:
        with _progress(results, weights) if rank == 0 else _silence():
            _run(shares, results, device, max(1, cores // len(shares)))
    measured = _wait(results, weights) if world > 1 else work.read_results(results)
    text = dumps(_entries(weights, measured, threshold, group_experts))
    if rank == 0:
        reader.write_atomically(output, text)
    else:
        _until(lambda: output.is_file() and output.read_text() == text, f"rank 0 to write {output}")
    return output


def launched_as() -> tuple[int, int]:
    """(rank, number of ranks) as given by torchrun, accelerate or srun; (0, 1) without a launcher."""
    env = os.environ
    pairs = [("RANK", "WORLD_SIZE")]
    # In a batch script SLURM_PROCID is 0 and SLURM_NTASKS is set as well, but only a step of srun has tasks.
    if 0 <= int(env.get("SLURM_STEP_ID", "-1")) < 0xFFFFFF00:
        pairs.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, world in pairs:
        if rank in env and world in env:
            return int(env[rank]), int(env[world])
    return 0, 1


def cost(tensor: Stored) -> float:
    """Work, in multiplications: the Gram matrix, and slower ones (measured: 7 times) for its eigenvalues."""
    short, long = min(tensor.matrix), max(tensor.matrix)
    stack = tensor.elements // (short * long)
    return stack * (float(short) ** 2 * long + 7.0 * float(short) ** 3) + tensor.elements


def assign(tensors: list[Stored], workers: int) -> list[list[Stored]]:
    """Largest first, each to the worker that has least to do; the same for everyone who asks."""
    shares: list[list[Stored]] = [[] for _ in range(workers)]
    loads = [0.0] * workers
    for tensor in sorted(tensors, key=lambda t: (-cost(t), t.name)):
        least = loads.index(min(loads))
        shares[least].append(tensor)
        loads[least] += cost(tensor)
    return shares


def _ranks_here() -> tuple[int, int]:
    """Ranks of this machine, and how many of them share this rank's cores: one where srun binds them."""
    env, world = os.environ, launched_as()[1]
    if world == 1:
        return 1, 1
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # 4(x2),3: of the first nodes
    here = int(tasks[0]) if tasks else 1
    is_bound = len(os.sched_getaffinity(0)) < (os.cpu_count() or 1)
    return here, 1 if is_bound else here


def _run(shares: list[list[Stored]], results: Path, device: str, threads: int) -> None:
    """Each share in a process of its own, which takes its number of threads from its environment."""
    first = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) * len(shares)
    files = [results / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl" for _ in shares]
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / str(i) for i in range(len(shares))]
        running: list[subprocess.Popen[str]] = []
        try:
            for i, (share, file, error) in enumerate(zip(shares, files, errors, strict=True)):
                with error.open("w") as stream:
                    running.append(_start(work.job(share, file, device, first + i), threads, stream))
            _join(running, errors)
        finally:
            for process in running:
                process.kill()
                process.wait()


def _start(job: str, threads: int, errors: IO[str]) -> subprocess.Popen[str]:
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    process = subprocess.Popen(
        [sys.executable, "-m", "ftdist.spectrum.work"],
        stdin=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | limits,
    )
    assert process.stdin is not None
    process.stdin.write(job)
    process.stdin.close()
    return process


def _join(running: list[subprocess.Popen[str]], errors: list[Path]) -> None:
    """Waits for all; the first that fails ends the scan with its message."""
    waiting = dict(zip(running, errors, strict=True))
    while waiting:
        for process, error in list(waiting.items()):
            code = process.poll()
            if code is None:
                continue
            del waiting[process]
            said = error.read_text().strip()
            if code == USAGE:
                raise UserError(said.splitlines()[-1])
            if code:
                raise RuntimeError(f"a worker of the scan ended with status {code}: {said[-2000:]}")
        time.sleep(0.05)


def _wait(results: Path, weights: dict[str, Stored]) -> dict[str, list[dict[str, Any]]]:
    """The results of all ranks, when they are there."""
    found: dict[str, list[dict[str, Any]]] = {}

    def complete() -> bool:
        found.update(work.read_results(results))
        for name in sorted(work.not_finite(results) & weights.keys()):
            raise work.refusal(weights[name])  # as its rank has done
        return weights.keys() <= found.keys()

    _until(complete, f"the other ranks' results in {results}", progress=lambda: len(found))
    return found


def _until(ready: Any, what: str, progress: Any = lambda: 0) -> None:
    since, last = time.monotonic(), progress()
    while not ready():
        if progress() != last:
            since, last = time.monotonic(), progress()
        if time.monotonic() - since > _STALL:
            raise RuntimeError(f"scan: waited {_STALL:.0f} s for {what}; a rank is gone, or FTDIST_CACHE is not shared")
        time.sleep(0.5)


def _entries(
    weights: dict[str, Stored],
    measured: dict[str, list[dict[str, Any]]],
    threshold: Threshold,
    group_experts: bool,
) -> dict[str, dict[str, Any]]:
    """snr.json: module -> snr, type, shape, how it was found; experts in one tensor: the mean, and each."""
    entries = {}
    for name in sorted(weights, key=names.natural_order):
        module, found = names.module_name(name), measured[name]
        values = [matrix[threshold]["snr"] for matrix in found]
        entry = {
            "snr": sum(values) / len(values),
            "type": names.module_type(module, group_experts=group_experts),
            "shape": list(weights[name].shape),
            "dtype": weights[name].dtype,
            "threshold": threshold,
            "method": max((matrix["method"] for matrix in found), key=_METHODS.index),
            "error_bound": max(matrix[threshold]["error_bound"] for matrix in found),
        }
        if len(weights[name].shape) == 3:
            entry["experts"] = values
        else:
            entry["largest_singular_value"] = found[0]["largest"]
            entry["signal_values"] = found[0][threshold]["signal_values"]
        entries[module] = entry
    return entries


@contextmanager
def _silence() -> Iterator[None]:
    yield


@contextmanager
def _progress(results: Path, weights: dict[str, Stored]) -> Iterator[None]:
    """A line with the time left on stderr: live on a terminal, else every ten seconds."""
    total = sum(cost(tensor) for tensor in weights.values())
    stop = threading.Event()
    live = sys.stderr.isatty()

    def share() -> tuple[float, int]:
        done = [weights[name] for name in work.read_results(results) if name in weights]
        return sum(cost(tensor) for tensor in done) / total, len(done)

    def watch() -> None:
        start, (at_start, _) = time.monotonic(), share()
        while not stop.wait(1.0 if live else 10.0):
            part, count = share()
            line = progress_line(count, len(weights), part, at_start, time.monotonic() - start)
            print(f"\r{line:<70}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        if live:
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)


def progress_line(count: int, of: int, part: float, at_start: float, seconds: float) -> str:
    """How far the scan is: `part` of the work is done, `at_start` was found in the cache, the rest took `seconds`."""
    left = seconds / (part - at_start) * (1 - part) if part > at_start else None
    time_left = (
        "time left unknown" if left is None else f"{left:.0f} s left" if left < 100 else f"{left / 60:.0f} min left"
    )
    return f"scan: {count} of {of} weights, {part:.0%} of the work, {time_left}"
