"""What the worker needs for task=dpo: the trainer, its batches, and its keyword arguments from the frozen run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdist import align, models, schema, start
from ftdist.align.losses import Objective
from ftdist.align.pairs import collate_pairs
from ftdist.align.reference import Reference
from ftdist.align.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from ftdist.strategies import Recipe


def dpo(
    run_dir: Path, config: dict[str, Any], plan: dict[str, Any], token: int, recipe: Recipe
) -> tuple[type[PreferenceTrainer], Callable[..., Any], dict[str, Any]]:
    """The trainer's class, what makes its batches, and the keyword arguments that it has beside TokenTrainer's."""
    task = config["task"]

    def load() -> Any:
        """The other model; or what training starts from, a second time."""
        model = schema.pick(models.load, config["model"])
        if task["reference_model"] is not None:
            model |= {"path": task["reference_model"], "revision": None}
        made: Any = models.load(**model, quantization=recipe.quantization, loaded_dtype=plan["loaded"])
        adapter = start.adapter(run_dir)
        if adapter is not None and task["reference_model"] is None:
            made = models.apply(made, recipe, plan["trained"], adapter)
        return made

    other = task["reference_model"] is not None
    loads = other or plan["reference"] == "copy"
    named = {
        "objective": Objective(align.weighted_losses(task), task["beta"], task["label_smoothing"], task["margin"]),
        "reference": Reference(
            plan["reference"],
            plan["reference_key"],
            run_dir,
            token,
            load if loads else None,
            is_start=not other and plan["reference"] != "none",
        ),
        "disable_dropout": task["disable_dropout"],
        # how much was lost since the start is known where the reference is the start
        "chosen_drop": task["chosen_drop"] if not other and plan["reference"] != "none" else None,
    }
    return PreferenceTrainer, collate_pairs, named
