"""The model card of an exported directory: README.md with base, data, recipe, metrics, parity and licence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

UNKNOWN = "other"


def write(directory: Path, run_dir: Path, run: dict[str, Any], record: dict[str, Any], licence: str | None) -> None:
    """Write it from the files of the run."""
    import yaml

    config, plan = run["config"], run["plan"]
    base = Path(config["model"]["path"])
    of_base = _front_matter(base / "README.md")
    licence = licence or of_base.get("license")
    data = _json(run_dir / "data_report.json")
    metrics = _json(run_dir / "eval" / "metrics.json")
    adapter = record["kind"] == "adapter"
    front: dict[str, Any] = {
        **hub_id(base),
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": licence or UNKNOWN,
        "tags": ["ftdist", plan["task"], plan["strategy"]],
    }
    if licence is None:
        front["license_name"] = "not-stated"
    results = _results(metrics)
    if results:
        front["model-index"] = [{"name": run_dir.name, "results": results}]
    sections = [
        f"# {run_dir.name}",
        f"{base.name}, fine-tuned with ftdist {run['environment'].get('versions', {}).get('ftdist', '')} "
        f"({plan['task']}, {plan['strategy']}).",
        "## Use\n\n" + _use(adapter),
        "## Base\n\n" + f"`{base}`. Its licence: {of_base.get('license') or 'not stated in its files; look it up'}.",
        "## Data\n\n" + _data(plan, data),
        "## Recipe\n\n" + _recipe(config, plan),
        "## Metrics\n\n" + _table(metrics),
        "## Parity\n\n" + _parity(record),
        "## Licence\n\n"
        + (f"{licence}." if licence else "Not stated. The base's licence and the data's apply; set `export.license`."),
    ]
    text = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(sections) + "\n"
    (directory / "README.md").write_text(text, encoding="utf-8")


def hub_id(base: Path) -> dict[str, str]:
    """`base_model` for a snapshot in a hub's cache. Of another directory nothing: a hub refuses a card with a path."""
    known = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{base}/")
    return {"base_model": f"{known[1]}/{known[2]}"} if known else {}


def _use(adapter: bool) -> str:
    load = (
        "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)"
        if adapter
        else "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(DIRECTORY)"
    )
    return (
        f"```python\nfrom transformers import AutoTokenizer\n{load}\n"
        "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)\n"
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True,\n'
        '                                    return_tensors="pt", return_dict=True)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0]))\n```"
    )


def _data(plan: dict[str, Any], data: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in plan["data"])
    if not data:
        return names
    return (
        f"{names}: {data['train']:,} rows trained on, {data['validation']:,} held out, {data['tokens']:,} tokens, "
        f"{data['supervised_tokens']:,} of them supervised; {data['rejected']:,} of {data['rows_in']:,} rows unusable, "
        f"{data['duplicates_exact'] + data['duplicates_near']:,} duplicates and {data['contaminated']:,} rows "
        "that share text with the held-out ones taken out."
    )


def _recipe(config: dict[str, Any], plan: dict[str, Any]) -> str:
    train = config["train"]
    keys = (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "max_length",
        "packing",
    )
    lines = [
        f"strategy: {json.dumps(config['strategy'], ensure_ascii=False)}",
        f"engine: {plan['engine']}, {plan['processes']} processes on {plan['nodes']} node(s), {plan['precision']}",
        f"trained parameters: {plan['trainable_parameters']:,} of {plan['total_parameters']:,}",
        f"tokens a step: {plan['tokens_per_step']:,}",
        *(f"{key}: {train[key]}" for key in keys if key in train),
        f"seed: {config['seed']}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(metrics: dict[str, Any]) -> str:
    sides = [side for side in ("base", "tuned") if side in metrics]
    if not sides:
        return "Not evaluated; `ftdist eval RUN`."
    names = [name for name, value in metrics[sides[-1]].items() if isinstance(value, int | float)]
    rows = [f"| {name} | " + " | ".join(_number(metrics[side].get(name)) for side in sides) + " |" for name in names]
    return "\n".join([f"| | {' | '.join(sides)} |", "|---|" + "---|" * len(sides), *rows])


def _parity(record: dict[str, Any]) -> str:
    found = record.get("parity")
    if not found:
        return "Not checked."
    lines = [
        f"- {name}: max difference of a logit {v['max_difference']:.3g}, mean KL {v['kl_mean']:.3g} nats a token"
        for name, v in found.items()
        if isinstance(v, dict) and "kl_mean" in v
    ]
    return f"Over {found['tokens']} tokens:\n\n" + "\n".join(lines)


def _results(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    values = [
        {"type": name, "name": name, "value": value}
        for name, value in metrics.get("tuned", {}).items()
        if isinstance(value, int | float) and name not in ("rows", "empty")
    ]
    if not values:
        return []
    task = {"type": "text-generation", "name": "Text generation"}
    return [{"task": task, "dataset": {"type": "held-out", "name": "held-out rows"}, "metrics": values}]


def _front_matter(file: Path) -> dict[str, Any]:
    """The YAML block of the base's own card; empty where there is none."""
    import yaml

    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
