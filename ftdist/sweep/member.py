"""The process of one member: python -m ftdist.sweep.member SWEEP NAME. Starts its run or goes on with it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from ftdist import cli, job, resume, stops
from ftdist.errors import FAILED, INTERRUPTED, OK, USAGE, Failed, UserError
from ftdist.sweep import directory, local


def main(sweep_dir: Path, name: str) -> int:
    """The member's exit status, which its state has too."""
    began_all = os.environ.get(stops.STARTED)
    cli.private_and_stoppable()
    if began_all:  # train_until is counted from the beginning of the sweep
        os.environ[stops.STARTED] = began_all
    asked, began = directory.read(sweep_dir), time.time()
    (own,) = (entry["words"] for entry in asked["members"] if entry["name"] == name)
    sys.argv = [
        "ftdist",
        "train",
        *asked["words"],
        *own,
        *asked["later"],
    ]  # what env.json tells as the way to make this run again
    directory.mark(sweep_dir, name, state=directory.RUNNING, reason=None)
    status, reason = OK, None
    try:
        go(directory.config(sweep_dir, name), sweep_dir / name)
    except UserError as failure:
        status, reason = USAGE, str(failure)
    except Failed as failure:
        status, reason = failure.status, str(failure)
    except KeyboardInterrupt:
        status, reason = INTERRUPTED, "interrupted"
    except Exception as failure:
        traceback.print_exc()
        status, reason = FAILED, f"{type(failure).__name__}: {failure}"
    if reason:
        print(f"ftdist: {name}: {reason}", file=sys.stderr, flush=True)
    directory.ended(sweep_dir, name, status, reason, time.time() - began)
    return status


def go(config: dict[str, object], run_dir: Path) -> None:
    """Start the run, or go on with it where it has begun."""
    if resume.begun(run_dir, config):
        resume.resume(run_dir, config)
    else:
        job.run(config, run_dir)


if __name__ == "__main__":
    with local.present(Path(sys.argv[1])):
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
