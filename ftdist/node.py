"""One node of a job: started there by srun, it starts the node's ranks and tells what became of them.

`python -m ftdist.node RUN HEAD PORT PROCESSES MODULE`. The ranks are its children, without an agent in between: a
signal that asks for an end reaches them and kills nobody. Which node this is, is read here, inside the task.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Set
from pathlib import Path
from types import FrameType
from typing import Any

from ftdist import launcher, lease, rundir, stops
from ftdist.errors import FAILED, OK, STOPPED

TICK = 0.05  # seconds between looks at the ranks


def main(argv: list[str]) -> int:
    """OK when every rank has finished or stopped as asked: outcome.json tells which. Else the first bad status."""
    run_dir, head, port, count, module = Path(argv[0]), argv[1], int(argv[2]), int(argv[3]), argv[4]
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    sent: set[int] = set()

    def pass_on(number: int, _: FrameType | None) -> None:
        sent.add(number)
        for rank in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    (run_dir / "logs").mkdir(exist_ok=True)
    for local in range(count):
        rank, variables = node * count + local, environment(count)
        if count * nodes == 1:
            deepspeed = (run_dir / "deepspeed.json").exists()
            variables |= launcher.told_alone(variables, deepspeed, launcher.devices()[1] == "GPU")
        else:
            variables |= place(rank, local, count, nodes, node, head, port)
        ranks[rank] = subprocess.Popen(
            [sys.executable, "-m", module, str(run_dir)], env=variables, preexec_fn=launcher.end_with_parent
        )
    return wait(ranks, run_dir, float(os.environ["FTDIST_GRACE"]), sent)


def environment(count: int) -> dict[str, str]:
    """Variables of a rank that do not depend on which one it is."""
    variables = dict(os.environ)
    variables.setdefault("OMP_NUM_THREADS", str(max(1, launcher.cores() // count)))
    variables["TOKENIZERS_PARALLELISM"] = "false"
    variables.setdefault(stops.STARTED, str(time.time()))
    if launcher.devices()[1] != "GPU":
        variables.setdefault("DS_ACCELERATOR", "cpu")
    return variables


def place(rank: int, local: int, count: int, nodes: int, node: int, head: str, port: int) -> dict[str, str]:
    """What torch reads to find the others."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(count * nodes),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(port),
    }


def wait(ranks: dict[int, subprocess.Popen[bytes]], run_dir: Path, grace: float, sent: Set[int]) -> int:
    """Until all have ended; once one has failed, the others have `grace` seconds to say why they fail too.

    sent: signals that ask for an end, as they come. A rank that could not listen to them yet, and dies of one, has
    stopped as asked.
    """
    failed: float | None = None
    bad, over = OK, False
    while any(rank.returncode is None for rank in ranks.values()):
        time.sleep(TICK)
        for number, rank in ranks.items():
            if rank.returncode is None and (status := rank.poll()) not in (None, OK, STOPPED):
                assert status is not None
                if not over:
                    if -status not in sent:
                        bad = bad or (status if status > 0 else FAILED)
                    _speak_for(number, status, run_dir, -status in sent)
                failed = failed or time.monotonic()
        if failed is not None and time.monotonic() - failed > grace:
            over = True
            for rank in ranks.values():
                if rank.returncode is None:
                    rank.kill()
    return bad


def _speak_for(rank: int, status: int, run_dir: Path, asked: bool) -> None:
    """The last word of a rank that could not say it itself. asked: it was sent the signal that it died of."""
    file = run_dir / "logs" / f"rank-{rank}.error.json"
    if file.exists() and status > 0:
        return
    memory = " (out of memory?)" if status == -signal.SIGKILL else ""
    message = f"killed by signal {-status}{memory}" if status < 0 else f"ended with status {status} and no word"
    name = stops.SIGNALS[signal.Signals(-status)] if asked else None
    if asked:
        message = f"stopped ({name}) before it could listen"
    report: dict[str, Any] = {"rank": rank, "time": time.time(), "message": message,
                              "status": STOPPED if asked else FAILED, "signal": name,
                              "log": str(file.with_name(f"rank-{rank}.log")), "killed": status == -signal.SIGKILL,
                              "node": os.environ.get("SLURMD_NODENAME"),
                              "lease": os.environ.get(lease.VARIABLE)}  # fmt: skip
    with contextlib.suppress(OSError):
        rundir.write_json(file, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
