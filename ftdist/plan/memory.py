"""Bytes by phase and kind of one rank, of a node's host memory and of the disk, from plain numbers.

A phase is a mapping from a kind to bytes; its sum is the need. Another kind (a reference model, say) is one more entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ftdist.plan.activations import Activations, Family, Setting, Trained, activations, loss
from ftdist.plan.states import (
    WIDTH,
    Held,
    Penalty,
    States,
    checkpoint_bytes,
    penalty_bytes,
    quantized_bytes,
    states,
)

Phase = dict[str, int]
GPU_LIBRARIES = 2_200_000_000  # resident set of a rank with torch's CUDA libraries and DeepSpeed; a band, not a figure
EXACT_BAND, LOOSE_BAND = 0.05, 0.30  # share of what is not a model state
RUNTIME_BAND = 1 / 3  # of a GPU's context and NCCL's buffers, which nobody here has measured


@dataclass(frozen=True)
class Case:
    """Everything that decides what a run needs, as plain numbers and names."""

    held: tuple[Held, ...]
    family: Family | None  # None: no closed form for this model class
    traced: tuple[int, int] | None  # (kept, peak) bytes of one micro-batch of an unknown class, without the loss
    vocabulary: int
    hidden: int
    layers: int
    tied: bool
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    nvme: bool
    world: int
    processes: int  # per node
    dtype: str
    loaded: str
    trained: str
    storage: str
    double_quantization: bool
    optim: str
    batch: int
    accumulation: int
    length: int
    packed: bool
    attention: str
    checkpointing: bool
    adapters: bool
    magnitude: bool
    dropout: float
    eval_batch: int
    generation: tuple[int, int] | None  # (rows, tokens) of a held-out answer batch
    gpu: bool
    runtime: int  # bytes of a device that no tensor holds: CUDA context, NCCL, libraries
    zero: tuple[tuple[str, int], ...]  # DeepSpeed's sizes in elements, and flags
    fused: bool = True  # the loss is made with the output head, a chunk at a time
    background: bool = True  # a checkpoint is written while training goes on
    stored: str = "bfloat16"  # the base's files
    experts: int = 0  # that a token goes through, of a layer's; 0: no mixture
    answers: tuple[int, int] | None = None  # (rows, tokens) that a rank answers at once while it trains
    penalty: Penalty | None = None  # of elastic weight consolidation
    each: bool = False  # log-probabilities of tokens are wanted, not their sum (task=dpo)
    reference: str = "none"  # task=dpo: cached, adapter_off, copy
    reference_bytes: int = 0  # of a frozen model beside the trained one, whole

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint over all ranks; an engine that swaps to a disk of its own has none."""
        if self.nvme:
            return 0
        return checkpoint_bytes(
            trained=sum(h.numel for h in self.held if h.trained),
            stage=self.stage,
            world=self.world,
            weight_bytes=WIDTH[self.trained],
            state_bytes=model_states(self).saved,
        )

    @property
    def held_reference(self) -> int:
        """Bytes of a frozen copy on one rank: ZeRO-3 shards it too."""
        return self.reference_bytes // self.world if self.stage == 3 else self.reference_bytes

    @property
    def consolidation(self) -> tuple[int, int, int, int]:
        """Bytes of the penalty, as `penalty_bytes` has them."""
        return penalty_bytes(self.penalty, self.held, self.stage, self.world) if self.penalty else (0, 0, 0, 0)

    @property
    def penalty_on_host(self) -> bool:
        """Fisher and anchor lie where the optimizer's weights do; the Fisher of a drift is the device's."""
        return self.penalty is not None and not self.penalty.drift and self.offload_optimizer and self.gpu

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class Memory:
    """What a rank needs in each phase."""

    device: dict[str, Phase]
    host: dict[str, Phase]  # of a node, all its ranks
    device_peak: int
    host_peak: int
    band: int  # bytes by which `device_peak` may be wrong, to either side
    exact: bool  # False: something here is known by a band alone
    notes: tuple[str, ...]
    states: States


