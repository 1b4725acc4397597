"""Is it the trained model? Logits of the training engine, of the saved run, and of what was exported.

Three comparisons make the chain: the engine's own logits, written down at the end of training, against `final/`
loaded as it was trained; `final/` in float32 against the exported files in plain transformers; and, for a merged
adapter, PEFT's own merge, rounded as ours was, against ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ftdist.errors import Failed

TOKENS = 64  # of the probe
FILE = "parity.safetensors"
# Largest difference of a logit, in standard deviations of the logits. 16 bits keep 8 (bfloat16) or 11 bits of a number.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.35, "float16": 0.15}
SAME_MERGE = 0.05  # two merges rounded alike differ where a sum fell on the edge between two numbers


def record(trainer: Any, run_dir: Path, main: bool) -> None:
    """Write down the trained engine's logits on one sequence. Every rank must call; `main` writes."""
    from safetensors.torch import save_file

    rows = trainer.eval_dataset if len(trainer.eval_dataset) else trainer.train_dataset
    row = rows[0]
    import torch

    ids = torch.as_tensor(row["input_ids"][: min(row["lengths"][0], TOKENS)])[None]
    logits = trainer.logits(ids)[0]
    if main:
        save_file({"input_ids": ids, "logits": logits.float().cpu().contiguous()}, run_dir / FILE)


def difference(reference: Any, other: Any) -> dict[str, float]:
    """How far logits (L, V) are from the reference's: largest difference (also in standard deviations of the
    reference's logits), mean and largest KL divergence in nats a token, share of tokens with the same best token."""
    import torch

    shared = min(reference.shape[-1], other.shape[-1])  # a vocabulary may be padded
    a, b = reference[..., :shared].double(), other[..., :shared].double()
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    gap = (a - b).abs().max()
    return {
        "max_difference": float(gap),
        "max_difference_in_deviations": float(gap / a.std().clamp(min=1e-12)),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_best_token": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        "finite": bool(torch.isfinite(a).all() and torch.isfinite(b).all()),
    }


def logits_of(model: Any, ids: Any) -> Any:
    """Logits (L, V) on the CPU in float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu()


def reloaded(directory: Path, ids: Any, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Logits and a short answer of an exported directory, from a clean process with plain transformers."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        given, output = Path(scratch, "in.safetensors"), Path(scratch, "out.safetensors")
        save_file({"input_ids": ids}, given)
        script = Path(__file__).with_name("reload.py")
        words = [str(directory), "float32", str(given), str(output)]
        flags = ["--trust-remote-code"] if trust_remote_code else []
        done = subprocess.run(
            [sys.executable, "-I", str(script), *words, *flags], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Failed(f"export: plain transformers cannot load what was written ({last}); nothing was exported")
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return load_file(output)["logits"], answer


def fails(found: dict[str, float], tolerance: float) -> bool:
    """Over the tolerance: of single logits, or of the distribution (its square, in nats a token)."""
    return not found["finite"] or not (
        found["max_difference_in_deviations"] <= tolerance and found["kl_mean"] <= tolerance**2
    )
