"""What came out: base and tuned on the same rows. Knows a finished run or an exported model, no launcher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import rundir, schema, start
from ftdist.errors import FAILED, OK, USAGE, Failed, UserError
from ftdist.spectrum import reader

USUAL = 200  # answers, where `ftdist eval` is not told how many
LONGEST = 4096  # tokens of a row of the user's own evaluation data that count, where the model takes so many


def settings(
    *,
    samples: Annotated[int, Field(ge=0)],
    during: Annotated[int, Field(ge=0)],
    data: str | list[str] | None,
    base: str | None,
    max_new_tokens: Annotated[int, Field(ge=1)],
    batch_size: Annotated[int, Field(ge=1)],
    metrics: list[Literal["exact_match", "bleu", "chrf", "rouge"]],
    answer_pattern: str | None,
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"],
    resamples: Annotated[int, Field(ge=0)],
    retention: str | list[str] | dict[str, str | list[str]] | None,
    retention_during: bool,
    retention_overlap: Literal["refuse", "warn"],
    preferences: str | list[str] | None,
    lm_eval: list[str],
    show: Annotated[int, Field(ge=0)],
    g_eval: dict[str, Any],
) -> None:
    """The keys of `eval`."""


def check(values: dict[str, Any]) -> None:
    """UserError for the first key that is unknown or holds a wrong value."""
    from ftdist.evaluate import g_eval, harness

    schema.check("eval", values, settings)
    schema.check("eval.g_eval", values["g_eval"], g_eval.settings)
    if values["g_eval"]["criteria"] and not values["g_eval"]["judge"]:
        raise UserError("eval.g_eval.judge=null: who judges? the URL of an OpenAI-compatible endpoint, or a directory")
    harness.check(values["lm_eval"])
    for name in retention_sets(values["retention"]):
        if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"eval.retention: {name!r} is no name for a set; letters, digits, _, . and - alone")
    if values["retention_during"] and not values["retention"]:
        raise UserError("eval.retention_during=true: of what? name general data with eval.retention=FILE")
    if values["answer_pattern"] is not None:
        try:
            re.compile(values["answer_pattern"])
        except re.error as failure:
            raise UserError(f"eval.answer_pattern={values['answer_pattern']}: no regular expression ({failure})")


def retention_sets(named: Any) -> dict[str, Any]:
    """Name → data of `eval.retention`; a set without a name has the empty one."""
    if not named:
        return {}
    return dict(named) if isinstance(named, dict) else {"": named}


def of_set(name: str) -> str:
    """What the metrics of a retention set begin with."""
    return f"retention_{name}" if name else "retention"


def retention_while_training(values: dict[str, Any], stopping: dict[str, Any]) -> bool:
    """Whether every evaluation measures the retention sets too: when asked to, or when something depends on it."""
    needed = stopping["max_forgetting"] is not None or stopping["metric"].startswith("eval_retention")
    return bool(values["retention"]) and (values["retention_during"] or needed)


def afterwards(values: dict[str, Any], stopping: dict[str, Any]) -> bool:
    """Whether training is followed by an evaluation: answers, pairs or tasks are asked for, or sets that are not
    measured while training."""
    sets = values["retention"] and not retention_while_training(values, stopping)
    return bool(values["samples"] or values["preferences"] or values["lm_eval"] or sets)


def tokens_while_training(config: dict[str, Any], retention: dict[str, str]) -> int:
    """Tokens of the retention sets that every evaluation reads."""
    if not retention_while_training(config["eval"], config["stopping"]):
        return 0
    reports = [json.loads((Path(f) / "data_report.json").read_text(encoding="utf-8")) for f in retention.values()]
    return sum(int(report["validation_tokens"]) for report in reports)


def recorded(values: dict[str, Any]) -> list[str]:
    """What an evaluation while training records beside loss and perplexity."""
    found: list[str] = []
    if values["during"]:
        from ftdist.evaluate import rouge

        found += [name for name in values["metrics"] if name != "rouge"]
        found += rouge.KINDS if "rouge" in values["metrics"] else []
        found += ["extracted_match"] if values["answer_pattern"] is not None else []
    return found


def retention_data(config: dict[str, Any], run_dir: Path) -> dict[str, str]:
    """Name → folder of the sets of `eval.retention`, prepared as the run trains: its template, its longest rows."""
    tokenizer = _tokenizer(config, run_dir)
    template, longest = config["data"]["chat_template"], config["train"]["max_length"]
    return {
        name: str(_prepared(run_dir, config, tokenizer, longest, data, "eval.retention", template))
        for name, data in retention_sets(config["eval"]["retention"]).items()
    }


def refuse_preferences(config: dict[str, Any], run_dir: Path) -> None:
    """UserError if the evaluation after training would find no pairs in `eval.preferences`."""
    named = config["eval"]["preferences"]
    if named:
        longest = config["train"]["max_length"]
        _prepared(run_dir, config, _tokenizer(config, run_dir), longest, named, "eval.preferences")


def _tokenizer(config: dict[str, Any], run_dir: Path) -> Path:
    """Of the model that a run starts from: an adapter that goes on has brought its own."""
    return start.adapter(run_dir) or Path(config["model"]["path"])


def refuse_overlap(values: dict[str, Any], prepared: Path, model: dict[str, Any], retention: dict[str, str]) -> None:
    """UserError if a retention set holds what is trained on, or a line of warning with eval.retention_overlap=warn."""
    if not retention:
        return
    from ftdist import models
    from ftdist.evaluate import overlap

    tokenizer = models.tokenizer(model["path"], model["revision"], model["trust_remote_code"])
    for name, folder in retention.items():
        shared = overlap.found(prepared, tokenizer, overlap.held_out(Path(folder)))
        if shared is None or not shared["rows"]:
            continue
        which = retention_sets(values["retention"])[name]
        text = f"{len(shared['rows'])} of {shared['of']} rows of eval.retention={which} overlap with the training data"
        if values["retention_overlap"] == "refuse":
            raise UserError(f"{text}; take them out of those with data.against={which}, or eval.retention_overlap=warn")
        print(f"WARNING: {text}: what the model keeps of them says little", flush=True)


def is_exported(directory: Path) -> bool:
    """Whether this is a model or adapter directory and no run."""
    files = ("config.json", "adapter_config.json")
    return not (directory / "config.yaml").is_file() and any((directory / name).is_file() for name in files)


def evaluate(target: Path, wanted: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Evaluate in a process of its own, from the files alone: what is measured is what was saved.

    target: a finished run, or an exported directory (`defaults`: the configuration to read eval.data with).
    """
    if is_exported(target):
        assert defaults is not None
        if wanted["data"] is None:
            raise UserError(f"{target}: a model directory brings no held-out rows; give eval.data=FILE")
        config, plan, tokenizer = defaults, None, target
        longest = min(LONGEST, _positions(target, wanted["base"]))
    else:
        run = rundir.finished(target)
        config, plan, tokenizer = run["config"], run["plan"], target / "final"
        positions = _positions(tokenizer, wanted["base"] or config["model"]["path"])
        longest = max(config["train"]["max_length"], min(LONGEST, positions))
    if not os.access(target, os.W_OK):
        raise UserError(f"{target}: cannot be written, and eval/ comes into it; copy it to another place")
    if wanted["data"]:
        prepared = _prepared(target, config, tokenizer, longest, wanted["data"], "eval.data")
    else:
        assert plan is not None
        prepared = Path(plan["prepared"])
    if not (prepared / "validation_rows.jsonl").is_file():
        raise UserError(
            f"{target}: its prepared data are gone ({prepared}); give the held-out rows with eval.data=FILE"
        )
    retention = {
        name: str(_prepared(target, config, tokenizer, longest, data, "eval.retention"))
        for name, data in retention_sets(wanted["retention"]).items()
    }
    preferences = None
    if wanted["preferences"]:
        preferences = _prepared(target, config, tokenizer, longest, wanted["preferences"], "eval.preferences")
    elif plan is not None and config["task"]["name"] == "dpo" and Path(plan["prepared"]).is_dir():
        preferences = Path(plan["prepared"])
    task = {
        "target": str(target),
        "wanted": wanted,
        "config": config,
        "plan": plan,
        "prepared": str(prepared),
        "retention": retention,
        "preferences": str(preferences) if preferences else None,
    }
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch, "failure")
        words = [sys.executable, "-m", "ftdist.evaluate.process", str(said)]
        done = subprocess.run(words, input=json.dumps(task), text=True, check=False)
        message = said.read_text(encoding="utf-8") if said.is_file() else None
    if done.returncode == USAGE and message:
        raise UserError(message)
    if done.returncode != OK:
        message = message or f"the evaluation failed (exit status {done.returncode}); {target} is whole"
        raise Failed(message, done.returncode if done.returncode > 0 else FAILED)


