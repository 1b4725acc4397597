"""One evaluation: load, answer, measure, compare, judge.

`python -m ftdist.evaluate.process FAILURE`, its task on stdin.
A process of its own: a model's memory is gone with it, and what is measured is what was saved.
"""

from __future__ import annotations

import gc
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

from ftdist import base as bases
from ftdist import imports, rundir
from ftdist.errors import OK, USAGE, Failed, UserError
from ftdist.evaluate import g_eval, generate, harness, of_set, overlap, scores, tables


def run(
    target: Path, wanted: dict[str, Any], config: dict[str, Any], plan: dict[str, Any] | None, prepared: Path,
    retention: dict[str, str], preferences: Path | None,
) -> None:  # fmt: skip
    """Writes eval/metrics.json and eval/samples.jsonl, prints a table and `wanted["show"]` answers."""
    from ftdist.evaluate.load import Exported, Loader

    if plan is None:
        loader: Any = Exported(target, wanted["base"], config["model"]["trust_remote_code"], config["model"]["dtype"])
        sides = ["base", "tuned"] if loader.base else ["tuned"]
    else:
        base_dir = bases.found(target, wanted["base"] or config["model"]["path"], "eval.base")
        loader = Loader(target, config, plan, base_dir)
        sides = ["base", "tuned"]
    rows = [json.loads(line) for line in (prepared / "validation_rows.jsonl").open(encoding="utf-8")]
    asked = [row for row in rows if row["prompt"]]
    with_prompt = [row for row in asked if (row["reference"] or "").strip()]
    without = len(asked) - len(with_prompt)
    if len(with_prompt) > wanted["samples"]:
        with_prompt = random.Random(config["seed"]).sample(with_prompt, wanted["samples"])
    prompts, references = [r["prompt"] for r in with_prompt], [r["reference"] for r in with_prompt]
    found: dict[str, dict[str, scores.Metric]] = {}
    answers: dict[str, list[str]] = {}
    notes: dict[str, Any] = {"without_reference": without, "held_out": len(rows), "with_prompt": len(asked)}
    shared = shared_general = None
    margins: Any = None  # of the pairs, as the base sees them
    for which in sides:
        if plan is None:
            model, tokenizer = loader.load(which)
        else:
            model, tokenizer = loader.load(which, quantised=True, dtype=plan["precision"])
        if shared is None and (wanted["data"] or not config["data"]["decontaminate"]) and plan is not None:
            shared = overlap.found(Path(plan["prepared"]), tokenizer, with_prompt)
        pad = tokenizer.pad_token_id or 0
        if shared_general is None:
            sets = {} if plan is None else retention
            trained = Path(plan["prepared"]) if plan is not None else Path()
            shared_general = {
                name: overlap.found(trained, tokenizer, overlap.held_out(Path(folder))) for name, folder in sets.items()
            }
        size, pairs = wanted["batch_size"], None
        if preferences is not None:
            pairs = generate.pair_losses(model, preferences, size, pad, f"{which}, preferences")
        if pairs is not None and preferences == prepared:  # no other rows: what is measured are the chosen answers
            found[which] = scores.of_tokens(*pairs[0])
        else:
            found[which] = scores.of_tokens(*generate.losses(model, prepared, size, pad, which))
        if pairs is not None:
            preferred, margins = scores.preferences(pairs[0][0], pairs[1][0], margins)
            found[which] |= preferred
        general = []
        for name, kept_in in retention.items():
            title = of_set(name)
            kept = generate.losses(model, Path(kept_in), size, pad, f"{which}, {title}")
            found[which] |= {f"{title}_{n}": metric for n, metric in scores.of_tokens(*kept).items()}
            general.append(found[which][f"{title}_loss"])
        if len(general) > 1:
            found[which]["retention_loss"] = scores.mean_of_sets(general)
        if prompts:
            answers[which], cut = generate.answers(
                model, tokenizer, prompts, wanted["max_new_tokens"], wanted["batch_size"], which
            )
            notes["prompts_cut"] = cut
            found[which] |= scores.of_answers(
                answers[which], references, wanted["metrics"], wanted["answer_pattern"], wanted["bleu_tokenize"]
            )
        if wanted["lm_eval"]:
            found[which] |= harness.run(model, tokenizer, wanted["lm_eval"], wanted["batch_size"])
        del model
        gc.collect()
    folder = target / "eval"
    folder.mkdir(exist_ok=True)
    kept_values = {
        k: wanted[k] for k in ("data", "max_new_tokens", "answer_pattern", "bleu_tokenize", "retention", "preferences")
    }
    record = {"settings": kept_values, "overlap": shared, "retention_overlap": shared_general or {}, **notes}
    _write(folder, with_prompt, found, answers, record, wanted["resamples"], config["seed"])
    if wanted["g_eval"]["criteria"] and prompts:
        judged, ledger = g_eval.judge(with_prompt, answers, **wanted["g_eval"])
        for which, of_side in judged.items():
            found[which] |= {name: scores.mean(values) for name, values in of_side.items()}
        record["g_eval_judge"] = ledger
        _write(folder, with_prompt, found, answers, record, wanted["resamples"], config["seed"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(tables.table(metrics))
    for line in tables.remarks(metrics):
        print(line)
    for i in range(min(wanted["show"], len(with_prompt))):
        question = next((m["content"] for m in reversed(with_prompt[i]["messages"]) if m["role"] == "user"), "")
        print(f"\nquestion  {_short(question)}\nexpected  {_short(references[i])}")
        for which in sides:
            print(f"{which:<9} {_short(answers[which][i])}")


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    found: dict[str, dict[str, scores.Metric]],
    answers: dict[str, list[str]],
    record: dict[str, Any],
    resamples: int,
    seed: int,
) -> None:
    metrics: dict[str, Any] = {}
    for which, of_side in found.items():
        metrics[which] = {name: _plain(metric.total) for name, metric in of_side.items()}
        metrics[which]["rows"] = len(rows)
        if which in answers:
            metrics[which]["empty"] = sum(not text.strip() for text in answers[which])
    if "base" in found and "tuned" in found:
        metrics["difference"] = {
            name: {k: _plain(v) for k, v in scores.compared(base, found["tuned"][name], resamples, seed).items()}
            for name, base in found["base"].items()
            if len(base.rows)
        }
    signatures = {n: m.signature for of_side in found.values() for n, m in of_side.items() if m.signature}
    metrics |= {"signatures": signatures, **record}
    overlapping = set((record["overlap"] or {}).get("rows", ()))
    partial = folder / ".samples.jsonl"
    with partial.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            line = {"prompt": row["prompt"], "reference": row["reference"]}
            line |= {which: texts[i] for which, texts in answers.items()}
            line["messages"] = row["messages"][:-1]
            line["scores"] = {
                which: {n: _plain(float(m.rows[i])) for n, m in of_side.items() if _of_answers(n, m, rows)}
                for which, of_side in found.items()
            }
            if i in overlapping:
                line["in_training"] = True
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(folder / "samples.jsonl")
    rundir.write_json(folder / "metrics.json", metrics)


def _of_answers(name: str, metric: scores.Metric, rows: list[Any]) -> bool:
    return len(metric.rows) == len(rows) and not re.search("loss|perplexity|accuracy|preference|reward", name)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str, width: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def main(said: Path) -> int:
    """The exit status of the task on stdin; what failed is written into `said`."""
    import logging as python_logging

    with imports.uncollected():
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  (what every model needs)
        from transformers.utils import logging

    logging.disable_progress_bar()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # of kernels that are not needed here
    task = json.load(sys.stdin)
    try:
        run(
            Path(task["target"]),
            task["wanted"],
            task["config"],
            task["plan"],
            Path(task["prepared"]),
            task["retention"],
            Path(task["preferences"]) if task["preferences"] else None,
        )
    except UserError as failure:
        said.write_text(str(failure), encoding="utf-8")
        return USAGE
    except Failed as failure:
        said.write_text(str(failure), encoding="utf-8")
        return failure.status
    return OK


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
