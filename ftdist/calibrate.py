"""What the processor or GPU of this machine can do, measured once; plans for this machine read it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ftdist import rundir
from ftdist.plan.hardware import calibration_file

ROUNDS = 5  # the median of so many


def run() -> str:
    """Measure products of matrices and the memory's speed on one core or GPU; plans for this machine read the file."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 768
    torch.set_num_threads(1)
    found = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
        short = {"float32": "fp32", "bfloat16": "bf16"}[name]
        found[f"{short}_flops"] = 2 * size**3 / _median(lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]  # bound now, not at the call
    block = torch.ones((1 << 28) if device == "cuda" else (1 << 24), device=device)
    found["bandwidth"] = 2 * 4 * block.numel() / _median(lambda: block.mul_(1.0))
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(file, found | {"device": device})
    figures = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    return f"measured   {figures} (one {'GPU' if device == 'cuda' else 'core'}); plans for this machine use it: {file}"


def _median(work: Callable[[], object]) -> float:
    import torch

    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[ROUNDS // 2]  # the first one warms up
