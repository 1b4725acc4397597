"""Training side by side on one machine: a bare PyTorch loop, ftdist, and TRL's command line, each in fresh processes.

    python tests/bench/throughput.py                                       (make bench: every cell, three turns)
    python tests/bench/throughput.py gsm8k_train.jsonl --cells full/single spectrum/single --no-trl
    python tests/bench/throughput.py --cells full/zero2 --rounds 1 --keep turns.jsonl
    python tests/bench/throughput.py --table turns.jsonl                   what several calls have kept, as one table

The same random Llama (35 M parameters, vocabulary 32,000), the same question/answer file, rows of 1,024 tokens, the
same tokens a step, learning rate and precision. The bare loop trains the rows of ftdist's run in the same order: full
logits, fused AdamW, clipping, nothing else; under two processes it is wrapped in DistributedDataParallel, and is the
limit of every engine. TRL runs `trl sft` as it comes (padded, micro-batch 8, recomputation, its own precision) and at
its best (packed, no recomputation, precision and tokens of a step as the others'). Contenders take turns.

Reported: real (unpadded) tokens per second after the first steps, peak memory (private and anonymous, summed over the
process tree), seconds from the command to the first step; the median, its spread, and ratios to the bare loop of the
same cell. Losses are compared with the bare loop's step by step; a run that differs does not count, and is said.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from data_prepare import anonymous_bytes, make_rows, make_tokenizer

LENGTH = 1024
RATE = 1e-4
WARM = 2  # steps that are not timed: caches, allocators, compiled kernels
PADDED = 5  # steps of TRL as it comes, which takes eight rows each
SAME = 2e-3  # of a loss, relative: one sums in another order
STRATEGIES = {
    "full": ("strategy=full",),
    "lora": ("strategy=lora", "strategy.dropout=0"),
    "qlora": ("strategy=qlora", "strategy.dropout=0"),
    "spectrum": ("strategy=spectrum", "strategy.top_percent=25"),
}
TRL = {  # what makes `trl sft` do the same
    "full": (),
    "lora": ("--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"),
    "qlora": ("--use_peft", "--load_in_4bit", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"),
}
CELLS = (
    *("full/single", "spectrum/single", "lora/single", "qlora/single"),
    *("full/ddp", "full/zero2", "full/zero3", "lora/zero2", "qlora/zero3", "spectrum/zero2", "spectrum/zero3"),
)
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")


@dataclass
class Ran:
    """One run of one contender."""

    cell: str
    contender: str
    tokens_per_second: float
    peak_bytes: int
    first_step: float  # seconds from the command
    losses: list[float]


def make_model(folder: Path, data: Path, vocabulary: int = 32_000, length: int = LENGTH, **sizes: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_tokenizer(data, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=length, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        **(SIZES | sizes),
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
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(config["seed"])
    loaded = "float32" if recipe.peft is None and recipe.trainable is None else plan["precision"]
    model = models.load(
        **schema.pick(models.load, config["model"]), quantization=recipe.quantization, loaded_dtype=loaded
    )
    model = models.apply(model, recipe, trained_dtype="float32")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train["learning_rate"], weight_decay=0.0, fused=True)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    rows = datasets.load_from_disk(str(Path(plan["prepared"]) / "train"))
    sampler = StepSampler(
        len(rows), micro_batch=train["per_device_train_batch_size"], accumulation=train["gradient_accumulation_steps"],
        rank=rank, world=world, seed=config["seed"], drop_last=False,
    )  # fmt: skip
    step, tokens = 0, 0
    micro = iter(sampler)
    while step < train["max_steps"]:
        batches = [[i for i in next(micro) if i != FILLER] for _ in range(train["gradient_accumulation_steps"])]
        made = [tensors(rows[i] for i in batch) for batch in batches if batch]
        count, own = summed(sum(int((labels != -100).sum()) for _, labels, _ in made), world), 0
        total = 0.0
        for ids, labels, positions in made:
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(train["bf16"])):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / count * world).backward()
            total += float(loss.detach())
            own += ids.numel()
        torch.nn.utils.clip_grad_norm_(trained, train["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens, total = tokens + summed(own, world), summed(total, world)
        if rank == 0:
            print(json.dumps({"step": step, "loss": total / count, "tokens": tokens}), flush=True)


def summed(value: float, world: int) -> Any:
    """Over the processes."""
    import torch

    if world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item()


def tensors(rows: Any) -> tuple[Any, Any, Any]:
    """ids, labels shifted by one, positions that begin anew with every packed sequence: (1, L) each."""
    import torch

    (row,) = rows
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([[*row["labels"][1:], -100]])
    positions = torch.cat([torch.arange(length) for length in row["lengths"]])[None]
    return ids, labels, positions


# --- runs -----------------------------------------------------------------------------------------------------------


def watched(cell: str, contender: str, command: list[str], run_dir: Path | None, cwd: Path) -> Ran:
    """Run it; its steps are read from `run_dir`/metrics.jsonl, or from its output."""
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
                   "CUDA_VISIBLE_DEVICES": "", "FTDIST_CACHE": str(cwd / "cache"), "PYTHONUNBUFFERED": "1",
                   "DS_ACCELERATOR": "cpu"}  # fmt: skip
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
    if process.wait():
        sys.exit("".join(said[-30:]) + f"\n{' '.join(command)} ended with status {process.returncode}")
    if metrics:
        rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
        timed = [row for row in rows if row["step"] > WARM]
        spent = sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"]
                    for before, row in zip(rows[WARM - 1 :], timed, strict=False))  # fmt: skip
        rate = (timed[-1]["tokens"] - rows[WARM - 1]["tokens"]) / spent
        return Ran(cell, contender, rate, peak, (first or time.monotonic()) - began, [row["loss"] for row in rows])
    if len(steps) <= WARM:
        sys.exit("".join(said[-30:]) + f"\n{' '.join(command)}: {len(steps)} steps in its output")
    (start, before), (end, after) = steps[WARM - 1], steps[-1]
    rate = (after["tokens"] - before["tokens"]) / (end - start)
    return Ran(cell, contender, rate, peak, steps[0][0] - began, [step["loss"] for _, step in steps])


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
        self.run_dirs: dict[str, Path] = {}  # of ftdist's last run in each cell
        make_model(folder / "model", data)
        (folder / "trl").mkdir()
        with data.open() as lines, (folder / "trl" / "train.jsonl").open("w") as file:
            for row in map(json.loads, lines):
                chat = {"prompt": [{"role": "user", "content": row["question"]}],
                        "completion": [{"role": "assistant", "content": row["answer"]}]}  # fmt: skip
                file.write(json.dumps(chat) + "\n")
        command = ["data", *self._words("full"), f"run_dir={folder / 'unused'}"]  # no run's start has it in its time
        subprocess.run(
            [Path(sys.executable).with_name("ftdist"), *command], check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "FTDIST_CACHE": str(folder / "cache")},
        )  # fmt: skip

    def _words(self, strategy: str) -> tuple[str, ...]:
        return (*STRATEGIES[strategy], f"model.path={self.folder / 'model'}", f"data.path={self.data}",
                f"train.max_length={LENGTH}", "train.packing=true")  # fmt: skip

    def ours(self, cell: str) -> Ran:
        self.number += 1
        strategy, engine = cell.split("/")
        processes = 1 if engine == "single" else 2
        run_dir = self.folder / f"run-{self.number}"
        words = (
            *self._words(strategy), f"engine={engine}", f"cluster.processes={processes}", "cluster.oversubscribe=true",
            f"train.max_steps={self.steps}", "train.logging_steps=1", "train.eval_strategy=no",
            f"train.learning_rate={RATE}", "train.lr_scheduler_type=constant", "train.warmup_steps=0",
            "train.weight_decay=0", "train.per_device_train_batch_size=1",
            f"train.gradient_accumulation_steps={self.rows // processes}", f"train.bf16={str(self.bf16).lower()}",
            "train.gradient_checkpointing=false", "tracking=none", "checkpoint.every_minutes=null",
            f"run_dir={run_dir}", "must_fit=false",
        )  # fmt: skip
        command = [str(Path(sys.executable).with_name("ftdist")), "train", *words]
        ran = watched(cell, "ftdist", command, run_dir, self.folder)
        self.run_dirs[cell] = run_dir
        return ran

    def bare(self, cell: str) -> Ran:
        command = [__file__, str(self.data), "--bare", str(self.run_dirs[cell])]
        if not cell.endswith("/single"):
            command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", *command]
        return watched(cell, "bare loop", [sys.executable, *command], None, self.folder)

    def trl(self, cell: str, best: bool) -> Ran:
        self.number += 1
        steps = self.steps if best else min(self.steps, PADDED)
        flags = ["--model_name_or_path", self.folder / "model", "--dataset_name", self.folder / "trl",
                 "--output_dir", self.folder / f"trl-{self.number}", "--max_steps", steps, "--logging_steps", 1,
                 "--learning_rate", RATE, "--report_to", "none", "--save_strategy", "no", "--use_cpu",
                 "--max_length", LENGTH, *TRL[cell.split("/")[0]]]  # fmt: skip
        if best:
            flags += ["--packing", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", self.rows,
                      "--gradient_checkpointing", "false", "--bf16", str(self.bf16).lower()]  # fmt: skip
        command = [str(word) for word in (Path(sys.executable).with_name("trl"), "sft", *flags)]
        return watched(cell, "TRL at best" if best else "TRL as it comes", command, None, self.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a jsonl file with question and answer; else made-up words")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help=f"STRATEGY/ENGINE; usually {' '.join(CELLS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--trl", nargs="*", default=["full/single"], help="cells that TRL runs too")
    parser.add_argument("--keep", type=Path, help="a file to which every run is added, a JSON line each")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(given.bare)
        return
    if given.table:
        report([Ran(**json.loads(line)) for line in given.table.read_text().splitlines()])
        return
    for cell in given.cells:
        if not re.fullmatch(f"({'|'.join(STRATEGIES)})/(single|ddp|zero[123])", cell):
            parser.error(f"--cells {cell}: STRATEGY/ENGINE, as {CELLS[0]}")
    if given.steps <= WARM:
        parser.error(f"--steps {given.steps}: more than {WARM} are needed")
    found: list[Ran] = []
    with tempfile.TemporaryDirectory() as scratch:
        if given.data is None:
            given.data = Path(scratch, "made-up.jsonl")
            make_rows(7500, False, None, given.data)
        bench = Bench(Path(scratch), given.data.absolute(), given.steps, given.rows, given.bf16)
        for turn in range(given.rounds):
            for cell in given.cells:
                contenders: list[Callable[[], Ran]] = [lambda c=cell: bench.ours(c), lambda c=cell: bench.bare(c)]
                if cell in given.trl and not given.no_trl:
                    contenders += [lambda c=cell: bench.trl(c, True), lambda c=cell: bench.trl(c, False)]
                for go in contenders:
                    ran = go()
                    found.append(ran)
                    print(f"round {turn + 1} {cell} {ran.contender}: {ran.tokens_per_second:.0f} tokens/s, first step "
                          f"{ran.first_step:.1f} s", file=sys.stderr, flush=True)  # fmt: skip
                    if given.keep:
                        with given.keep.open("a") as file:
                            file.write(json.dumps(asdict(ran)) + "\n")
    report(found)


def report(found: list[Ran]) -> None:
    """A Markdown table: medians, spread, ratios to the bare loop of the same cell, what does not count."""
    by: dict[tuple[str, str], list[Ran]] = {}
    for ran in found:
        by.setdefault((ran.cell, ran.contender), []).append(ran)
    print("| cell | contender | n | tokens/s | of bare | peak GB | of bare | first step s | losses |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for (cell, contender), runs in by.items():
        limit = by.get((cell, "bare loop"), [])
        rates = [run.tokens_per_second for run in runs]
        rate, peak = statistics.median(rates), statistics.median(run.peak_bytes for run in runs)
        of_rate = of_peak = losses = ""
        if limit and contender != "bare loop":
            of_rate = f"{rate / statistics.median(run.tokens_per_second for run in limit):.2f}"
            of_peak = f"{peak / statistics.median(run.peak_bytes for run in limit):.2f}"
        if limit and contender == "ftdist":
            pairs = zip(runs[0].losses, limit[0].losses, strict=True)
            worst = max(abs(a - b) / b for a, b in pairs)
            losses = f"within {worst:.1e}" if worst <= SAME else f"**differ by {worst:.1%}: does not count**"
        first = statistics.median(run.first_step for run in runs)
        print(f"| {cell} | {contender} | {len(runs)} | {rate:,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) | {of_rate} "
              f"| {peak / 1e9:.2f} | {of_peak} | {first:.1f} | {losses} |")  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"\nPython {sys.version.split()[0]}, {versions}; {cores} cores")


if __name__ == "__main__":
    main()
