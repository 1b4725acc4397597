"""Alignment by preferences: the keys of `task=dpo` and what they ask for. Imports no torch: the plan reads it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist.errors import UserError

Loss = Literal["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
               "apo_down", "aot", "aot_unpaired", "discopop", "sigmoid_norm", "odds", "sft"]  # fmt: skip
SORTED = ("aot", "aot_unpaired")  # compare the distributions of a micro-batch
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *SORTED)  # read label_smoothing
SHIFTED = ("sigmoid", "sigmoid_norm")  # read margin
REFERENCE_FREE = ("sigmoid", "sigmoid_norm", "hinge", "odds", "sft")  # mean something without a reference
REFERENCES = ("auto", "cached", "adapter_off", "copy", "none")
ELSEWHERE = {  # names of other trainers' losses, and what there is
    "orpo": "use task=orpo (task.loss_type=[sft,odds] task.reference=none)",
    "simpo": "use task=simpo (task.loss_type=sigmoid_norm task.reference=none with a task.margin)",
    **dict.fromkeys(
        ("kto", "kto_pair", "apo_zero_unpaired"),
        "learns from single answers that are good or bad, not from pairs, and is not there; on pairs use apo_zero or "
        "bco_pair, which also take each answer by itself",
    ),
    "cpo": "use task.loss_type=[sft,sigmoid] task.reference=none",
    "slic": "use task.loss_type=hinge",
    "dpo": "use task.loss_type=sigmoid",
}
MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "logps/rejected")  # fmt: skip  # TRL's names


def settings(
    *,
    name: Literal["dpo"],
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)],
    loss_type: Loss | Annotated[list[Loss], Field(min_length=1)],
    loss_weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None,
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)],
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)],
    reference: Literal["auto", "cached", "adapter_off", "copy", "none"],
    reference_model: str | None,
    disable_dropout: bool,
    chosen_drop: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
) -> None:
    """The keys of `task=dpo`."""


def refuse_by_name(task: dict[str, Any]) -> None:
    """UserError for the name of a loss that other trainers have, with what there is instead."""
    wanted = task.get("loss_type")
    for name in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(name, str) and name in ELSEWHERE:
            raise UserError(f"task.loss_type={name}: {ELSEWHERE[name]}")


def weighted_losses(task: dict[str, Any]) -> list[tuple[str, float]]:
    """The losses that are added up, each with its weight."""
    names = [task["loss_type"]] if isinstance(task["loss_type"], str) else list(task["loss_type"])
    return list(zip(names, task["loss_weights"] or [1.0] * len(names), strict=True))


def check(task: dict[str, Any], train: dict[str, Any], model: dict[str, Any]) -> None:
    """UserError for values that fit their types and not one another. Called when the types are checked."""
    names = [task["loss_type"]] if isinstance(task["loss_type"], str) else list(task["loss_type"])
    if task["loss_weights"] is not None and len(task["loss_weights"]) != len(names):
        raise UserError(
            f"task.loss_weights={task['loss_weights']}: {len(names)} losses in task.loss_type; give a weight for each"
        )
    smoothing = task["label_smoothing"]
    if smoothing and not set(names) & set(SMOOTHED):
        raise UserError(f"task.label_smoothing={smoothing}: read by {', '.join(SMOOTHED)} alone; set it to 0")
    if not smoothing and "exo_pair" in names:
        raise UserError("task.label_smoothing=0.0: exo_pair needs one above 0; the paper uses 1e-3")
    if task["margin"] and not set(names) & set(SHIFTED):
        raise UserError(f"task.margin={task['margin']}: read by {', '.join(SHIFTED)} alone; set it to 0")
    kinds = ["train"] if train["eval_strategy"] == "no" else ["train", "eval"]
    alone = [key for key in (f"per_device_{kind}_batch_size" for kind in kinds) if train[key] < 2]
    for name in sorted(set(names) & set(SORTED) if alone else ()):
        raise UserError(
            f"train.{alone[0]}=1: task.loss_type={name} sorts the pairs of a micro-batch; use 2 or "
            "more, or task.loss_type=sigmoid"
        )
    if task["reference"] == "none":
        for name in names:
            if name not in REFERENCE_FREE:
                raise UserError(
                    f"task.reference=none: {name} compares with a reference; use one of {', '.join(REFERENCE_FREE)}"
                )
    if task["reference_model"] is not None and task["reference"] not in ("auto", "cached", "copy"):
        raise UserError(
            f"task.reference_model={task['reference_model']}: not read with task.reference={task['reference']}; "
            "use cached (its log-probabilities once) or copy (kept beside the model)"
        )
    if model["dropout"] and task["disable_dropout"]:
        raise UserError(f"model.dropout={model['dropout']}: task=dpo turns dropout off; set task.disable_dropout=false")
    if train["packing"]:
        raise UserError("train.packing=true: a pair of answers is not packed; use train.packing=false")
    if train["loss_type"] != "nll":
        raise UserError(f"train.loss_type={train['loss_type']}: task=dpo has its own; use task.loss_type")
    if train.get("label_smoothing_factor"):
        raise UserError("train.label_smoothing_factor: not read by task=dpo; use task.label_smoothing")


def reference_kind(task: dict[str, Any], adapters: bool, goes_on: bool) -> str:
    """How the reference is had: `auto` resolved. goes_on: the adapter of an earlier run is trained further, so that
    the model without it is not what training starts from."""
    wanted: str = task["reference"]
    if wanted == "adapter_off":
        if not adapters:
            raise UserError("task.reference=adapter_off: this strategy has no adapter; use cached or copy")
        if goes_on:
            raise UserError(
                "task.reference=adapter_off: the adapter goes on from an earlier run, and without it the model is not "
                "the one that training starts from; use cached or copy"
            )
    if wanted != "auto":
        return wanted
    return "adapter_off" if adapters and not goes_on and task["reference_model"] is None else "cached"


def column_bytes(*rows: int) -> int:
    """Bytes of the reference's log-probabilities of so many pairs: two float32 numbers each."""
    return 8 * sum(rows)


def key(*facts: Any) -> str:
    """A name for the reference's log-probabilities, from all that decides them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]
