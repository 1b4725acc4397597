"""Rows per second and peak memory of data preparation, beside datasets.map and TRL, each in a fresh process.

    python tests/bench/data_prepare.py --rows 200000 --seed-file gsm8k_train.jsonl
    python tests/bench/data_prepare.py --rows 1000000 --short

Rows are question/answer pairs: those of --seed-file again and again with half of the words replaced by others, so
that copies are no duplicates of one another; without a file, and with --short, words are drawn from a made-up
vocabulary. The peers do less: `map` renders the template and tokenises; `trl` does so, masks the prompt and packs.
Memory is what the kernel can't drop (private and anonymous), summed over the process tree, sampled five times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_LENGTH = 1024


def make_rows(rows: int, short: bool, seed_file: str | None, path: Path) -> None:
    rng = random.Random(0)
    seeds = []
    if seed_file and not short:
        with open(seed_file, encoding="utf-8") as file:
            seeds = [json.loads(line) for line in file]
        words = sorted({w for row in seeds for w in (row["question"] + " " + row["answer"]).split()})
    else:
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    picks = rng.choices(words, k=1 << 20)
    at = 0

    def draw(count: int) -> list[str]:
        nonlocal at
        at = (at + rng.randrange(1 << 10) + count) % (len(picks) - 400)
        return picks[at : at + count]

    def noisy(text: str) -> str:
        own = text.split(" ")
        other = draw(min(len(own), 400))
        bits = rng.getrandbits(len(own))
        return " ".join(o if bits >> i & 1 else w for i, (w, o) in enumerate(zip(own, other, strict=False)))

    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            if seeds:
                row = seeds[i % len(seeds)]
                row = {"question": noisy(row["question"]), "answer": noisy(row["answer"])}
            else:
                sizes = (rng.randint(6, 12), rng.randint(3, 10)) if short else (45, 50)
                row = {"question": " ".join(draw(sizes[0])), "answer": " ".join(draw(sizes[1]))}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(path: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    with path.open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(7500), strict=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(json.loads(line).values()) for line in lines], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


# --- the contenders, each the main function of its own process -------------------------------------------------------


def ours(path: str, tokenizer: str, scratch: str, workers: int) -> str:
    import yaml

    from ftdist.data.prepare import prepare

    defaults = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / "default.yaml").read_text())
    prepared = prepare(
        **{**defaults, "path": path, "workers": workers},
        tokenizer_path=tokenizer,
        revision=None,
        trust_remote_code=False,
        max_length=MAX_LENGTH,
        packing=True,
        task="sft",
        seed=42,
        cache_dir=Path(scratch) / "ours",
    )
    report = json.loads((prepared / "data_report.json").read_text())
    kept = report["train"] + report["validation"]
    return (
        f"{kept:,} rows kept, {report['duplicates_exact']} + {report['duplicates_near']} duplicates, "
        f"{report['contaminated']} contaminated, bins {report['fill']:.1%} full"
    )


def datasets_map(path: str, tokenizer: str, scratch: str, workers: int) -> str:
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict) -> dict:
        chats = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            for q, a in zip(batch["question"], batch["answer"], strict=True)
        ]
        texts = loaded.apply_chat_template(chats, tokenize=False)
        return {"input_ids": loaded(texts, add_special_tokens=False)["input_ids"]}

    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=scratch + "/hf")
    rows = rows.map(encode, batched=True, num_proc=workers, remove_columns=rows.column_names)
    return f"{len(rows):,} rows"


def trl(path: str, tokenizer: str, scratch: str, workers: int) -> str:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=scratch + "/hf")

    def chat(row: dict) -> dict:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    rows = rows.map(chat, num_proc=workers, remove_columns=rows.column_names)
    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        processing_class=loaded,
        train_dataset=rows,
        args=SFTConfig(
            output_dir=scratch + "/trl",
            packing=True,
            max_length=MAX_LENGTH,
            dataset_num_proc=workers,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
    )
    return f"{len(trainer.train_dataset):,} packed rows"


CONTENDERS = {"ours": ours, "map": datasets_map, "trl": trl}


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not backed by a file; shared pages count by their share."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith(("Pss_Anon", "Pss_Shmem")))


def measure(name: str, arguments: list[str]) -> tuple[float, float, float, str]:
    """(seconds, CPU seconds, peak MiB, what it said) of a contender in its own process."""
    import psutil

    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--contender", name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if "BENCH_VERBOSE" not in os.environ else None,
        text=True,
        env=environment,
    )
    peak = 0
    while process.poll() is None:
        try:
            tree = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(map(anonymous_bytes, tree)))
        time.sleep(0.2)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = process.stdout.read().strip().splitlines() if process.stdout else []
    if process.returncode:
        return seconds, cpu, peak / 2**20, f"failed with status {process.returncode}"
    return seconds, cpu, peak / 2**20, said[-1] if said else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed-file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="ours,map,trl")
    parser.add_argument("--contender")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.contender:
        path, tokenizer, scratch, workers = options.arguments
        print(CONTENDERS[options.contender](path, tokenizer, scratch, int(workers)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        make_rows(options.rows, options.short, options.seed_file, path)
        make_tokenizer(path, Path(scratch) / "tokenizer")
        size = path.stat().st_size / 2**20
        print(f"{options.rows:,} rows, {size:.0f} MiB, {options.workers} processes, load {os.getloadavg()[0]:.1f}")
        print(f"{'':6} {'seconds':>8} {'rows/s':>8} {'CPU s':>8} {'rows/CPU s':>9} {'peak MiB':>9}")
        for name in options.only.split(","):
            arguments = [str(path), str(Path(scratch) / "tokenizer"), scratch, str(options.workers)]
            seconds, cpu, peak, said = measure(name, arguments)
            rates = f"{options.rows / seconds:8.0f} {cpu:8.1f} {options.rows / cpu:9.0f}"
            print(f"{name:6} {seconds:8.1f} {rates} {peak:9.0f}  {said}", flush=True)


if __name__ == "__main__":
    main()
