"""Bytes of the model states on one rank: weights, quantisation constants, gradients, optimizer states. Exact.

The rules are those of torch, bitsandbytes 0.50 and DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py);
`tests/bench/plan_memory.py` counts the live tensors of real ranks against them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ftdist.plan.architectures import Architecture

Shape = tuple[int, ...]
WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a constant, constants that share one (bitsandbytes' defaults)
CODES = 4 * 16, 4 * 256  # the 4-bit and the 8-bit code book, float32, one each for every tensor
STATE_BLOCK, SMALLEST_8BIT = 256, 4096  # of bitsandbytes' 8-bit optimizers, elements
FUSED_BUFFERS = 2  # `inv_freq` and its original
# transformers' Trainer.get_decay_parameter_names: what these match is a parameter group of its own.
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)|(?:^|\.)ln_\w+\.")


@dataclass(frozen=True)
class Held:
    """A tensor that every rank has, whole or in shards."""

    name: str
    shape: Shape
    trained: bool
    quantized: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class States:
    """Bytes on the rank that holds most. `host` is what an offloading engine keeps in the host's memory instead."""

    weights: int = 0
    quantization: int = 0
    gradients: int = 0  # at the end of a backward pass
    optimizer: int = 0
    persistent: int = 0  # ZeRO-3: small parameters that stay whole, besides their shards
    buckets: int = 0  # communication buffers while gradients are reduced
    standing_gradients: int = 0  # of `gradients`, what is held between steps too
    standing_buckets: int = 0
    saved: int = 0  # of the optimizer, what this rank writes into a checkpoint
    step: int = 0  # more bytes while the optimizer works
    load: int = 0  # more bytes than `weights` while the model is loaded or the engine is made
    host: dict[str, int] = field(default_factory=dict)
    known: bool = True  # False: an optimizer whose states are not known here, counted as two float32 moments


@dataclass(frozen=True)
class Penalty:
    """Elastic weight consolidation, as far as it decides memory (`ftdist/ewc.py`)."""

    drift: bool  # of merged weights: a Fisher of the adapted base weights, no anchor
    dtype: str  # of the Fisher
    batch: int  # rows whose gradients are added before squaring
    measured: bool  # by this run


def penalty_bytes(penalty: Penalty, held: Iterable[Held], stage: int, world: int) -> tuple[int, int, int, int]:
    """Bytes that a rank holds for the penalty; more of them while it measures; of all files in the run directory;
    of those in the cache.

    The anchor is in float32, like the optimizer's own weights; the Fisher is in float32 while it is added up.
    """
    wanted = [h for h in held if h.trained]
    width = WIDTH[penalty.dtype]
    if penalty.drift:
        a = {h.name.partition(".lora_A.")[0]: h.shape for h in wanted if ".lora_A." in h.name}
        b = {h.name.partition(".lora_B.")[0]: h.shape for h in wanted if ".lora_B." in h.name}
        sizes = {module: (b[module][0], shape[1]) for module, shape in a.items() if module in b}
        share = sum(math.ceil(rows / world) * columns for rows, columns in sizes.values())
        every = sum(map(math.prod, sizes.values()))
        largest = max(map(math.prod, sizes.values()), default=0)
        standing = share * width + 4 * (2 * sum(h.numel for h in wanted) + 1)  # adapters' gradients, and their start
        files = every * width
    else:
        if stage == 0:
            share = sum(h.numel for h in wanted)
        elif stage < 3:
            share = sum(math.ceil(sum(h.numel for h in g) / (2 * world)) * 2 for g in groups(wanted))
        else:
            share = sum(math.ceil(h.numel / world) for h in wanted)
        every = sum(h.numel for h in wanted)
        largest = max((h.numel for h in wanted), default=0)
        standing = share * (width + 4)
        files = every * (width + 4)
    if not penalty.measured:
        return standing, 0, files, 0
    measuring = share * (4 - width) + share * 4 * (penalty.batch > 1) + 3 * 4 * largest
    return standing, measuring, files, 4 * every


def quantized_bytes(numel: int, storage: str, double: bool) -> tuple[int, int]:
    """Bytes of a tensor in 4 bit, and of what is needed to read it (Dettmers et al. 2023, section 3)."""
    width = WIDTH[storage]
    packed = (numel + 1) // (2 * width) * width
    blocks = math.ceil(numel / BLOCK)
    if not double:
        return packed, 4 * blocks + CODES[0]
    return packed, blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 + sum(CODES)


