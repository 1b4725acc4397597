"""What a name in a checkpoint means (type, embedding, head, expert), and its name in the loaded model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

Shape = tuple[int, ...]
Threshold = Literal["reference", "marchenko_pastur"]
THRESHOLDS: tuple[Threshold, ...] = ("reference", "marchenko_pastur")

_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}
_HEADS = {"lm_head", "embed_out", "output"}
_EXPERT = re.compile(r"(?P<block>.*\.experts)\.\d+\.(?P<part>[^.]+)$")
# transformers 5 holds the experts of a layer in two tensors: gate and up beside each other, and down
_FUSED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
          "w2": "down_proj", "down_proj": "down_proj"}  # fmt: skip


def is_scanned(name: str, shape: Shape) -> bool:
    """Matrices and vectors named `.weight`, and experts stacked in a 3-D tensor; no bias, no convolution."""
    if len(shape) == 3:
        return "experts" in name.split(".") and not name.endswith("bias")
    return name.endswith(".weight") and len(shape) in (1, 2) and 0 not in shape


def module_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def module_type(module: str, *, group_experts: bool) -> str:
    """The reference tool's type: the name after the first number. `group_experts`: without the expert's."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return module
    kind = ".".join(parts[number + 1 :]) or ".".join(parts[:number])
    return re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.", kind) if group_experts else kind


def layer(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts `layers.10` behind `layers.9`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def embeddings(shapes: Mapping[str, Shape]) -> list[str]:
    """Parameters of the token embedding: a matrix of that name outside the layers."""
    return [name for name, shape in shapes.items() if _is_outer_matrix(name, shape, _EMBEDDINGS)]


def heads(shapes: Mapping[str, Shape]) -> list[str]:
    """Parameters of the output head: a matrix of that name, with the embedding's rows; none if it is tied."""
    rows = {shapes[name][0] for name in embeddings(shapes)}
    return [
        name
        for name, shape in shapes.items()
        if _is_outer_matrix(name, shape, _HEADS) and (not rows or shape[0] in rows)
    ]


def is_embedding_or_head(module: str) -> bool:
    return layer(module) is None and module.rpartition(".")[2] in _EMBEDDINGS | _HEADS


def is_head(module: str) -> bool:
    return layer(module) is None and module.rpartition(".")[2] in _HEADS


def _is_outer_matrix(name: str, shape: Shape, known: set[str]) -> bool:
    module = module_name(name)
    return len(shape) == 2 and name.endswith(".weight") and layer(module) is None and _last(module) in known


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def resolver(parameters: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A function: module as named on disk or in a scan -> its parameters in the loaded model, weight first.

    Knows the differences between the two: a first part that only the loaded model has (`model.`,
    `transformer.`), and experts that transformers 5 stacks when it loads (`block_sparse_moe.experts.0.w1`
    becomes part of `mlp.experts.gate_up_proj`). Empty for a module that the model does not have.
    """
    known = set(parameters)
    without_first = {name.split(".", 1)[1]: name for name in known if "." in name}

    def resolve(module: str) -> tuple[str, ...]:
        for candidate in _candidates(module):
            weights = [f"{candidate}.weight", candidate]
            for weight in [*weights, *(without_first.get(name, "") for name in weights)]:
                if weight in known:
                    stem = module_name(weight)
                    biases = (f"{stem}.bias", f"{stem}_bias")
                    return (weight, *(bias for bias in biases if bias in known and bias != weight))
        return ()

    return resolve


def _candidates(module: str) -> list[str]:
    names = [module, module.replace(".block_sparse_moe.", ".mlp.")]
    for name in list(names):
        expert = _EXPERT.match(name)
        if expert and expert["part"] in _FUSED:
            names.append(f"{expert['block']}.{_FUSED[expert['part']]}")
    return names
