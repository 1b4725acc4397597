"""Keys that are known and fit their types, and that nothing reads beside the others: each is refused by name.

A key counts as set where its value is not the one of its group's own file. Imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml

from ftdist import align, judge
from ftdist.errors import UserError

WITHOUT_WARMUP = (*judge.PLATEAUS, "constant")  # transformers' get_scheduler gives these no warm-up
WITHOUT_KEYWORDS = ("constant", "constant_with_warmup")  # nor these its keyword arguments
WITH_DROPOUT = ("lora", "qlora")  # of our own strategies
FILES = {"task": "dpo", "forgetting": "ewc", "strategy": "lora"}  # of a group's keys below; others have `default`


def check(config: dict[str, Any]) -> None:
    """UserError for the first key that is set and not read in this combination. Called when the types are checked."""
    for names, unread, why in _rules(config):
        for name in names.split() if unread else ():
            group, key = name.split(".")
            value = config[group].get(key)
            if value not in (None, _file(group).get(key), *HARMLESS.get(name, ())):
                raise UserError(f"{name}={value}: {why}")


HARMLESS: dict[str, tuple[Any, ...]] = {  # values that ask for nothing
    "train.warmup_steps": (0,),
    "train.lr_scheduler_kwargs": ({},),
    "train.eval_delay": (0,),
    "strategy.dropout": (0,),
}


def _rules(config: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Keys, whether nothing reads them, and why with what to do."""
    train, stopping, task = config["train"], config["stopping"], config["task"]
    schedule, strategy = train["lr_scheduler_type"], train["eval_strategy"]
    yield (
        "eval.during eval.retention_during stopping.metric stopping.direction stopping.overfitting_after "
        "stopping.overfitting_rise checkpoint.keep_best train.eval_steps train.eval_delay",
        strategy == "no",
        "nothing is evaluated while training; set train.eval_strategy=steps train.eval_steps=N, or leave it out",
    )
    yield (
        "train.eval_steps",
        strategy != "steps",
        f"not read with train.eval_strategy={strategy}; set train.eval_strategy=steps, or leave it out",
    )
    chooses = stopping["patience"] is not None or stopping["restore_best"] or config["checkpoint"]["keep_best"]
    yield (
        "stopping.max_forgetting",
        not chooses,
        "says which step may be the best, and nothing asks for that; set stopping.restore_best=true, or "
        "stopping.patience=N",
    )
    yield (
        "stopping.metric stopping.direction",
        not chooses and schedule not in judge.PLATEAUS,
        "says which step is the best, and nothing asks for that; set stopping.restore_best=true or stopping.patience=N",
    )
    yield "stopping.min_delta", stopping["patience"] is None, "read by stopping.patience alone; set that too"
    yield (
        "stopping.overfitting_rise",
        stopping["overfitting_after"] is None,
        "not read with stopping.overfitting_after=null; set that, or leave it out",
    )
    yield (
        "train.warmup_steps",
        schedule in WITHOUT_WARMUP,
        f"train.lr_scheduler_type={schedule} has no warm-up; set train.warmup_steps=0, or a schedule that has one"
        + (" (constant_with_warmup)" if schedule == "constant" else ""),
    )
    yield (
        "train.lr_scheduler_kwargs",
        schedule in WITHOUT_KEYWORDS,
        f"train.lr_scheduler_type={schedule} takes none; leave it out",
    )
    yield (
        "train.lr_scheduler_kwargs",
        schedule in judge.PLATEAUS and "mode" in (train.get("lr_scheduler_kwargs") or {}),
        "whether lower or higher is better is said by stopping.direction; leave mode out",
    )
    yield "data.replay_repeats", config["data"]["replay"] is None, "of which data? set data.replay=FILE too"
    yield "eval.retention_overlap", not config["eval"]["retention"], "of which data? set eval.retention=FILE too"
    if task["name"] == "dpo":
        yield "data.mask", True, "task=dpo learns from answers, whole, and from nothing else; leave it out"
        losses = {name for name, _ in align.weighted_losses(task)}
        yield "task.beta", losses == {"sft"}, "not read by task.loss_type=sft; leave it out"
        yield (
            "strategy.dropout",
            task["disable_dropout"] and config["strategy"]["name"] in WITH_DROPOUT,
            "task=dpo turns dropout off, adapters' too; set task.disable_dropout=false, or leave it out",
        )
        yield (
            "task.chosen_drop",
            task["reference"] == "none" or task["reference_model"] is not None,
            "what chosen answers have lost since the start is not known without the start as reference; leave it out",
        )
    forgets = config["forgetting"]
    if forgets["name"] == "ewc":
        yield "forgetting.decay", forgets["earlier"] is None, "of which Fisher? set forgetting.earlier=RUN too"
        yield (
            "forgetting.samples forgetting.batch",
            forgets["fisher"] is not None,
            "forgetting.fisher was measured before; leave it out, or measure again with forgetting.data=FILE",
        )


@functools.cache
def _file(group: str) -> dict[str, Any]:
    """What the group's own file has."""
    file = resources.files("ftdist.conf") / group / f"{FILES.get(group, 'default')}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = values.get(group, values)
    return found