def zero_sizes(section: Mapping[str, object], hidden: int) -> tuple[tuple[str, int], ...]:
    """DeepSpeed's sizes; "auto" as transformers fills it in, and defaults as runtime/zero/config.py has them."""
    stage = section.get("stage", 0)
    automatic = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    defaults = {
        "reduce_bucket_size": 500_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "sub_group_size": 1_000_000_000,
    }
    sizes = {}
    for key, default in defaults.items():
        value = section.get(key, default)
        sizes[key] = automatic[key] if value == "auto" else int(float(value))  # type: ignore[arg-type]
    sizes["overlap_comm"] = int(bool(section.get("overlap_comm", stage == 3)))
    sizes["contiguous_gradients"] = int(bool(section.get("contiguous_gradients", True)))
    return tuple(sizes.items())


def need(case: Case) -> Memory:
    """Every phase of the run."""
    made = model_states(case)
    if not case.gpu:  # reduction buffers are larger than small models, and memory that is never written is not there
        made = replace(
            made, buckets=min(made.buckets, 2 * sum(h.numel for h in case.held if h.trained) * WIDTH[case.dtype])
        )
    acts = _activations(case)
    gathered = _gathered(case) if case.stage == 3 else 0
    base: Phase = {
        "weights": made.weights + made.persistent,
        "quantization": made.quantization,
        "optimizer": made.optimizer,
        "gradients": made.standing_gradients,
        "buckets": made.standing_buckets,
        "runtime": case.runtime,
    }
    if case.reference == "copy":
        base["reference"] = case.held_reference
    largest = max((h.numel for h in case.held), default=0) * WIDTH[case.dtype]
    device: dict[str, Phase] = {}
    load = {**_zero(base), "weights": made.weights, "quantization": made.quantization, "runtime": case.runtime}
    load["loading"] = made.load + (largest if case.stage == 3 or made.quantization else 0)
    if case.stage in (1, 2):
        load["optimizer"] = sum(4 * h.numel for h in case.held if h.trained) // case.world
    device["load"] = load
    device["forward"] = base | {
        "activations": acts.kept + acts.forward + case.tokens * case.hidden * WIDTH[case.dtype],
        "logits_and_loss": acts.loss.peak,
        "gathered": gathered,
    }
    acting = acts.backward
    if case.accumulation == 1 and case.stage < 3:
        # Gradients come into being while activations go: the sum is highest at the beginning or at the end.
        acting = max(acts.backward - made.gradients, acts.backward - acts.kept)
    device["backward"] = base | {
        "activations": acting,
        "gradients": made.gradients,
        "buckets": made.buckets,
        "gathered": gathered,
    }
    if case.accumulation > 1 and case.stage < 3:
        device["forward"]["gradients"] = made.gradients
    device["step"] = base | {"gradients": made.gradients, "step": made.step}
    eval_case = replace(case, batch=case.eval_batch, checkpointing=True)
    evaluated = _activations(eval_case, recording=False)
    chunk = evaluated.loss.peak - evaluated.loss.saved
    device["evaluation"] = base | {"activations": evaluated.evaluation, "logits_and_loss": chunk, "gathered": gathered}
    if case.reference in ("adapter_off", "copy"):  # before the policy's own pass
        again = _activations(replace(case, checkpointing=True), recording=False)
        chunk = again.loss.peak - again.loss.saved
        device["reference"] = base | {"activations": again.evaluation, "logits_and_loss": chunk, "gathered": gathered}
    elif case.reference_bytes:  # once, then it goes
        device["reference"] = device["evaluation"] | {"reference": case.held_reference}
    if case.stage == 3 and case.reference_bytes:  # it is whole before it is sharded, beside the engine
        device["load_reference"] = base | {"reference": case.reference_bytes}
    device["save"] = base | {"gathered": largest if case.stage == 3 else 0}
    device["resume"] = base | {"step": 0}
    penalty, measuring, _, _ = case.consolidation
    if case.penalty is not None and case.penalty.measured:
        one = _activations(replace(case, batch=case.penalty.batch, checkpointing=False))
        device["fisher"] = base | {
            "activations": max(one.kept + one.forward, one.backward),
            "logits_and_loss": one.loss.peak,
            "gathered": gathered,
            "measuring": measuring,
        }
    if penalty and not case.penalty_on_host:
        for name, phase in device.items():
            phase["penalty"] = penalty if name != "load" else 0
    if case.generation is not None:
        device["generation"] = _generation(case)
    if case.answers is not None:
        device["answers"] = base | _growing(case, *case.answers) | {"gathered": gathered}
    notes = _notes(case, made)
    device_peak = max(sum(phase.values()) for phase in device.values())
    worst = max(device.values(), key=lambda phase: sum(phase.values()))
    exact = case.family is not None and case.family.exact and made.known
    loose = sum(worst.get(kind, 0) for kind in ("activations", "logits_and_loss", "gathered", "step"))
    band = int(loose * (EXACT_BAND if exact else LOOSE_BAND))
    band += int(worst["runtime"] * (RUNTIME_BAND if case.gpu else EXACT_BAND))
    if not made.known:
        band += made.optimizer // 2
    host = _host(case, made, device_peak, sum(device["save"].values()))
    host_peak = max(sum(phase.values()) for name, phase in host.items() if name != "export")  # no part of a run
    return Memory(device, host, device_peak, host_peak, band, exact, notes, made)


