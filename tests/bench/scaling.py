"""What tokens cost as work grows: tokens/s and peak memory of ftdist against sequence length, micro-batch, vocabulary
and model size. One axis at a time; everything else as in throughput.py (full fine-tuning, one process, packed rows).

    python tests/bench/scaling.py gsm8k_train.jsonl
    python tests/bench/scaling.py gsm8k_train.jsonl --axes length --length 512 2048 16384 --steps 3

Beside tokens/s stands what they mean in operations, 6·(N − N_embedding) + 12·layers·hidden·length a token (the output
head is in N): where that is constant, the cost is straight. Memory is the rank's own measured peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data_prepare import make_rows
from throughput import RATE, SIZES, make_model

AXES = {
    "length": [512, 1024, 2048, 4096],
    "micro": [1, 2, 4, 8],
    "vocabulary": [17_000, 32_000, 128_000],
    "hidden": [192, 384, 768],
}
USUAL = {"length": 1024, "micro": 1, "vocabulary": 32_000, "hidden": SIZES["hidden_size"]}
SHORT = 512  # length while micro-batches grow


def measured(folder: Path, data: Path, steps: int, length: int, micro: int, vocabulary: int, hidden: int) -> str:
    """The row of one point."""
    name = f"{length}-{micro}-{vocabulary}-{hidden}"
    model, run_dir = folder / f"model-{name}", folder / f"run-{name}"
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_attention_heads": hidden // 64}
    make_model(model, data, vocabulary, length, **sizes)
    words = (
        "strategy=full", "engine=single", "cluster.processes=1", f"model.path={model}", f"data.path={data}",
        f"train.max_length={length}", "train.packing=true", f"train.max_steps={steps}", "train.eval_strategy=no",
        f"train.learning_rate={RATE}", f"train.per_device_train_batch_size={micro}", "train.bf16=false",
        "train.gradient_checkpointing=false", "tracking=none", "checkpoint.every_minutes=null", "must_fit=false",
        f"run_dir={run_dir}",
    )  # fmt: skip
    command = [Path(sys.executable).with_name("ftdist"), "train", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FTDIST_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    rows = [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    timed = rows[1:]
    tokens = timed[-1]["tokens"] - rows[0]["tokens"]
    spent = sum((b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in zip(rows, timed, strict=False))
    plan = json.loads((run_dir / "plan.json").read_text())
    total, layers = plan["total_parameters"], SIZES["num_hidden_layers"]
    operations = 6 * (total - vocabulary * hidden) + 12 * layers * hidden * length
    peak = plan["measured"]["device_peak_bytes"]
    return (
        f"| {length:,} | {micro} | {vocabulary:,} | {total / 1e6:.1f} M | {tokens / spent:,.0f} | "
        f"{tokens / spent * operations / 1e9:,.0f} | {peak / 1e9:.2f} | {plan['device_peak_bytes'] / 1e9:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a jsonl file with question and answer; else made-up words")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--steps", type=int, default=3, help="the first one is not timed")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=values, help="points of this axis")
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps {given.steps}: at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        data = given.data.absolute() if given.data else Path(scratch, "made-up.jsonl")
        if given.data is None:
            make_rows(7500, False, None, data)
        print("| length | micro-batch | vocabulary | parameters | tokens/s | GFLOP/s | peak GB | planned GB |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|")
        for axis in given.axes:
            for value in getattr(given, axis):
                point = USUAL | ({"length": SHORT} if axis == "micro" else {}) | {axis: value}
                print(measured(Path(scratch), data, given.steps, **point), flush=True)


if __name__ == "__main__":
    main()
