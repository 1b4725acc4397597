"""Predicted against counted bytes over strategies × engines × model families, on two CPU processes.

    python tests/bench/plan_memory.py [--out FILE] [--only TEXT] [--families llama,qwen2] [--precision true,false]

Every cell is a frozen run directory whose ranks are forked from this process (so that torch is imported once) and
run ftdist's own worker for two optimizer steps. The bytes of live tensors by kind are counted in each rank, and
compared with what the plan said before anything was loaded. The table is printed with the worst rows first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline",
}  # fmt: skip

STRATEGIES = {
    "full": [],
    "lora": [],
    "qlora": [],
    "spectrum": ["strategy.top_percent=50"],
    "spectrum-4bit": ["strategy.top_percent=50", "strategy.base_bits=4"],
    "dora": ["strategy.use_dora=true"],
}
KINDS = ("weights", "quantization", "gradients", "optimizer", "buckets", "gradients_in_backward")
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
# Sizes that divide by nothing: padding shows.
SIZES = {
    "hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma": {"head_dim": 24, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 3},
}


def make(folder: Path, family: str) -> Path:
    """A seeded model of a family with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftdist import demo

    source = demo.model(folder / "demo", 7)
    known = json.loads((source / "config.json").read_text())
    tokens = {key: known[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    directory = folder / family
    if not directory.is_dir():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family.split("-")[0], **SIZES | tokens | FAMILIES[family])
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, directory)
    return directory


def run(words: list[str], run_dir: Path) -> dict:
    """Freeze one configuration here, run its ranks in forked children; its plan with `measured`."""
    from ftdist import compose, job, launcher, rundir

    (config,) = compose.compose("train", [*words, f"run_dir={run_dir}"])
    job.ready(config)
    count = launcher.processes(**config["cluster"], here=True)
    with rundir.claimed(run_dir):
        job.freeze(config, run_dir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            zero = config["engine"]["name"].startswith("zero")
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"} if zero else {"ACCELERATE_USE_CPU": "true"}
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            from ftdist import worker

            status = 1
            try:
                status = worker.main(run_dir)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(failed):
        errors = sorted((run_dir / "logs").glob("rank-*.error.json"))
        raise RuntimeError(json.loads(errors[0].read_text())["message"] if errors else f"exit {failed}")
    job.measured(run_dir)
    return json.loads((run_dir / "plan.json").read_text())


HEAD = "| cell | " + " | ".join(kind.replace("_", " ") for kind in KINDS) + " | worst error |\n" + "|---" * 8 + "|"


def table(rows: list) -> str:
    """Predicted bytes of each kind (and counted ones where they differ), the worst row first."""
    lines = []
    for name, predicted, found in rows:
        counted = found["states"]
        cells, worst = [], 0.0
        for kind in KINDS:
            a, b = predicted.get(kind, 0), counted.get(kind, 0)
            worst = max(worst, abs(a / b - 1) if b else float(a > 0))
            cells.append(f"{a:,}" if a == b else f"{a:,} ≠ {b:,}")
        lines.append((-worst, f"| {name} | {' | '.join(cells)} | {worst:.3%} |"))
    return "\n".join(line for _, line in sorted(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--families", default="llama")
    parser.add_argument("--precision", default="true,false")
    given = parser.parse_args()

    import deepspeed  # noqa: F401  (imported before the forks)
    import peft  # noqa: F401
    import trl  # noqa: F401

    from ftdist import demo, trainer, worker  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="plan-memory-"))
    os.environ["FTDIST_CACHE"] = str(folder / "cache")
    data = folder / "chat.jsonl"
    data.write_text("\n".join(json.dumps({"messages": row["messages"]}) for row in demo.rows(7)[:60]) + "\n")
    rows = []
    for family in given.families.split(","):
        model = make(folder, family)
        for bf16 in given.precision.split(","):
            for strategy, extra in STRATEGIES.items():
                for engine in ENGINES:
                    name = f"{family} {strategy} {engine} {'bf16' if bf16 == 'true' else 'fp32'}"
                    if given.only not in name:
                        continue
                    base = {"spectrum-4bit": "spectrum", "dora": "lora"}.get(strategy, strategy)
                    words = [
                        f"model.path={model}", f"data.path={data}", f"strategy={base}", *extra, f"engine={engine}",
                        f"cluster.processes={1 if engine == 'single' else 2}", "cluster.oversubscribe=true",
                        "train.max_length=64", f"train.bf16={bf16}", "tracking=none", "train.max_steps=2",
                        "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2",
                        "train.eval_strategy=no",
                    ]  # fmt: skip
                    try:
                        plan = run(words, folder / name.replace(" ", "_"))
                    except Exception as failure:
                        print(f"{name}: {failure}", flush=True)
                        continue
                    rows.append((name, plan["states"], plan["measured"]))
                    print(table(rows[-1:]), flush=True)
    print(f"\n{HEAD}\n{table(rows)}")
    if given.out:
        given.out.write_text(table(rows) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
