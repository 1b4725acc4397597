"""What keeps a skill while another is learnt: `make forgetting` (about a quarter of an hour on two quiet cores).

The demo model learns skill A from nothing; from there skill B is fine-tuned in several ways, all with the same rows and
steps. For each seed (initial weights, rows, their order) exact match on held-out rows of both is measured before and
after. Writes results.json, table.md and forgetting.svg; nothing that ran is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Forks  # starts of the worker without the seconds that imports take

A, B = "first", "last"
HELD_OUT = 200  # rows of each skill
OF_A, OF_B = 4000, 1500  # rows that are learnt from
STEPS_A, STEPS_B = 70, 100
COMMON = (
    "engine=single",
    "cluster.processes=1",
    "tracking=none",
    "train.max_length=128",
    "train.per_device_train_batch_size=8",
    "train.bf16=false",
    "train.adam_beta2=0.98",
    "train.eval_strategy=no",
    "train.logging_steps=10",
    "data.near_duplicates=off",
    "data.decontaminate=false",
    "data.validation_share=0",
    "checkpoint.every_minutes=null",
)
RATE_A, RATE, RATE_LORA = "train.learning_rate=4e-3", "train.learning_rate=2e-3", "train.learning_rate=1e-2"
EWC = ("forgetting=ewc", "forgetting.data={a}", "forgetting.samples=512")
LORA = ("strategy=lora", RATE_LORA)
WAYS = {
    "plain full": (RATE,),
    "EWC, λ=1": (RATE, *EWC, "forgetting.strength=1"),
    "EWC, λ=1e4": (RATE, *EWC, "forgetting.strength=1e4"),
    "EWC, λ=1e6": (RATE, *EWC, "forgetting.strength=1e6"),
    "replay 5 %": (RATE, "data.replay={a}", "data.replay_share=0.05"),
    "replay 25 %": (RATE, "data.replay={a}", "data.replay_share=0.25"),
    "LoRA": LORA,
    "LoRA, EWC of the drift, λ=1e4": (*LORA, *EWC, "forgetting.strength=1e4"),
    "LoRA, EWC of the drift, λ=1e6": (*LORA, *EWC, "forgetting.strength=1e6"),
    "Spectrum 25 %": (RATE, "strategy=spectrum", "strategy.top_percent=25"),
}
FAMILIES = {"plain": "#666666", "EWC": "#1f77b4", "replay": "#2ca02c", "LoRA": "#d62728", "Spectrum": "#9467bd"}


def rows_of(skill: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one skill, enough of them; no two alike."""
    from ftdist import demo

    found: dict[str, dict[str, Any]] = {}
    for number in range(2):
        rows = demo.rows(10 * seed + number)
        found |= {row["messages"][0]["content"]: row for row in rows if row["skill"] == skill}
    return list(found.values())


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(forks: Forks, run_dir: Path, words: Iterable[str]) -> None:
    """What `ftdist train` does, on one core."""
    if not (run_dir / "final").is_dir():
        forks.freeze(run_dir, *COMMON, *words)
        assert forks.start(run_dir, 1) == [0], (run_dir / "logs" / "rank-0.log").read_text()[-2000:]