@lru_cache(maxsize=512)
def _states(key: tuple[tuple[Held, ...], tuple[tuple[str, object], ...]]) -> States:
    held, named = key
    return states(held, **dict(named))  # type: ignore[arg-type]


def model_states(case: Case) -> States:
    """The states of one rank."""
    sizes = dict(case.zero)
    named: dict[str, object] = {
        "stage": case.stage,
        "world": case.world,
        "dtype": case.dtype,
        "loaded": case.loaded,
        "trained": case.trained,
        "storage": case.storage,
        "double_quantization": case.double_quantization,
        "optim": case.optim,
        "offload_optimizer": case.offload_optimizer,
        "offload_parameters": case.offload_parameters,
        "buffers": _buffers(case.family, WIDTH[case.loaded]) if case.family else 0,
    }
    if case.stage:
        named["bucket"] = sizes["reduce_bucket_size"]
        named["buckets"] = (1 + sizes["overlap_comm"]) * sizes["contiguous_gradients"]
    if case.stage == 3:
        named["persistence"] = sizes["stage3_param_persistence_threshold"]
        named["sub_group"] = sizes["sub_group_size"]
    return _states((case.held, tuple(named.items())))


def _buffers(f: Family, width: int) -> int:
    """Tensors that are no parameters: the rotary frequencies and a copy of them, and Gemma's scale of embeddings."""
    return 4 * f.head_dim + (width if f.kind.startswith("gemma") else 0)


def standing(case: Case, made: States) -> dict[str, int]:
    """The states between two steps by kind, as `ftdist/measure.py` counts them, and the gradients of a backward pass.

    DistributedDataParallel's buckets are not among them: no Python object holds them.
    """
    counted = {
        "weights": made.weights + made.persistent,
        "quantization": made.quantization,
        "gradients": made.standing_gradients,
        "optimizer": made.optimizer,
        "buckets": made.standing_buckets if case.stage == 3 else 0,
        "gradients_in_backward": made.gradients,
    }
    if case.reference == "copy":
        counted["reference"] = case.held_reference
    if case.penalty:
        counted["host_penalty" if case.penalty_on_host else "penalty"] = case.consolidation[0]
    for kind, size in made.host.items():
        name = f"host_{kind}" if case.gpu else kind
        counted[name] = counted.get(name, 0) + size
    if not case.gpu and case.offload_optimizer:
        counted["gradients_in_backward"] += made.host.get("gradients", 0)
    return counted


