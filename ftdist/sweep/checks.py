"""Before the first member starts: complete each configuration, plan each shape once, share devices and data."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from ftdist import job, launcher
from ftdist.errors import UserError
from ftdist.plan import text
from ftdist.sweep import local, objective

# Keys that no plan depends on: members that differ in these alone share one.
NEUTRAL = ("run_dir", "seed", "resume", "health", "tracking", "train.learning_rate", "train.lr_scheduler_type",
           "train.warmup_steps", "train.weight_decay", "train.max_grad_norm", "train.adam_beta1", "train.adam_beta2",
           "train.adam_epsilon", "train.label_smoothing_factor")  # fmt: skip


def completed(config: dict[str, Any], asked: dict[str, Any], sweep_dir: Path) -> None:
    """What a sweep adds to the configuration of a member."""
    config["resume"] = "never"
    if config["run_dir"] is None:
        config["run_dir"] = str(sweep_dir / "trial")
    tracking, cluster = config["tracking"], config["cluster"]
    if tracking["name"] == "wandb" and tracking["group"] is None:
        tracking["group"] = asked["name"]
    parallel = asked["sweep"]["parallel"]
    if parallel > 1 and cluster["processes"] == "auto" and cluster["name"] == "local":
        count, kind = launcher.devices()
        cluster["processes"] = max(1, count // parallel) if kind == "GPU" else 1
    objective.check(asked["sweep"]["objective"], config)


def planned(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan of each member, made once for members of one shape. UserError for what is wrong or cannot fit."""
    known: dict[str, dict[str, Any]] = {}
    plans = []
    for config in configs:
        shape = _shape(config)
        known[shape] = job.ready(config, known.get(shape))
        plans.append(known[shape])
    return plans


def _shape(config: dict[str, Any]) -> str:
    """What is the same for members that share a plan."""
    values = copy.deepcopy(config)
    for key in NEUTRAL:
        group, _, name = key.rpartition(".")
        (values[group] if group else values).pop(name, None)
    return repr(values)


def say_plans(plans: list[dict[str, Any]], named: list[str]) -> None:
    for plan in {id(plan): plan for plan in plans}.values():
        whose = [name for name, other in zip(named, plans, strict=True) if other is plan]
        words = [f"{plan['trainable_parameters']:,} parameters trained"]
        words.append(f"{text.gigabytes(plan['device_peak_bytes'])} a rank")
        if "total_seconds" in plan:
            words.append(f"about {text.seconds(plan['total_seconds'])}")
        shown = ", ".join(whose) if len(whose) < 5 else f"{whose[0]} … {whose[-1]} ({len(whose)})"
        print(f"plan of {shown}: {', '.join(words)}", flush=True)


def places(sweep: dict[str, Any], configs: list[dict[str, Any]]) -> list[local.Share]:
    """Where members run at once."""
    counts = [job.per_node(config["cluster"], here=True) for config in configs]
    oversubscribe = any(config["cluster"]["oversubscribe"] for config in configs)
    return local.shares(min(sweep["parallel"], max(1, _many(sweep, configs))), max(counts, default=1), oversubscribe)


def _many(sweep: dict[str, Any], configs: list[dict[str, Any]]) -> int:
    """Members that there may be at once."""
    return int(sweep["trials"]) if sweep["name"] == "search" else len(configs)


def fit_together(plans: list[dict[str, Any]], parallel: int, configs: list[dict[str, Any]]) -> None:
    """Members that run at once share the host's memory."""
    host = plans[0]["hardware"]["host_memory"] or 0
    needed = sum(sorted((plan["host_peak_bytes_per_node"] for plan in plans), reverse=True)[:parallel])
    if parallel > 1 and host and needed > host:
        words = f"sweep.parallel={parallel}: so many members need {text.gigabytes(needed)} of host memory, "
        words += f"{text.gigabytes(host)} there"
        if configs[0]["must_fit"]:
            raise UserError(f"{words}; use fewer, or must_fit=false")
        print(f"warning: {words}", flush=True)


def fit_on_disk(plans: list[dict[str, Any]], trials: int | None, sweep_dir: Path, must_fit: bool) -> None:
    """UserError if the disk cannot hold a checkpoint and the final model of each member; a warning if not all kept.

    plans: of each member; of a search of examples, the largest of which stands for each of its `trials`.
    """
    count = trials or len(plans)
    least = [plan["disk_bytes"]["final"] + plan["checkpoint_bytes"] + plan["disk_bytes"]["fisher"] for plan in plans]
    most = [size + plan["disk_bytes"]["checkpoints"] for size, plan in zip(least, plans, strict=True)]
    if trials:
        least, most = [max(least)] * count, [max(most)] * count
    place = next(folder for folder in sweep_dir.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free >= sum(most):
        return
    words = (f"{text.gigabytes(free)} free for {count} members, {text.gigabytes(sum(least))} needed for a checkpoint "
             f"and the final model of each, {text.gigabytes(sum(most))} with all checkpoints that are kept; use "
             "another disk (sweep_dir=DIR), fewer members, or checkpoint.keep_last=1")  # fmt: skip
    if free < sum(least) and must_fit:
        raise UserError(
            f"sweep_dir={sweep_dir}: the disk is too small: {words} (must_fit=false starts it all the same)"
        )
    print(f"warning: the disk: {words}", flush=True)


def prepared(configs: list[dict[str, Any]], wanted: str) -> None:
    """The data of all members, each distinct preparation made once; the members find them in the cache.

    wanted: the objective. UserError if it needs held-out rows and there are none.
    """
    done = set()
    for config in configs:
        key = repr((config["data"], config["model"]["path"], config["model"]["revision"], config["task"]["name"],
                    config["train"]["max_length"], config["train"]["packing"], config["seed"]))  # fmt: skip
        if key in done:
            continue
        done.add(key)
        report = json.loads((job.prepared_data(config) / "data_report.json").read_text(encoding="utf-8"))
        if report["validation"] == 0 and objective.while_training(wanted):
            raise UserError(
                f"sweep.objective={wanted}: no row is held out; set data.validation_share or data.validation"
            )
