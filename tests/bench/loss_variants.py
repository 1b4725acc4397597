"""Output head and cross-entropy, forward and backward: the full logits, chunks that are computed twice, and ftdist's
fused chunks, for several sizes of a chunk. In turns, each in this process; seconds and the bytes that it adds at most.

    python tests/bench/loss_variants.py
    python tests/bench/loss_variants.py --tokens 4096 --vocabulary 128256 --hidden 1024 --bf16 --frozen

Reported: the median of the rounds, and its ratio to the full logits. A variant whose gradient differs is said.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from ftdist import loss
from ftdist.measure import _peak, _reset, _used

SIZES = (64, 128, 256, 512, 1024, 2048)  # tokens of a chunk


def full(hidden: Any, weight: Any, targets: Any) -> Any:
    return cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")


def recomputed(size: int) -> Any:
    def chunks(hidden: Any, weight: Any, targets: Any) -> Any:
        parts = range(0, len(hidden), size)
        return sum(
            checkpoint(full, hidden[i : i + size], weight, targets[i : i + size], use_reentrant=False) for i in parts
        )

    return chunks


def fused(size: int) -> Any:
    def chunks(hidden: Any, weight: Any, targets: Any) -> Any:
        loss.CHUNK_BYTES = size * 4 * weight.shape[0]
        return loss.FusedLinearCrossEntropy.apply(hidden, weight, None, targets, 0.0, "nll")

    return chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient, as with adapters")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(given.tokens, given.hidden, device=device, requires_grad=True)
    weight = torch.randn(given.vocabulary, given.hidden, device=device) / given.hidden**0.5
    weight.requires_grad_(not given.frozen)
    targets = torch.randint(given.vocabulary, (given.tokens,), device=device)
    sizes = [size for size in SIZES if size <= given.tokens]
    variants = {"full logits": full}
    variants |= {f"computed twice, {size}": recomputed(size) for size in sizes}
    variants |= {f"fused, {size}": fused(size) for size in sizes}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    gradients: dict[str, Any] = {}
    for _ in range(given.rounds + 1):  # the first round warms up
        for name, variant in variants.items():
            hidden.grad = weight.grad = None
            before, began = _used(), time.perf_counter()
            _reset()
            with torch.autocast(device, torch.bfloat16, enabled=given.bf16):
                found = variant(hidden, weight, targets)
            found.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            peaks[name] = _peak() - before
            gradients[name] = hidden.grad
    print(f"{given.tokens} tokens, vocabulary {given.vocabulary:,}, hidden {given.hidden}, "
          f"{'bfloat16' if given.bf16 else 'float32'}, head {'frozen' if given.frozen else 'trained'}, {device}, "
          f"{torch.get_num_threads()} threads, n = {given.rounds}")  # fmt: skip
    print("| variant | ms | of full | added MB |\n|---|---:|---:|---:|")
    limit = statistics.median(seconds["full logits"][1:])
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"| {name} | {median * 1000:.0f} | {median / limit:.2f} | {peaks[name] / 1e6:.0f} |")
        if not torch.allclose(gradients[name], gradients["full logits"], rtol=0.05, atol=0.02):
            print("  differs")


if __name__ == "__main__":
    main()