def _positions(directory: Path, base: str | None) -> int:
    """Positions of the model in `directory`, which may be an adapter for `base`; no limit where no file says."""
    adapter = directory / "adapter_config.json"
    if base is None and adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    places = [directory, *([Path(base).expanduser()] if base else [])]
    values = next(filter(None, map(reader.config, places)), {})
    inner = values.get("text_config") or {}
    return int(values.get("max_position_embeddings") or inner.get("max_position_embeddings") or LONGEST)


def _prepared(
    target: Path, config: dict[str, Any], tokenizer: Path, longest: int, data: str | list[str], key: str,
    template: str = "tokenizer",
) -> Path:  # fmt: skip
    """Rows of the user's own file, in the template and with the mask of the run, none taken out."""
    from ftdist.data.prepare import prepare

    keep = {
        **config["data"],
        "path": data,
        "validation": data,
        "validation_share": 0.0,
        "exact_duplicates": "keep",
        "near_duplicates": "off",
        "decontaminate": False,
        "against": None,
        **dict.fromkeys(("replay", "replay_share")),
        "replay_repeats": 1,
        "stratify": False,
        "chat_template": template,
        **dict.fromkeys(("min_answer", "max_answer", "max_repetition", "max_markup", "scripts")),
        "tokenizer_path": str(tokenizer),
        "revision": None,
        "trust_remote_code": config["model"]["trust_remote_code"],
        "max_length": longest,
        "packing": False,
        "task": "dpo" if key == "eval.preferences" else "sft",
        "seed": config["seed"],
        "cache_dir": rundir.cache_root() / "data",
    }
    if key == "eval.retention":  # general data have their own form, whatever is trained on
        keep |= {"format": "auto", "columns": {}, "mask": "auto"}
    elif keep["task"] != config["task"]["name"]:
        keep |= {"format": "auto", "columns": {}}
    unlike = set(keep) ^ set(schema.keys_of(prepare))
    if unlike:
        raise UserError(f"{target}: made by another version of ftdist, with other keys of data ({min(unlike)})")
    try:
        return prepare(**keep)
    except UserError as failure:
        text = str(failure)
        if "data.path=" in text:
            raise UserError(text.replace("data.path=", f"{key}="))
        raise UserError(f"{key}={data}: {next((said for mark, said in OF_OTHERS if mark in text), text)}")


OF_OTHERS = (  # what the preparation of training data says of rows of the other kind, and what is to be said here
    ("has chosen and rejected", "holds pairs of a chosen and a rejected answer; ask them with eval.preferences"),
    ("need chosen and rejected", "holds no pairs of a chosen and a rejected answer; eval.retention takes texts"),
)
