"""LoRA (Hu et al. 2021), with rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ftdist.strategies import Base, Recipe


def recipe(
    base: Base,  # noqa: ARG001  (the contract's one argument; nothing to decide from it)
    *,
    r: Annotated[int, Field(ge=1)],
    alpha: Annotated[float, Field(gt=0)],
    dropout: Annotated[float, Field(ge=0, lt=1)],
    target_modules: str | list[str],
    use_rslora: bool,
    use_dora: bool,
) -> Recipe:
    """Adapters of rank `r` on the target modules; the base is frozen."""
    return Recipe(
        peft={
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": target_modules,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
        }
    )
