"""QLoRA (Dettmers et al. 2023): LoRA adapters on a base in 4-bit NormalFloat."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from ftdist.strategies import Base, Recipe, lora


def recipe(
    base: Base,
    *,
    r: Annotated[int, Field(ge=1)],
    alpha: Annotated[float, Field(gt=0)],
    dropout: Annotated[float, Field(ge=0, lt=1)],
    target_modules: str | list[str],
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
        target_modules=target_modules,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    return replace(adapters, quantization=nf4(base, double_quantization))


def nf4(base: Base, double_quantization: bool) -> dict[str, object]:
    """Keyword arguments of BitsAndBytesConfig for 4-bit NormalFloat weights."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quantization,
        "bnb_4bit_compute_dtype": base.dtype,
        "bnb_4bit_quant_storage": base.storage,
    }