def _zero(base: Phase) -> Phase:
    return dict.fromkeys(base, 0)


def _setting(case: Case) -> Setting:
    compute = WIDTH[case.dtype]
    autocast = not case.stage and case.dtype != "float32"
    weight = WIDTH[case.trained] if not case.stage or case.dtype == "float32" else compute
    frozen = WIDTH[case.loaded] if not case.stage or case.dtype == "float32" else compute
    mask = 1 if case.gpu else 0
    return Setting(compute, autocast, weight, frozen, weight, case.dropout, mask, case.magnitude)


@lru_cache(maxsize=64)
def _by_layer(held: tuple[Held, ...], float_hidden: bool) -> tuple[tuple[Trained, ...], frozenset[str], int]:
    """What is trained in each decoder layer, the trained names outside of layers, the largest trained tensor."""
    layers: dict[int, tuple[set[str], set[str], dict[str, int]]] = {}
    outside = set()
    largest = 0
    for h in held:
        if h.trained:
            largest = max(largest, h.numel)
        parts = h.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            if h.trained:
                outside.add(h.name)
            continue
        trained, quantized, ranks = layers.setdefault(int(parts[number]), (set(), set(), {}))
        name = ".".join(parts[number + 1 :])
        if ".lora_A." in name:
            ranks[name.partition(".lora_A.")[0]] = h.shape[0]
        elif ".lora_" in name:
            continue
        elif h.trained:
            trained.add(name)
        if h.quantized:
            quantized.add(name.removesuffix(".weight"))
    mark = {"whole"} if float_hidden else set()
    made = tuple(
        Trained(frozenset(trained | mark), frozenset(quantized), tuple(sorted(ranks.items())))
        for _, (trained, quantized, ranks) in sorted(layers.items())
    )
    return made, frozenset(outside), largest


def _activations(case: Case, recording: bool = True) -> Activations:
    setting = replace(_setting(case), recording=recording)
    embedded = next((h for h in case.held if "embed" in h.name or h.name.endswith("wte.weight")), None)
    embeddings = bool(embedded and embedded.trained)
    wide = setting.autocast and (setting.weight if embeddings else setting.frozen) > setting.compute
    layers, outside, _ = _by_layer(case.held, wide)
    head = next((h for h in case.held if h.name.startswith("lm_head.")), embedded if case.tied else None)
    trained_head = bool(head and head.trained)
    head_weight = setting.weight if trained_head else setting.frozen
    if case.family is None:
        kept, peak = case.traced or (0, 0)
        stand_in = Family("llama", case.hidden, 1, case.layers, 1, 1, case.hidden, case.vocabulary, 0, False, False)
        end = loss(stand_in, setting, case.tokens, case.tokens, trained_head, head_weight, case.fused, case.each)
        return Activations(kept, peak, 0, peak - kept, end, False)
    return activations(
        case.family,
        layers,
        setting,
        batch=case.batch,
        length=case.length,
        supervised=case.tokens,
        attention=case.attention,
        packed=case.packed,
        checkpointing=case.checkpointing,
        embeddings_trained=embeddings,
        input_gradients=case.adapters and case.checkpointing,
        final_norm_trained="model.norm.weight" in outside,
        trained_head=trained_head,
        head_weight=head_weight,
        tied=case.tied,
        fused=case.fused,
        each=case.each,
    )


@lru_cache(maxsize=128)
def _order(held: tuple[Held, ...], storage: str, double: bool, persistence: int) -> tuple[tuple[int, ...], ...]:
    """Elements of the sharded tensors of each module in the order of use: embedding, each layer's, norm, head."""
    groups: dict[str, list[int]] = {}
    for h in held:
        numel = quantized_bytes(h.numel, storage, double)[0] // WIDTH[storage] if h.quantized else h.numel
        if numel > persistence:
            parts = h.name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            key = ".".join(parts[: number + 1]) if number is not None else h.name
            groups.setdefault(key, []).append(numel)
    return tuple(tuple(group) for group in groups.values())


