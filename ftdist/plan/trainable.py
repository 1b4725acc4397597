"""How many parameters a strategy trains, by type of module, from shapes alone."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from ftdist.errors import UserError
from ftdist.plan.architectures import Shape
from ftdist.plan.shapes import Shapes, meta_model
from ftdist.plan.states import Held

# Fields of peft.LoraConfig that decide what is trained and are computed here, and those that do not.
_COUNTED = {
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "use_dora",
    "lora_bias",
}
_WITHOUT_EFFECT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "auto_mapping", "lora_alpha", "lora_dropout", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITIALS = (
    True,
    False,
    "gaussian",
    "pissa",
    "olora",
    "eva",
    "loftq",
    "corda",
    "orthogonal",
)  # all train A and B


def module_type(name: str) -> str:
    """Spectrum's type of a module or parameter: the name after the first number, no `.weight`."""
    name = re.sub(r"\.(weight|bias)$", "", name)
    after_number = re.search(r"(?:^|\.)\d+\.(.+)", name)
    return after_number[1] if after_number else name


def trainable_parameters(
    shapes: Shapes, *, peft: dict[str, Any] | None, trainable: Collection[str] | None
) -> dict[str, int]:
    """Type of module -> number of trained parameters, in the order of the model.

    `peft`: the fields of the PeftConfig around the model, with `peft_type`. `trainable`: exact parameter
    names that stay unfrozen. Neither: every parameter. UserError for a name or a target that matches nothing.
    """
    adapters, unfrozen = trained_tensors(shapes, peft=peft, trainable=trainable)
    table: dict[str, int] = {}
    counts = {module: sum(map(math.prod, tensors.values())) for module, tensors in adapters.items()}
    for name in unfrozen:
        counts[name] = math.prod(shapes.architecture.parameters[name])
    order = [*_modules(shapes.architecture.parameters, shapes.architecture.linear), *shapes.architecture.parameters]
    rank = {name: number for number, name in enumerate(order)} if adapters else {}
    for name in sorted(counts, key=lambda name: rank.get(name, 0)):
        if counts[name]:
            kind = module_type(name)
            table[kind] = table.get(kind, 0) + counts[name]
    return table


Adapters = dict[str, dict[str, Shape]]  # module -> name of a new tensor below it -> shape


def trained_tensors(
    shapes: Shapes, *, peft: dict[str, Any] | None, trainable: Collection[str] | None
) -> tuple[Adapters, list[str]]:
    """The tensors that adapters add, and the names of the model's own that are trained, in the order of the model."""
    assert peft is None or trainable is None, "adapters freeze the base; there is nothing left to name"
    if peft is not None:
        # peft also reaches into experts that share one 3-D tensor, by rules of each model class
        fused = any(len(shape) > 2 for shape in shapes.architecture.parameters.values())
        return _lora(shapes, peft) if _is_plain_lora(peft) and not fused else _made_by_peft(shapes, peft)
    known = shapes.architecture.parameters
    if trainable is None:
        return {}, list(known)
    names = {shapes.architecture.tied.get(name, name) for name in trainable}
    for name in sorted(names - set(known)):
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
        raise UserError(f"trainable parameter {name}: the model has none of that name; the nearest is {near[0]}")
    return {}, [name for name in known if name in names]


def held_tensors(
    shapes: Shapes, *, peft: dict[str, Any] | None, trainable: Collection[str] | None, quantized: Collection[str]
) -> list[Held]:
    """Every tensor of the model with its adapters, as `named_parameters` has them. `quantized`: modules in 4 bit."""
    adapters, names = trained_tensors(shapes, peft=peft, trainable=trainable)
    unfrozen = set(names)
    waiting = dict(adapters)
    held = []
    known = list(shapes.architecture.parameters)
    for number, name in enumerate(known):
        module = name.rpartition(".")[0]
        in_4bit = module in quantized and name.endswith(".weight")
        held.append(Held(name, shapes.architecture.parameters[name], name in unfrozen, in_4bit))
        if number + 1 == len(known) or known[number + 1].rpartition(".")[0] != module:
            added = waiting.pop(module, {})
            held += [Held(f"{module}.{own}", shape, True) for own, shape in added.items()]
    for module, added in waiting.items():  # of a tied head, which has no tensor of its own
        held += [Held(f"{module}.{own}", shape, True) for own, shape in added.items()]
    return held


def _is_plain_lora(peft: dict[str, Any]) -> bool:
    if str(peft["peft_type"]).rpartition(".")[2] != "LORA" or peft.get("target_modules") is None:
        return False
    if str(peft.get("init_lora_weights", True)).startswith("pissa_niter_"):
        peft = peft | {"init_lora_weights": "pissa"}
    if peft.get("init_lora_weights", True) not in _INITIALS:
        return False
    return not any(v for k, v in peft.items() if k not in _COUNTED | _WITHOUT_EFFECT | {"init_lora_weights"})


