"""QLoRA (Dettmers et al. 2023): LoRA adapters on a base in 4-bit NormalFloat."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from ftdist.strategies import Base, Recipe, lora
from ftdist.strategies.lora import prepare

__all__ = ["prepare", "recipe"]


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
    double_quantization: bool,
) -> Recipe:
    """LoRA's recipe on NF4 weights, computed in `base.dtype` and stored as the engine can shard them."""
    adapters = lora.recipe(
        base,
        r=r,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        top_percent=top_percent,
        scan=scan,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    return replace(adapters, quantization=base.nf4(double_quantization))
