"""Training side by side on one machine: a bare PyTorch loop, ftdist, and TRL's command line, each in fresh processes.

    python tests/bench/throughput.py                                    (make bench)
    python tests/bench/throughput.py gsm8k_train.jsonl
    python tests/bench/throughput.py gsm8k_train.jsonl --strategies full --rounds 1 --steps 12

The same random Llama (35 M parameters, vocabulary 32,000), the same question/answer file, 1,024 tokens, the same tokens
a step. The bare loop trains the rows of ftdist's run in the same order: full logits, fused AdamW, clipping, nothing
else. Contenders take turns, `--rounds` times. Reported: real (unpadded) tokens per second after the first steps, peak
memory (private and anonymous, over the process tree), seconds from the command to the first step; the median, its
spread, and the ratio to the bare loop. A run whose losses differ from the bare loop's does not count, and is said.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from data_prepare import anonymous_bytes, make_rows, make_tokenizer

LENGTH = 1024
RATE = 1e-4
WARM = 4  # steps that are not timed: caches, allocators, compiled kernels
SAME = 2e-3  # of a loss, relative: one sums in another order
STRATEGIES = {
    "full": ("strategy=full",),
    "lora": ("strategy=lora", "strategy.dropout=0"),
    "qlora": ("strategy=qlora", "strategy.dropout=0"),
    "spectrum": ("strategy=spectrum", "strategy.top_percent=25"),
}


@dataclass
class Ran:
    """One run of one contender."""

    tokens_per_second: float
    peak_bytes: int
    first_step: float  # seconds from the command
    losses: list[float] = field(default_factory=list)


def make_model(folder: Path, data: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_tokenizer(data, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(
        vocab_size=32_000, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


# --- the limit: nothing but the mathematics -------------------------------------------------------------------------


def bare(run_dir: Path) -> None:
    """Train the rows of a finished run again, and print what its metrics.jsonl has."""
    import datasets
    import torch
    import yaml

    from ftdist import models, schema
    from ftdist.plan.shapes import model_shapes
    from ftdist.sampler import FILLER, StepSampler
    from ftdist.strategies import Base, find

    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    plan = json.loads((run_dir / "plan.json").read_text())
    train = config["train"]
    shapes = model_shapes(config["model"]["path"], None).architecture.parameters
    strategy = find(config["strategy"]["name"])
    recipe = strategy(
        Base(shapes, plan["precision"], plan["storage"], measured=True), **schema.pick(strategy, config["strategy"])
    )
    torch.manual_seed(config["seed"])
    model = models.load(
        **schema.pick(models.load, config["model"]), quantization=recipe.quantization, loaded_dtype=plan["loaded"]
    )
    model = models.apply(model, recipe, trained_dtype=plan["trained"])
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train["learning_rate"], weight_decay=0.0, fused=True)
    rows = datasets.load_from_disk(str(Path(plan["prepared"]) / "train"))
    sampler = StepSampler(
        len(rows), micro_batch=train["per_device_train_batch_size"], accumulation=train["gradient_accumulation_steps"],
        rank=0, world=1, seed=config["seed"], drop_last=False,
    )  # fmt: skip
    step, tokens = 0, 0
    micro = iter(sampler)
    while step < train["max_steps"]:
        batches = [[i for i in next(micro) if i != FILLER] for _ in range(train["gradient_accumulation_steps"])]
        made = [tensors(rows[i] for i in batch) for batch in batches if batch]
        count = sum(int((labels != -100).sum()) for _, labels, _ in made)
        total = 0.0
        for ids, labels, positions in made:
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(train["bf16"])):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / count).backward()
            total += float(loss)
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(trained, train["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(json.dumps({"step": step, "loss": total / count, "tokens": tokens}), flush=True)


def tensors(rows: Any) -> tuple[Any, Any, Any]:
    """ids, labels shifted by one, positions that begin anew with every packed sequence: (1, L) each."""
    import torch

    (row,) = rows
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([[*row["labels"][1:], -100]])
    positions = torch.cat([torch.arange(length) for length in row["lengths"]])[None]
    return ids, labels, positions


# --- runs -----------------------------------------------------------------------------------------------------------


def watched(command: list[str], run_dir: Path | None, cwd: Path) -> Ran:
    """Run it; its steps are read from `run_dir`/metrics.jsonl, or from its output."""
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
                   "CUDA_VISIBLE_DEVICES": "", "FTDIST_CACHE": str(cwd / "cache"), "PYTHONUNBUFFERED": "1"}  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd
    )
    steps: list[tuple[float, dict[str, Any]]] = []
    said: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := step_of(line):
                steps.append((time.monotonic(), found))

    reader = threading.Thread(target=read)
    reader.start()
    peak, metrics = 0, run_dir / "metrics.jsonl" if run_dir else None
    first = None
    while process.poll() is None:
        if metrics and first is None and metrics.exists() and b'"loss"' in metrics.read_bytes():
            first = time.monotonic()
        try:
            tree = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(map(anonymous_bytes, tree)))
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        sys.exit("".join(said[-30:]) + f"\n{command} ended with status {process.returncode}")
    if metrics:
        rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
        timed = [row for row in rows if row["step"] > WARM]
        spent = sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"]
                    for before, row in zip(rows[WARM - 1 :], timed, strict=False))  # fmt: skip
        rate = (timed[-1]["tokens"] - rows[WARM - 1]["tokens"]) / spent
        return Ran(rate, peak, (first or time.monotonic()) - began, [row["loss"] for row in rows])
    (start, before), (end, after) = steps[WARM - 1], steps[-1]
    return Ran((after["tokens"] - before["tokens"]) / (end - start), peak, steps[0][0] - began,
               [step["loss"] for _, step in steps])  # fmt: skip


def step_of(line: str) -> dict[str, Any] | None:
    """{loss, tokens} of a line that the bare loop or TRL's command line has printed for a step."""
    found = re.search(r"\{.*'loss'.*\}", line)
    if line.startswith('{"step"'):
        own: dict[str, Any] = json.loads(line)
        return own
    if found and "train_runtime" not in line:
        row = ast.literal_eval(found[0])
        return {"loss": float(row["loss"]), "tokens": float(row["num_tokens"])}
    return None


