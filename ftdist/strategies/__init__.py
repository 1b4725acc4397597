"""Strategies: one function that returns data. The shared contract, and how a strategy is found by its name.

A strategy of another package needs no edit here. It has

- a function `recipe(base: Base, *, key: type, ...) -> Recipe`; its keyword-only parameters are the keys of `strategy:`;
- an entry point in the group `ftdist.strategies` that gives the function a name;
- a YAML file `strategy/<choice>.yaml` with `name: <entry point>` and the defaults, in a folder given with
  `--config-dir`, or in a package named by an entry point in the group `ftdist.conf`.

A strategy that has to measure the weights before any rank starts has a second function beside it,
`prepare(base, model_path, output_dir, processes, *, key: type, ...) -> dict`: the keys that it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ftdist.errors import UserError
from ftdist.schema import nearest

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Base:
    """What a strategy may know of the model that it is given."""

    shapes: Mapping[str, tuple[int, ...]]  # parameter name → shape
    dtype: str  # of the computation: float32, bfloat16 or float16
    storage: str  # in which 4-bit weights are stored: uint8, or `dtype` where the engine shards weights
    measured: bool  # False while planning: `prepare` has not run, only the number of trained weights matters

    def nf4(self, double_quantization: bool) -> dict[str, Any]:
        """Keyword arguments of BitsAndBytesConfig for 4-bit NormalFloat weights (Dettmers et al. 2023, section 3)."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quantization,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": self.storage,
        }


@dataclass(frozen=True)
class Recipe:
    """How the base weights load, what is put around them, what is trained.

    `quantization` and `peft` are keyword arguments of transformers' BitsAndBytesConfig and of PEFT's config class
    (with its `peft_type`); the config objects themselves are welcome and become such mappings. Plain data, so that
    a plan counts parameters without importing torch.
    """

    quantization: Mapping[str, Any] | Any | None = None
    peft: Mapping[str, Any] | Any | None = None
    trainable: frozenset[str] | None = None  # parameter names left unfrozen; None: as loaded
    callbacks: tuple[TrainerCallback, ...] = ()

    def __post_init__(self) -> None:
        for name in ("quantization", "peft"):
            value = getattr(self, name)
            if hasattr(value, "to_dict"):
                object.__setattr__(self, name, value.to_dict())


def find(name: str | None) -> Callable[..., Recipe]:
    """The function of the strategy `name`: a file in this folder, else an installed entry point."""
    own = sorted(
        f.name[:-3] for f in resources.files(__package__).iterdir() if f.name.endswith(".py") and f.name[0] != "_"
    )
    if name in own:
        function: Callable[..., Recipe] = import_module(f"{__package__}.{name}").recipe
        return function
    points = {point.name: point for point in entry_points(group="ftdist.strategies")}
    if name not in points:
        raise UserError(f"strategy.name={name}: no such strategy; {nearest(str(name), [*own, *points])}")
    loaded: Callable[..., Recipe] = points[name].load()
    return loaded


def preparation(recipe: Callable[..., Recipe]) -> Callable[..., dict[str, Any]] | None:
    """The `prepare` beside a strategy's function, if it has one."""
    return getattr(import_module(recipe.__module__), "prepare", None)