def _gathered(case: Case) -> int:
    """The most bytes of whole parameters that ZeRO-3 holds at once: those in use, those that will be used again within
    `max_reuse_distance`, and what is prefetched (runtime/zero/partitioned_param_coordinator.py)."""
    sizes = dict(case.zero)
    width = WIDTH[case.dtype]
    order = _order(case.held, case.storage, case.double_quantization, sizes["stage3_param_persistence_threshold"])
    forward = [(group, part) for group, parts in enumerate(order) for part in range(len(parts))]
    backward: list[tuple[int, int]] = []
    for group in range(len(order) - 1, -1, -1):
        uses = [(group, part) for part in range(len(order[group]))]
        if case.checkpointing and len(uses) > 1:
            backward += uses
        backward += uses[::-1]
    uses = forward + backward
    far = sizes["stage3_max_reuse_distance"]
    start = [0]
    for group, part in uses:
        start.append(start[-1] + order[group][part])
    following: dict[tuple[int, int], int] = {}
    release: list[int] = [0] * len(uses)
    for number in range(len(uses) - 1, -1, -1):
        use = uses[number]
        again = following.get(use)
        keeps = again is not None and start[again] - start[number + 1] < far
        release[number] = 0 if keeps else order[use[0]][use[1]]
        following[use] = number
    live: set[tuple[int, int]] = set()
    held = top = 0
    for number, use in enumerate(uses):
        if use not in live:
            live.add(use)
            held += order[use[0]][use[1]]
        ahead, soon = 0, number + 1
        while soon < len(uses) and ahead < sizes["stage3_prefetch_bucket_size"]:
            if uses[soon] not in live:
                ahead += order[uses[soon][0]][uses[soon][1]]
            soon += 1
        top = max(top, held + min(ahead, max(sizes["stage3_max_live_parameters"] - held, 0)))
        if release[number]:
            live.discard(use)
            held -= release[number]
    return top * width


def _generation(case: Case) -> Phase:
    """`ftdist eval`: the whole model on one device, with a cache of keys and values."""
    width = WIDTH[case.dtype]
    base = sum(h.numel for h in case.held) * width
    if any(h.quantized for h in case.held):
        base = sum(
            sum(quantized_bytes(h.numel, "uint8", case.double_quantization)) if h.quantized else h.numel * width
            for h in case.held
        )
    assert case.generation is not None
    return {"weights": base, "runtime": case.runtime, **_growing(case, *case.generation)}


def _growing(case: Case, rows: int, new: int) -> Phase:
    """What `rows` answers of `new` tokens need beside the weights: keys and values, logits of the last token."""
    width = WIDTH[case.dtype]
    heads = case.family.kv_heads * case.family.head_dim if case.family else case.hidden
    cache = 2 * case.layers * rows * (case.length + new) * heads * width
    return {"cache": cache, "logits_and_loss": rows * case.vocabulary * (width + 4)}