def measured(final: Path, base: Path, held_out: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Exact match of greedy answers, skill by skill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftdist.evaluate.generate import answers

    tokenizer = AutoTokenizer.from_pretrained(base)
    adapted = (final / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if adapted else final)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, final).merge_and_unload()
    found = {}
    for skill, rows in held_out.items():
        prompts = [
            tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        said, _ = answers(model.eval(), tokenizer, prompts, 8, 100, skill)
        right = [text.strip() == row["messages"][1]["content"] for text, row in zip(said, rows, strict=True)]
        found[skill] = 100 * sum(right) / len(right)
    return found


def one_seed(
    folder: Path, seed: int, free: Queue[Forks], ways: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, float]]:
    """Every way's exact match with this seed; `start` is after A."""
    from ftdist import demo

    folder.mkdir(parents=True, exist_ok=True)
    files, held_out = {}, {}
    for skill, count in ((A, OF_A), (B, OF_B)):
        rows = rows_of(skill, seed)
        held_out[skill] = rows[:HELD_OUT]
        files[skill] = write(folder / f"{skill}.jsonl", rows[HELD_OUT : HELD_OUT + count])
    first = folder / "a"
    words = [f"model.path={demo.model(folder / 'model', seed)}", f"seed={seed}", f"data.path={files[A]}", RATE_A]
    forks = free.get()
    train(forks, first, [*words, "train.warmup_steps=30", f"train.max_steps={STEPS_A}"])
    free.put(forks)
    base = first / "final"
    common = [f"model.path={base}", f"seed={seed}", f"data.path={files[B]}", f"train.max_steps={STEPS_B}"]

    finals = []
    for name, words in ways.items():
        finals.append(folder / "".join(letter for letter in name if letter.isascii() and letter.isalnum()))
        forks = free.get()
        train(forks, finals[-1], [*common, *(word.format(a=files[A]) for word in words)])
        free.put(forks)
    found = {"start": measured(base, base, held_out)}
    for name, final in zip(ways, finals, strict=True):
        found[name] = measured(final / "final", base, held_out)
        print(f"seed {seed}: {name}: {found[name]}", flush=True)
    return found


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over the seeds, in points of exact match."""
    lines = ["| B was learnt by | A after | A lost | B after | B gained |", "|---|---|---|---|---|"]
    starts = " and ".join(f"{skill} {_spread([seed['start'][skill] for seed in seeds])}" for skill in (A, B))
    for name in WAYS:
        if all(name in seed for seed in seeds):
            after = {skill: [seed[name][skill] for seed in seeds] for skill in (A, B)}
            lost = [seed["start"][A] - seed[name][A] for seed in seeds]
            gained = [seed[name][B] - seed["start"][B] for seed in seeds]
            cells = [after[A], lost, after[B], gained]
            lines.append(f"| {name} | " + " | ".join(map(_spread, cells)) + " |")
    return f"Exact match before: {starts}; {len(seeds)} seeds, mean ± standard deviation.\n\n" + "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def plot(seeds: list[dict[str, dict[str, float]]], file: Path) -> None:
    """B's gain against A's loss: the mean of each way with bars of a standard deviation, each seed as a faint point."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.6))
    for number, name in enumerate(WAYS):
        if all(name in seed for seed in seeds):
            lost = [seed["start"][A] - seed[name][A] for seed in seeds]
            gained = [seed[name][B] - seed["start"][B] for seed in seeds]
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in (lost, gained)]
            colour = FAMILIES[name.split()[0].rstrip(",")]
            marker = "osD^v<>PX*"[number % 10]
            means = {"x": statistics.mean(lost), "y": statistics.mean(gained)}
            axes.errorbar(**means, xerr=spread[0], yerr=spread[1], fmt=marker, color=colour, lw=0.6, label=name)
            axes.plot(lost, gained, marker, color=colour, alpha=0.25, ms=4, lw=0)
    axes.set_xlabel(f"lost of A ({A}), points of exact match")
    axes.set_ylabel(f"gained of B ({B}), points of exact match")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    pyplot.rcParams["svg.hashsalt"] = "forgetting"  # the same file for the same numbers
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/forgetting"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, a core each")
    parser.add_argument("--only", nargs="*", help="ways, by the beginnings of their names")
    options = parser.parse_args()
    ways = {n: w for n, w in WAYS.items() if not options.only or n.startswith(tuple(options.only))}
    began = time.monotonic()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FTDIST_CACHE": str(out / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    free: Queue[Forks] = Queue()
    for number in range(options.jobs):
        free.put(Forks(environment, out / f"errors-{number}.log"))
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(one_seed, out / f"seed-{n}", n, free, ways) for n in range(1, options.seeds + 1)]
        seeds = [each.result() for each in work]
    (out / "results.json").write_text(json.dumps(seeds, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(seeds), encoding="utf-8")
    plot(seeds, out / "forgetting.svg")
    print(f"{table(seeds)}\n{time.monotonic() - began:.0f} s; {out}")


if __name__ == "__main__":
    main()
