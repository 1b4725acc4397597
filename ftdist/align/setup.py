"""What the worker needs for task=dpo: the trainer, its rows, and its keyword arguments from the frozen run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdist import align, models
from ftdist.align.losses import Objective
from ftdist.align.pairs import PairRows, collate_pairs
from ftdist.align.reference import Reference
from ftdist.align.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from ftdist.strategies import Recipe

__all__ = ["PairRows", "PreferenceTrainer", "collate_pairs", "keys"]


def keys(run_dir: Path, config: dict[str, Any], plan: dict[str, Any], token: int, recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments that PreferenceTrainer has beside TokenTrainer's."""
    task = config["task"]

    def load() -> Any:
        wanted = {key: value for key, value in config["model"].items() if key != "architecture"}
        return models.load(**wanted, quantization=recipe.quantization, loaded_dtype=plan["loaded"])

    other = plan["reference"] == "copy"
    return {
        "objective": Objective(align.weighted_losses(task), task["beta"], task["label_smoothing"], task["margin"]),
        "reference": Reference(
            plan["reference"], plan["reference_key"], run_dir, token, load if other else None, is_start=True
        ),
        "disable_dropout": task["disable_dropout"],
        "chosen_drop": task["chosen_drop"],
    }
