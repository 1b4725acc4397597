"""What came out: base and tuned on the same held-out rows. Knows a finished run directory, not how it was launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ftdist.errors import OK, Failed, UserError


def settings(
    *,
    samples: Annotated[int, Field(ge=0)],
    max_new_tokens: Annotated[int, Field(ge=1)],
    batch_size: Annotated[int, Field(ge=1)],
    show: Annotated[int, Field(ge=0)],
) -> None:
    """The keys of `eval`."""


def evaluate(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Evaluate in a process of its own, from the files alone: what is measured is what was saved."""
    if not (run_dir / "final").is_dir():
        raise UserError(f"{run_dir}: not finished (no final/ in it); only a finished run is evaluated")
    values = [str(wanted[key]) for key in ("samples", "max_new_tokens", "batch_size", "show")]
    done = subprocess.run([sys.executable, "-m", "ftdist.evaluate.answers", str(run_dir), *values], check=False)
    if done.returncode != OK:
        raise Failed(f"the evaluation failed (exit status {done.returncode}); the run in {run_dir} is whole")
