"""Base beside tuned: held-out loss, and greedy answers to held-out prompts.

Started as `python -m ftdist.evaluate.answers RUN SAMPLES MAX_NEW_TOKENS BATCH_SIZE SHOW` by `ftdist train` and
`ftdist eval`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftdist import models, rundir, schema
from ftdist.plan.shapes import model_shapes
from ftdist.strategies import Base, find


def main(run_dir: Path, samples: int, max_new_tokens: int, batch_size: int, show: int) -> None:
    """Writes eval/metrics.json and eval/samples.jsonl, prints a table and `show` answers."""
    import logging as python_logging

    from transformers.utils import logging

    logging.disable_progress_bar()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # of kernels that are not needed here
    config = rundir.read_config(run_dir)
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    prepared = Path(plan["prepared"])
    rows = [json.loads(line) for line in (prepared / "validation_rows.jsonl").open(encoding="utf-8")]
    if len(rows) > samples:
        rows = random.Random(config["seed"]).sample(rows, samples)
    metrics: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    for which in ("base", "tuned"):
        model, tokenizer = loaded(run_dir, config, plan, which == "tuned")
        loss = held_out_loss(model, prepared, samples, batch_size, tokenizer.pad_token_id or 0)
        answers[which] = generated(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens, batch_size, which)
        hits = [a.strip() == r["reference"].strip() for a, r in zip(answers[which], rows, strict=True)]
        metrics[which] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "exact_match": sum(hits) / len(hits),
            "rows": len(hits),
        }
        del model
    folder = run_dir / "eval"
    folder.mkdir(exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            line = {"prompt": row["prompt"], "reference": row["reference"]}
            file.write(json.dumps(line | {k: v[i] for k, v in answers.items()}, ensure_ascii=False) + "\n")
    rundir.write_json(folder / "metrics.json", metrics)
    print(table(metrics))
    for i in range(min(show, len(rows))):
        question = next(m["content"] for m in reversed(rows[i]["messages"]) if m["role"] == "user")
        print(f"\nquestion  {_short(question)}\nexpected  {_short(rows[i]['reference'])}")
        print(f"base      {_short(answers['base'][i])}\ntuned     {_short(answers['tuned'][i])}")


def loaded(run_dir: Path, config: dict[str, Any], plan: dict[str, Any], tuned: bool) -> tuple[Any, Any]:
    """The model as the run used it (quantised bases quantised), with what was trained or without."""
    import torch

    keys = config["model"]
    shapes = model_shapes(keys["path"], None, revision=keys["revision"], trust_remote_code=keys["trust_remote_code"])
    strategy = find(config["strategy"]["name"])
    base = Base(shapes.architecture.parameters, plan["precision"], "uint8", measured=True)
    recipe = strategy(base, **schema.pick(strategy, config["strategy"]))
    whole = tuned and recipe.peft is None
    model = models.load(
        path=str(run_dir / "final") if whole else keys["path"],
        revision=None if whole else keys["revision"],
        dtype=keys["dtype"],
        attn_implementation=keys["attn_implementation"],
        trust_remote_code=keys["trust_remote_code"],
        quantization=recipe.quantization,
        loaded_dtype=plan["precision"],
    )
    if tuned and recipe.peft is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(run_dir / "final"))  # type: ignore[assignment]
    if not recipe.quantization:
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    model.eval()
    model.config.use_cache = True
    return model, models.tokenizer(str(run_dir / "final"), None, keys["trust_remote_code"])


def held_out_loss(model: Any, prepared: Path, limit: int, batch_size: int, pad_id: int) -> float:
    """Mean loss over the supervised tokens of the first `limit` prepared held-out rows."""
    import datasets
    import torch

    from ftdist.loss import IGNORED, full_loss
    from ftdist.trainer import collate

    rows = datasets.load_from_disk(str(prepared / "validation"))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, min(limit, len(rows)), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, limit, len(rows)))], pad_id)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            total += float(full_loss(logits, batch["targets"], 0.0, "nll"))
            tokens += int((batch["targets"] != IGNORED).sum())
    return total / max(tokens, 1)


def generated(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int, which: str
) -> list[str]:
    """Greedy answers, batched by length, left-padded. Prompts are rendered already: no special token is added."""
    import torch

    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = [""] * len(prompts)
    for done, batch in _batches(sorted(range(len(prompts)), key=lambda i: len(encoded[i])), batch_size):
        width = max(len(encoded[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, text in zip(batch, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
            answers[i] = text
        _progress(f"answers of {which}: {done}/{len(prompts)}", done == len(prompts))
    return answers


def _batches(order: list[int], size: int) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield start + len(batch), batch


_said = 0.0


def _progress(text: str, last: bool) -> None:
    global _said
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{'' if last else text}")
    elif last or time.monotonic() - _said > 10:
        _said = time.monotonic()
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Base and tuned, a line each."""
    lines = [f"{'held out':<9} {'exact match':>12} {'loss':>9} {'perplexity':>12}"]
    for which, m in metrics.items():
        lines.append(f"{which:<9} {m['exact_match']:>11.1%} {m['loss']:>10.4f} {m['perplexity']:>12.4g}")
    return "\n".join(lines) + f"\nexact match over {metrics['base']['rows']} held-out rows"


def _short(text: str, width: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))