def _host(case: Case, made: States, device_peak: int, between: int) -> dict[str, Phase]:
    """Of a node, every rank's share. On CPUs a rank's device is the host's memory.

    between: bytes of a rank's device between two steps, where a checkpoint is copied.
    """
    ranks = case.processes
    snapshot = case.checkpoint * ranks // case.world  # what a checkpoint is written from
    whole = sum(h.numel * WIDTH[case.loaded] for h in case.held)
    trained = sum(h.numel for h in case.held if h.trained)
    if not case.gpu:
        extra = _saved_copy(case)
        loading = whole if case.stage == 3 and not made.quantization else 0
        return {
            "load": {"ranks": ranks * device_peak, "files": loading},
            "train": {"ranks": ranks * device_peak},
            "checkpoint": {"ranks": ranks * (device_peak if case.background else between), "snapshot": snapshot},
            "save": {"ranks": ranks * device_peak, "copy": extra},
        }
    libraries = ranks * GPU_LIBRARIES
    offloaded = {
        f"offloaded_{kind}": ranks * _offloaded(size, case.nvme, pinned=kind != "optimizer")
        for kind, size in made.host.items()
    }
    if case.penalty_on_host:
        offloaded["offloaded_penalty"] = ranks * case.consolidation[0]
    biggest = max((h.numel for h in case.held), default=0) * WIDTH[case.loaded]
    biggest_trained = 4 * max((h.numel for h in case.held if h.trained), default=0)  # read a parameter at a time
    if made.quantization:
        loading = ranks * biggest  # tensor by tensor, straight to the device
    elif case.stage == 3:
        loading = whole  # global rank 0 alone reads the files
    else:
        loading = ranks * whole
    return {
        "load": {"libraries": libraries, "files": loading} | (offloaded if case.stage == 3 else {}),
        "train": {"libraries": libraries, **offloaded},
        "checkpoint": {"libraries": libraries, **offloaded, "snapshot": snapshot},
        "save": {"libraries": libraries, **offloaded, "copy": _saved_copy(case)},
        "resume": {"libraries": libraries, **offloaded, "pieces": ranks * min(biggest_trained, made.saved)},
        "export": {"libraries": GPU_LIBRARIES, "model": 2 * whole if case.adapters else whole + 4 * trained},
    }


def _saved_copy(case: Case) -> int:
    """What global rank 0 holds to write `final/`: trained tensors as trained, frozen ones as the base stores them."""
    widths = {True: WIDTH[case.trained], False: 0 if case.adapters else WIDTH[case.stored]}
    return sum(h.numel * widths[h.trained] for h in case.held)


def _offloaded(size: int, nvme: bool, pinned: bool) -> int:
    """torch's allocator of pinned memory rounds up to a power of two; on a disk only buffers stay in memory."""
    if nvme:
        return min(size, 8 << 30)
    if not pinned:
        return size
    return 1 << math.ceil(math.log2(size)) if size else 0


def _notes(case: Case, made: States) -> tuple[str, ...]:
    notes = []
    if case.family is None:
        notes.append("no closed form for this model class: activations are traced, and known by a band of 30 %")
    elif not case.family.exact:
        notes.append(f"{case.family.kind}: activations depend on what the model does with a token; a band of 30 %")
    if not made.known:
        notes.append(f"train.optim={case.optim}: its states are not known here; counted as two float32 moments")
    if case.offload_optimizer and case.gpu:
        notes.append("pinned host memory (offloaded weights and gradients) is rounded up to a power of two")
    if case.optim.startswith("paged_"):
        notes.append("paged optimizer states are counted on the device; the driver may move them to the host")
    if case.nvme:
        notes.append("NVMe swap buffers are a guess of up to 8 GiB a kind and rank")
    return tuple(notes)


def disk_bytes(case: Case, made: States, rows_tokens: int | None, kept: int) -> dict[str, int]:
    """Files of a run: its final model, the checkpoints that it keeps with one more that is being written, and the
    tokens of the prepared data (ids and labels, 4 bytes each)."""
    found = {
        "final": _saved_copy(case),
        "checkpoints": kept * case.checkpoint,
        "the next checkpoint": case.checkpoint,
        "prepared data": 8 * rows_tokens if rows_tokens else 0,
        "fisher": case.consolidation[2],
        "cached fisher": case.consolidation[3],
    }
    if case.nvme:
        found["swap per node"] = case.processes * (made.host.get("optimizer", 0) + made.host.get("weights", 0))
    return found


def kinds(phases: Iterable[Phase]) -> Sequence[str]:
    """Every kind that some phase has, largest first."""
    tops: dict[str, int] = {}
    for phase in phases:
        for kind, size in phase.items():
            tops[kind] = max(tops.get(kind, 0), size)
    return sorted((kind for kind in tops if tops[kind]), key=lambda kind: -tops[kind])
