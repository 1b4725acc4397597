"""Metrics for people: the table and what has to be said beside it. Reads eval/metrics.json's content alone."""

from __future__ import annotations

from typing import Any


def table(metrics: dict[str, Any]) -> str:
    """A line each metric: base, tuned, difference with its interval, wins, ties, losses of tuned."""
    sides = [side for side in ("base", "tuned") if side in metrics]
    names = [name for name in metrics[sides[-1]] if name not in ("rows", "empty")]
    width = max(9, *map(len, names))
    head = f"{'held out':<{width}}" + "".join(f"{side:>12}" for side in sides)
    if "difference" in metrics:
        head += f"{'difference':>12}  {'95 % interval':<22}{'wins/ties/losses'}"
    lines = [head]
    for name in names:
        line = f"{name:<{width}}" + "".join(f"{number(name, metrics[side].get(name)):>12}" for side in sides)
        d = metrics.get("difference", {}).get(name)
        if d:
            interval = f"[{number(name, d['low'])}, {number(name, d['high'])}]" if d.get("low") is not None else ""
            line += f"{number(name, d['difference']):>12}  {interval:<22}{d['wins']}/{d['ties']}/{d['losses']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def remarks(metrics: dict[str, Any]) -> list[str]:
    """What has to be said beside the numbers."""
    tuned = metrics["tuned"]
    over = f", loss over {metrics['held_out']} held-out rows" if "held_out" in metrics else ""
    lines = [f"{tuned['rows']} answers{over}"]
    lines += [f"{name}: {signature}" for name, signature in metrics["signatures"].items()]
    shared = metrics["overlap"]
    if shared and shared["rows"]:
        lines.append(
            f"WARNING: {len(shared['rows'])} of {shared['of']} evaluation rows overlap with the training data: these "
            "numbers flatter the tuned model (samples.jsonl marks them in_training)"
        )
    for name, general in metrics.get("retention_overlap", {}).items():
        if general and general["rows"]:
            which = f"eval.retention {name}".strip()
            lines.append(
                f"WARNING: {len(general['rows'])} of {general['of']} rows of {which} overlap with the training data: "
                "what is kept of them says little"
            )
    if metrics["settings"]["data"] and shared is None:
        lines.append("overlap with the training data: not checked, they are not here")
    for side in ("base", "tuned"):
        empty = metrics.get(side, {}).get("empty")
        if empty:
            lines.append(f"{side}: {empty} of {tuned['rows']} answers are empty")
    if metrics.get("without_reference"):
        lines.append(f"{metrics['without_reference']} rows have no reference answer and were left out")
    if metrics.get("prompts_cut"):
        lines.append(f"{metrics['prompts_cut']} prompts are longer than the model's context: their beginnings were cut")
    judge = metrics.get("g_eval_judge")
    if judge:
        lines.append(told(judge))
    if metrics.get("with_prompt") == 0:
        lines.append("no held-out row has a prompt: no answers")
    return lines


def number(name: str, value: float | None) -> str:
    """A metric for people: shares in percent."""
    if value is None:
        return "–"
    return f"{value:.1%}" if name.endswith(("_match", "_accuracy")) else f"{value:.4g}"


def told(ledger: dict[str, Any]) -> str:
    """The ledger in one line."""
    parts = [f"G-Eval by {ledger['model'] or ledger['judge']}: {ledger['scored']} scores"]
    if ledger["failed"]:
        parts.append(f"{ledger['failed']} failures without a score (e.g. {ledger.get('example', 'no answer')})")
    parts.append(f"{ledger['requests']} requests, {ledger['remembered']} remembered, {ledger['retried']} tried again")
    parts.append(f"{ledger['tokens_in']:,} + {ledger['tokens_out']:,} tokens")
    if "cost" in ledger:
        parts.append(f"cost {ledger['cost']:.4f}")
    if ledger.get("by_sampling"):
        parts.append(f"{ledger['by_sampling']} by sampling, since the judge gave no token probabilities")
    return ", ".join(parts)