def _lora(shapes: Shapes, peft: dict[str, Any]) -> tuple[Adapters, list[str]]:
    """LoRA on W (out × in): A (r × in), B (out × r); DoRA adds a magnitude per output (arXiv 2402.09353)."""
    architecture = shapes.architecture
    modules = _modules(architecture.parameters, architecture.linear)
    saved = list(peft.get("modules_to_save") or ())
    targets = [name for name in modules if _is_target(name, peft, saved, shapes)]
    if not targets:
        kinds = sorted({module_type(name) for name in architecture.linear})
        raise UserError(
            f"strategy.target_modules={_shown(peft['target_modules'])}: matches no layer of the model; its "
            f"linear layers are {', '.join(kinds)}"
        )
    made: Adapters = {}
    unfrozen: set[str] = set()
    bias = peft.get("bias") or "none"
    for name in targets:
        size = architecture.linear.get(name) or architecture.embeddings.get(name)
        if size is None:
            raise UserError(
                f"strategy.target_modules={_shown(peft['target_modules'])}: also matches {name}, which is "
                "neither a linear layer nor an embedding; name the layers more exactly"
            )
        fan_in, fan_out = size
        rank = _rank(name, peft)
        tensors: dict[str, Shape] = {"lora_A.default.weight": (rank, fan_in), "lora_B.default.weight": (fan_out, rank)}
        if peft.get("lora_bias"):
            tensors["lora_B.default.bias"] = (fan_out,)
        if peft.get("use_dora"):
            tensors["lora_magnitude_vector.default.weight"] = (fan_out,)
        made[name] = tensors
        if bias == "lora_only" and f"{name}.bias" in architecture.parameters:
            unfrozen.add(f"{name}.bias")
    if bias == "all":
        unfrozen |= {name for name in architecture.parameters if name.endswith(".bias")}
    for name in modules:
        if any(name.endswith(part) for part in saved):  # peft compares the end of the name, dot or not
            made[name] = _copies(name, shapes)
            unfrozen -= {own for own in unfrozen if own.startswith(f"{name}.")}
    return made, [name for name in architecture.parameters if name in unfrozen]


def _modules(parameters: Iterable[str], linear: Iterable[str]) -> list[str]:
    """Every module that holds parameters, itself or below, in the order of the model."""
    names: dict[str, None] = {}
    for name in [*parameters, *(f"{module}.weight" for module in linear)]:
        parts = name.split(".")[:-1]
        for length in range(1, len(parts) + 1):
            names[".".join(parts[:length])] = None
    return list(names)


def _is_target(name: str, peft: dict[str, Any], saved: list[str], shapes: Shapes) -> bool:
    """The rule of peft's `check_target_module_exists` and of its `all-linear`."""
    if any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in saved):
        return False
    excluded = peft.get("exclude_modules")
    if excluded and _matches(name, excluded):
        return False
    target = peft["target_modules"]
    if isinstance(target, str) and target.lower() == "all-linear":
        return name in shapes.architecture.linear and name != shapes.architecture.head
    return _matches(name, target)


def _matches(name: str, pattern: str | Collection[str]) -> bool:
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as failure:
            raise UserError(f"strategy.target_modules={pattern}: no valid regular expression ({failure})")
    return any(name == part or name.endswith(f".{part}") for part in pattern)


def _rank(name: str, peft: dict[str, Any]) -> int:
    for pattern, rank in (peft.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return int(rank)
    return int(peft["r"])


def _copies(module: str, shapes: Shapes) -> dict[str, Shape]:
    """The tensors of a module that peft copies; the copy of a tied head is a tensor of its own."""
    prefix = f"{module}."
    own = {n: shape for n, shape in shapes.architecture.parameters.items() if n.startswith(prefix)}
    if not own and module in shapes.architecture.linear:
        fan_in, fan_out = shapes.architecture.linear[module]
        own = {f"{prefix}weight": (fan_out, fan_in)}
    return {f"modules_to_save.default.{name.removeprefix(prefix)}": shape for name, shape in own.items()}


def _shown(target: Any) -> str:
    return target if isinstance(target, str) else "[" + ",".join(sorted(target)) + "]"


def _made_by_peft(shapes: Shapes, peft: dict[str, Any]) -> tuple[Adapters, list[str]]:
    """Any other adapter: peft itself puts it around a model without memory. Slow: imports transformers."""
    from peft import get_peft_config, get_peft_model

    model = meta_model(shapes.config, shapes.directory, trust_remote_code=True)
    modules = sorted(_modules(shapes.architecture.parameters, shapes.architecture.linear), key=len, reverse=True)
    try:
        adapted = get_peft_model(model, get_peft_config(dict(peft)), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as failure:
        reason = " ".join(str(failure).split())[:200]
        fix = "; set strategy.dropout=0" if "lora_dropout" in reason else ""
        raise UserError(f"strategy: peft refuses its adapter for this model: {reason}{fix}")
    made: Adapters = {}
    unfrozen = set()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            inner = name.removeprefix("base_model.model.")
            if inner.replace(".base_layer.", ".") in shapes.architecture.parameters:
                unfrozen.add(inner.replace(".base_layer.", "."))
                continue
            home = next((module for module in modules if inner.startswith(f"{module}.")), "")
            made.setdefault(home, {})[inner.removeprefix(f"{home}.")] = tuple(parameter.shape)
    return made, [name for name in shapes.architecture.parameters if name in unfrozen]