def quantized_modules(architecture: Architecture, skip: Collection[str] | None) -> set[str]:
    """Linear modules that transformers makes 4-bit ones; `skip`: `llm_int8_skip_modules`, None for its default."""
    patterns = list(skip or ())
    if skip is None:
        last = list(architecture.parameters)[-1]
        kept = {*architecture.tied, *architecture.tied.values(), last, architecture.head or last}
        patterns = [name.removesuffix(".weight") for name in kept]
    # as transformers' `should_convert_module`; module names have no regular expression in them but the dot
    return {
        name
        for name in architecture.linear
        if not any(name.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) for key in patterns)
    }


def moments(numel: int, shape: Shape, width: int, optim: str) -> tuple[int, bool]:
    """Bytes of an optimizer's state for one tensor that it works on, and whether the rule is known.

    A sharded engine hands it one flat float32 tensor; without one it gets the parameters themselves.
    """
    name = optim.removeprefix("paged_")
    eight = "8bit" in name and "torch" not in name
    slots = {"sgd": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3, "adamw": 2}
    kind = next((kind for kind in slots if name.startswith(kind)), None)
    if name == "adafactor":
        if len(shape) < 2:
            return 4 * numel, True
        rows = numel // shape[-1]
        return 4 * (rows + numel // shape[-2]), True
    known = name in (
        "sgd", "adagrad", "rmsprop", "ademamix", "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit",
        "adamw_32bit", "lion_32bit", "lion_8bit", "ademamix_32bit", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
    )  # fmt: skip
    count = slots[kind] if kind is not None else 2
    if eight and numel >= SMALLEST_8BIT:
        # codes, a float32 constant per block, and the code book, which all tensors share
        return count * (numel + 4 * math.ceil(numel / STATE_BLOCK)), known
    if "bnb" in name or name in ("lion_32bit", "adamw_32bit", "ademamix_32bit") or eight:
        return 4 * count * numel, known  # bitsandbytes: float32 whatever the parameter is
    return count * width * numel + (0 if kind == "sgd" else 4), known  # and a step counter


def states(
    held: Iterable[Held],
    *,
    stage: int,
    world: int,
    dtype: str,
    loaded: str,
    trained: str,
    storage: str,
    double_quantization: bool,
    optim: str,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    bucket: int = 500_000_000,
    buckets: int = 1,
    persistence: int = 100_000,
    sub_group: int = 1_000_000_000,
    buffers: int = 0,
) -> States:
    """What one of `world` ranks holds.

    dtype: of the computation; loaded, trained: of frozen and of trained weights; storage: of 4-bit weights;
    bucket, persistence, sub_group: DeepSpeed's reduce_bucket_size, param_persistence_threshold and sub_group_size, in
    elements; buckets: how many reduction buffers there are; buffers: bytes of tensors that are no parameters.
    """
    held = list(held)
    if stage:
        loaded = dtype if dtype != "float32" else loaded  # DeepSpeed casts the whole module
        trained = dtype if dtype != "float32" else trained
    width = {True: WIDTH[trained], False: WIDTH[loaded]}
    packed = {h.name: quantized_bytes(h.numel, storage, double_quantization) for h in held if h.quantized}
    made = States(weights=buffers)
    made.quantization = sum(constants for _, constants in packed.values())
    if stage < 3:
        whole = {h.name: packed[h.name][0] if h.quantized else h.numel * width[h.trained] for h in held}
        made.weights += sum(size for name, size in whole.items())
    else:
        _sharded_weights(made, held, packed, width, WIDTH[storage], world, persistence, offload_parameters)
    wanted = [h for h in held if h.trained]
    if stage == 0:
        _plain(made, wanted, WIDTH[trained], world, optim)
    elif stage < 3:
        _zero12(made, wanted, WIDTH[dtype], world, optim, stage, offload_optimizer, bucket, buckets)
    else:
        _zero3(made, wanted, WIDTH[dtype], world, optim, offload_optimizer, bucket, sub_group)
    return made


def groups(wanted: Iterable[Held]) -> list[list[Held]]:
    """The Trainer's parameter groups: decayed and not; DeepSpeed drops an empty one."""
    both: tuple[list[Held], list[Held]] = ([], [])
    for h in wanted:
        both[bool(UNDECAYED.search(h.name.lower()))].append(h)
    return [group for group in both if group]


def _plain(made: States, wanted: list[Held], width: int, world: int, optim: str) -> None:
    made.gradients = sum(h.numel for h in wanted) * width
    for h in wanted:
        size, known = moments(h.numel, h.shape, width, optim)
        made.optimizer += size
        made.known &= known
    made.saved = made.optimizer
    if optim == "adamw_torch":  # torch's foreach implementation: one more value of each parameter at once
        made.step = made.gradients
    if world > 1:
        made.standing_buckets = made.buckets = made.gradients  # DistributedDataParallel's own copy


def _zero12(
    made: States,
    wanted: list[Held],
    width: int,
    world: int,
    optim: str,
    stage: int,
    offload: bool,
    bucket: int,
    buckets: int,
) -> None:
    share = 0  # elements of this rank, padding included
    largest = 0
    held_by = [0] * world  # elements of whole gradients that reach into a rank's part
    host: dict[str, int] = {}
    for group in groups(wanted):
        numel = sum(h.numel for h in group)
        aligned = math.ceil(numel / (2 * world)) * 2 * world
        part = aligned // world
        made.weights += (aligned - numel) * width  # the flat buffer that the parameters are views of
        share += part
        largest = max(largest, part)
        start = 0
        for h in group:
            for rank in range(start // part, min((start + h.numel - 1) // part, world - 1) + 1):
                held_by[rank] += h.numel
            start += h.numel
        size, known = moments(part, (part,), 4, optim)
        made.known &= known
        made.optimizer += 4 * part + size
    every = sum(h.numel for h in wanted)
    made.gradients = max(held_by) * width
    made.buckets = bucket * width * buckets
    made.load = every * width  # the flat buffer is made beside the parameters
    # While a group is updated its gradient is flattened, and in half precision cast.
    made.step = largest * (width + (4 if width < 4 else 0) + (4 if optim == "adamw_torch" else 0))
    if stage == 1:  # every rank keeps all gradients until they have been reduced
        made.buckets += max(every * width - made.gradients, 0)
    made.saved = made.optimizer
    if offload:
        host["optimizer"] = made.optimizer + share * (4 + width)  # float32 gradients and a cast copy of the weights
        made.optimizer = made.step = 0
        largest_tensor = max((h.numel for h in wanted), default=0)
        made.gradients = largest_tensor * width
    made.host = host


def _sharded_weights(
    made: States,
    held: list[Held],
    packed: Mapping[str, tuple[int, int]],
    width: Mapping[bool, int],
    storage: int,
    world: int,
    persistence: int,
    offload: bool,
) -> None:
    shards = persistent = whole = 0
    for h in held:
        size = storage if h.quantized else width[h.trained]
        numel = packed[h.name][0] // storage if h.quantized else h.numel
        part = math.ceil(numel / world) * size
        shards += part
        whole += numel * size
        if numel <= persistence:
            persistent += numel * size
    made.persistent = persistent
    if packed:  # zero.Init is not used for 4-bit weights: every rank first holds the whole model
        made.load = whole if offload else whole - shards
    if offload:
        made.host["weights"] = shards
    else:
        made.weights += shards


def _zero3(
    made: States,
    wanted: list[Held],
    width: int,
    world: int,
    optim: str,
    offload: bool,
    bucket: int,
    sub_group: int,
) -> None:
    parts: list[int] = []
    for group in groups(wanted):
        filled = 0
        for h in group:
            filled += math.ceil(h.numel / world)
            if filled >= sub_group:
                parts.append(filled)
                filled = 0
        if filled:
            parts.append(filled)
    share = sum(parts)
    states = 4 * share  # the master weights; a copy even where the weights are float32
    for part in parts:
        size, known = moments(part, (part,), 4, optim)
        made.known &= known
        states += size
    made.saved = states
    made.buckets = made.standing_buckets = bucket * width
    if offload:
        made.host["optimizer"] = states + 4 * share  # and float32 gradients
        made.host["gradients"] = width * share
        return
    made.optimizer = states
    made.gradients = made.standing_gradients = width * share
    largest = max(parts, default=0)
    made.step = largest * (width + (4 if width < 4 else 0) + (4 if optim == "adamw_torch" else 0))


def checkpoint_bytes(*, trained: int, stage: int, world: int, weight_bytes: int, state_bytes: int) -> int:
    """Bytes of one checkpoint over all ranks (`ftdist/state.py`): the trained weights and the optimizer's states.

    trained: elements; weight_bytes: of one of them; state_bytes: `saved` of one rank as `states` has it. ZeRO's states
    hold the weights already, in float32. Without ZeRO every rank has the same, and each writes its share.
    """
    return state_bytes * world if stage else trained * weight_bytes + state_bytes