class Bench:
    """A folder with a model and data, and what is run in it."""

    def __init__(self, folder: Path, data: Path, steps: int, rows_a_step: int, bf16: bool) -> None:
        self.folder, self.data, self.steps, self.rows, self.bf16 = folder, data, steps, rows_a_step, bf16
        self.number = 0
        make_model(folder / "model", data)
        (folder / "trl").mkdir()
        with data.open() as lines, (folder / "trl" / "train.jsonl").open("w") as file:
            for row in map(json.loads, lines):
                chat = {"prompt": [{"role": "user", "content": row["question"]}],
                        "completion": [{"role": "assistant", "content": row["answer"]}]}  # fmt: skip
                file.write(json.dumps(chat) + "\n")
        self.run_dirs: dict[str, Path] = {}

    def ours(self, strategy: str, engine: str = "single", processes: int = 1) -> Ran:
        self.number += 1
        run_dir = self.folder / f"run-{self.number}"
        words = (
            *STRATEGIES[strategy], f"engine={engine}", f"cluster.processes={processes}", "cluster.oversubscribe=true",
            f"model.path={self.folder / 'model'}", f"data.path={self.data}", f"train.max_length={LENGTH}",
            "train.packing=true", f"train.max_steps={self.steps}", "train.logging_steps=1", "train.eval_strategy=no",
            f"train.learning_rate={RATE}", "train.lr_scheduler_type=constant", "train.warmup_steps=0",
            "train.weight_decay=0", "train.per_device_train_batch_size=1",
            f"train.gradient_accumulation_steps={self.rows // processes}", f"train.bf16={str(self.bf16).lower()}",
            "train.gradient_checkpointing=false", "tracking=none", "checkpoint.every_minutes=null",
            f"run_dir={run_dir}", "must_fit=false",
        )  # fmt: skip
        ran = watched([str(Path(sys.executable).with_name("ftdist")), "train", *words], run_dir, self.folder)
        self.run_dirs[strategy] = run_dir
        return ran

    def bare(self, strategy: str) -> Ran:
        command = [sys.executable, __file__, str(self.data), "--bare", str(self.run_dirs[strategy])]
        return watched(command, None, self.folder)

    def trl(self, best: bool) -> Ran:
        self.number += 1
        flags = ["--model_name_or_path", self.folder / "model", "--dataset_name", self.folder / "trl",
                 "--output_dir", self.folder / f"trl-{self.number}", "--max_steps", self.steps, "--logging_steps", 1,
                 "--learning_rate", RATE, "--report_to", "none", "--save_strategy", "no", "--use_cpu",
                 "--max_length", LENGTH]  # fmt: skip
        if best:
            flags += ["--packing", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", self.rows,
                      "--gradient_checkpointing", "false", "--bf16", str(self.bf16).lower()]  # fmt: skip
        command = [Path(sys.executable).with_name("trl"), "sft", *flags]
        return watched([str(word) for word in command], None, self.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a jsonl file with question and answer; else made-up words")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--engines", nargs="*", default=["ddp", "zero2", "zero3"], help="under 2 processes, full")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(given.bare)
        return
    found: dict[str, list[Ran]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if given.data is None:
            given.data = Path(scratch, "made-up.jsonl")
            make_rows(7500, False, None, given.data)
        bench = Bench(Path(scratch), given.data.absolute(), given.steps, given.rows, given.bf16)
        contenders: list[tuple[str, Any]] = []
        for strategy in given.strategies:
            contenders += [(f"{strategy}: ftdist", lambda s=strategy: bench.ours(s)),
                           (f"{strategy}: bare loop", lambda s=strategy: bench.bare(s))]  # fmt: skip
        if not given.no_trl:
            contenders += [("full: trl as it comes", lambda: bench.trl(False)), ("full: trl at best",
                            lambda: bench.trl(True))]  # fmt: skip
        contenders += [(f"full, 2 × {engine}: ftdist", lambda e=engine: bench.ours("full", e, 2))
                       for engine in given.engines]  # fmt: skip
        for turn in range(given.rounds):
            for name, go in contenders:
                ran = go()
                found.setdefault(name, []).append(ran)
                print(f"round {turn + 1} {name}: {ran.tokens_per_second:.0f} tokens/s", file=sys.stderr, flush=True)
    report(found)


def report(found: dict[str, list[Ran]]) -> None:
    """A Markdown table, and what does not count."""
    print("| contender | tokens/s | of the bare loop | peak memory GB | of the bare loop | first step s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, runs in found.items():
        strategy = re.split("[:,]", name)[0]
        limit = found.get(f"{strategy}: bare loop", runs)
        rates, bounds = [[r.tokens_per_second for r in rs] for rs in (runs, limit)]
        rate, bound = statistics.median(rates), statistics.median(bounds)
        peak, least = (statistics.median(r.peak_bytes for r in rs) for rs in (runs, limit))
        first = statistics.median(r.first_step for r in runs)
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        print(f"| {name} | {rate:,.0f} {spread} | {rate / bound:.2f} | {peak / 1e9:.2f} | {peak / least:.2f} "
              f"| {first:.1f} |")  # fmt: skip
        if name.endswith("ftdist") and limit is not runs:
            worst = max(abs(a - b) / b for a, b in zip(runs[0].losses, limit[0].losses, strict=False))
            if worst > SAME:
                print(f"  does not count: its losses differ from the bare loop's by up to {worst:.1%}")


if __name__ == "__main__":
    main()
