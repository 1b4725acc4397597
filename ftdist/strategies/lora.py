"""LoRA (Hu et al. 2021), with rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ftdist.errors import UserError
from ftdist.strategies import Base, Recipe, spectrum


def recipe(
    base: Base,
    *,
    r: Annotated[int, Field(ge=1)],
    alpha: Annotated[float, Field(gt=0)],
    dropout: Annotated[float, Field(ge=0, lt=1)],
    targets: str | list[str],
    top_percent: float | None,
    scan: str | None,
    use_rslora: bool,
    use_dora: bool,
) -> Recipe:
    """Adapters of rank `r` on the target modules; the base is frozen."""
    if targets == "spectrum":
        modules: str | list[str] = spectrum.modules(base, scan, top_percent)
    elif top_percent is not None or scan is not None:
        raise UserError(
            "strategy.top_percent, strategy.scan: only read with strategy.targets=spectrum; set it or leave them out"
        )
    else:
        modules = targets
    return Recipe(
        peft={
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": modules,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
        }
    )


def prepare(
    base: Base,
    model_path: str,
    output_dir: Path,
    processes: int,
    *,
    targets: str | list[str],
    top_percent: float | None,
    scan: str | None,
) -> dict[str, Any]:
    """Scan the weights before any rank starts, if adapters go where the SNR is best."""
    if targets != "spectrum":
        return {}
    return spectrum.prepare(
        base,
        model_path,
        output_dir,
        processes,
        parameters=None,
        scan=scan,
        threshold="reference",
        group_experts=True,
        **spectrum.of_matrices(top_percent),
    )
