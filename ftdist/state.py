"""The state of training as tensors with names: out of any engine into files, and back into any engine.

Trained weights (in full precision) and the optimizer's moments are saved by parameter name and element range, each
rank what it holds, without any communication. A range is put together again from whatever files hold it, so that
another world size, ZeRO stage or engine reads the same checkpoint. Only safetensors and JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ftdist.checkpoint import rank_stem
from ftdist.errors import Failed

WEIGHT = "weight"  # beside the optimizer's own names: exp_avg, exp_avg_sq, …
SEPARATOR = "|"
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of parameter `name` lie at [offset, offset + length) of a flat tensor."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer updates, and whose elements they are."""

    tensor: torch.Tensor
    segments: tuple[Segment, ...]


class State:
    """What one rank holds of the trained weights and of the optimizer, whatever the engine."""

    def __init__(self, model: Any, optimizer: Any, rank: int, world: int) -> None:
        """optimizer: the one that accelerate prepared."""
        self.rank, self.world = rank, world
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {
            name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad
        }
        self.zero, self.base = engines(optimizer)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.zero is None:
            self.layout, self.replicated = "replicated", True
            self.flats = [Flat(p.data, (Segment(self.names[id(p)], 0, p.numel(), 0),)) for p in parameters]
            self.keys: list[Any] = parameters
        else:
            self.replicated = False
            if hasattr(self.zero, "fp32_partitioned_groups_flat"):
                self.layout = f"zero3 rank {rank} of {world}"
                self.flats = list(self._of_stage_3(parameters))
            else:
                self.layout = f"zero2 rank {rank} of {world}"
                self.flats = list(self._of_stage_1_and_2())
            self.keys = [flat.tensor for flat in self.flats]

    def _of_stage_1_and_2(self) -> Iterator[Flat]:
        for flat, parameters in zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True):
            yield Flat(
                flat,
                tuple(
                    Segment(
                        self.names[id(p)],
                        p._hp_mapping.lp_fragment_address.start,
                        p._hp_mapping.lp_fragment_address.numel,
                        p._hp_mapping.hp_fragment_address.start,
                    )
                    for p in parameters
                    if p._hp_mapping is not None
                ),
            )

    def _of_stage_3(self, parameters: list[Any]) -> Iterator[Flat]:
        found: list[list[Segment]] = [[] for _ in self.zero.fp32_partitioned_groups_flat]
        for p in parameters:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(p)]
            start = size * self.rank
            length = min(size, p.ds_numel - start)  # the last partitions are padded
            if length > 0:
                found[group].append(Segment(self.names[id(p)], start, length, offset))
        for flat, segments in zip(self.zero.fp32_partitioned_groups_flat, found, strict=True):
            yield Flat(flat, tuple(segments))

    def held(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What this rank is to write, as it lies there (not copied), and the index that says what it is.

        Where every rank holds everything, each writes its share of the elements. Failed for a state that is no tensor
        and no number.
        """
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, dict[str, int]] = {}
        scalars: dict[str, dict[str, Any]] = {}
        bound: list[str] = []
        for number, (flat, key) in enumerate(zip(self.flats, self.keys, strict=True)):
            state = self.base.state.get(key, {})
            elementwise, single, other = _sorted(state, flat.tensor)
            if other:  # such as 8-bit blocks: they mean nothing without the tensor that they belong to
                bound += [f"{flat.segments[0].name if self.replicated else number}{SEPARATOR}{k}" for k in other]
                if not self.replicated or self.rank == 0:
                    tensors |= {name: state[name.rpartition(SEPARATOR)[2]] for name in bound[-len(other) :]}
            for segment in flat.segments:
                first, last = segment.start, segment.start + segment.length
                if self.replicated:
                    first = segment.length * self.rank // self.world
                    last = segment.length * (self.rank + 1) // self.world
                if single:
                    scalars[segment.name] = single
                if first == last:
                    continue
                ranges[segment.name] = {"start": first, "length": last - first}
                place = slice(segment.offset + first - segment.start, segment.offset + last - segment.start)
                for kind, tensor in ({WEIGHT: flat.tensor} | elementwise).items():
                    tensors[f"{segment.name}{SEPARATOR}{kind}"] = tensor.detach().reshape(-1)[place]
        index = {
            "layout": self.layout,
            "ranges": ranges,
            "scalars": scalars,
            "bound": bound,
            "shapes": {name: self.shapes[name] for name in {**ranges, **scalars}},
            "groups": [
                {k: v.item() if torch.is_tensor(v) else v for k, v in g.items() if k != "params" and _is_number(v)}
                for g in self.base.param_groups
            ],
            "scaler": _numbers(self.zero.loss_scaler) if self.zero is not None else {},
        }
        return tensors, index

    def restore(self, checkpoint: Path, weights_only: bool = False) -> None:
        """Put a checkpoint's weights and moments in the place of what is held now. Failed if they do not fit.

        weights_only: for a model that is trained no more.
        """
        saved = Saved(checkpoint)
        saved.check(self.shapes)
        with torch.no_grad():
            if self.zero is not None and self.layout.startswith("zero3"):
                self.zero.checkpoint_event_prologue()
            for number, (flat, key) in enumerate(zip(self.flats, self.keys, strict=True)):
                if not weights_only:
                    self._restore_state(saved, flat, key, number)
                for segment in flat.segments:
                    saved.fill(flat.tensor.reshape(-1), segment, WEIGHT)
            if self.zero is not None:
                self._refresh()
        if weights_only:
            return
        for group, values in zip(self.base.param_groups, saved.groups, strict=True):
            for key, value in values.items():
                if torch.is_tensor(group.get(key)):
                    group[key].fill_(value)
                else:
                    group[key] = value
        if self.zero is not None:
            vars(self.zero.loss_scaler).update(saved.scaler)

    def _restore_state(self, saved: Saved, flat: Flat, key: Any, number: int) -> None:
        names = [segment.name for segment in flat.segments]
        state: dict[str, Any] = {}
        for kind in saved.bound_kinds(names[0] if self.replicated and names else number, self.layout):
            owner = names[0] if self.replicated else number
            state[kind] = saved.bound(f"{owner}{SEPARATOR}{kind}", self.layout).to(flat.tensor.device)
        for kind, (value, dtype) in (saved.scalars.get(names[0], {}) if names else {}).items():
            device = flat.tensor.device if self._scalars_on_device(kind) else "cpu"
            state[kind] = value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype), device=device)
        for kind in saved.kinds(names):
            state[kind] = torch.zeros_like(flat.tensor, dtype=saved.dtype(names, kind))
            for segment in flat.segments:
                saved.fill(state[kind].reshape(-1), segment, kind)
        if state:
            self.base.state[key] = state

    def _scalars_on_device(self, kind: str) -> bool:
        """torch keeps the step counter of fused and capturable optimizers beside the weights, of others on the CPU."""
        return kind != "step" or any(g.get("fused") or g.get("capturable") for g in self.base.param_groups)

    def _refresh(self) -> None:
        """The engine's copies of the weights, in the precision of the computation, from the restored ones."""
        zero = self.zero
        if hasattr(zero, "single_partition_of_fp32_groups"):
            zero.update_lp_params()
            zero._hp_optimizer_states_linked = False
            if all(zero.optimizer.state.get(flat) for flat in zero.single_partition_of_fp32_groups):
                zero._lazy_init_hp_params_optimizer_state()
            return
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            half = zero.fp16_partitioned_groups_flat[group]
            if flat.numel() == 0:
                continue
            half.data.copy_(flat.data)
            parts = zero.unflatten(half, zero.fp16_partitioned_groups[group])
            for partition, values in zip(zero.fp16_partitioned_groups[group], parts, strict=True):
                partition.data = values.data
        zero.checkpoint_event_epilogue()


def engines(optimizer: Any) -> tuple[Any, torch.optim.Optimizer]:
    """ZeRO's optimizer (None without ZeRO) and torch's, out of the one that accelerate prepared."""
    inner = optimizer.optimizer
    zero = inner if hasattr(inner, "optimizer") and hasattr(inner, "loss_scaler") else None
    return zero, inner if zero is None else inner.optimizer


class Saved:
    """The files of a checkpoint, read by parameter name and element range."""

    def __init__(self, checkpoint: Path) -> None:
        self.indices: list[dict[str, Any]] = []
        self.files: list[Any] = []
        for file in sorted(checkpoint.glob("rank-*.json")):
            self.indices.append(json.loads(file.read_text(encoding="utf-8"))["state"])
            self.files.append(safe_open(file.with_suffix(".safetensors"), framework="pt"))  # type: ignore[no-untyped-call]
        self.keys = [set(file.keys()) for file in self.files]
        self.pieces: dict[str, list[tuple[int, int, int]]] = {}  # name → (file, start, length)
        self.scalars: dict[str, dict[str, Any]] = {}
        self.shapes: dict[str, list[int]] = {}
        for number, index in enumerate(self.indices):
            self.scalars |= index["scalars"]
            self.shapes |= index["shapes"]
            for name, where in index["ranges"].items():
                self.pieces.setdefault(name, []).append((number, where["start"], where["length"]))
        self.groups = self.indices[0]["groups"]
        self.scaler = self.indices[0]["scaler"]

    def check(self, shapes: Mapping[str, list[int]]) -> None:
        """Failed, unless the checkpoint holds just these parameters with these shapes."""
        for name in [*sorted(set(shapes) - set(self.shapes)), *sorted(set(self.shapes) - set(shapes))]:
            where = "the model trains" if name in shapes else "the checkpoint has"
            raise Failed(f"checkpoint of another run: only {where} {name}")
        for name, shape in shapes.items():
            if list(shape) != self.shapes[name]:
                raise Failed(
                    f"checkpoint of another run: {name} has shape {list(shape)}, saved was {self.shapes[name]}"
                )

    def kinds(self, names: list[str]) -> list[str]:
        """The optimizer's elementwise states of these parameters."""
        found: set[str] = set()
        for name in names:
            number = self.pieces[name][0][0]
            prefix = name + SEPARATOR
            bound = self.indices[number]["bound"]
            found |= {key[len(prefix) :] for key in self.keys[number] if key.startswith(prefix) and key not in bound}
        return sorted(found - {WEIGHT})

    def dtype(self, names: list[str], kind: str) -> torch.dtype:
        """The element type in which a state was saved."""
        for name in names:
            number, key = self.pieces[name][0][0], f"{name}{SEPARATOR}{kind}"
            if key in self.keys[number]:
                first: torch.Tensor = self.files[number].get_slice(key)[0:1]
                return first.dtype
        raise AssertionError(kind)

    def fill(self, flat: torch.Tensor, segment: Segment, kind: str) -> None:
        """Copy the segment's elements from the files that hold them into the flat tensor."""
        wanted = segment.start + segment.length
        filled = 0
        for number, start, length in self.pieces[segment.name]:
            first, last = max(segment.start, start), min(wanted, start + length)
            if first >= last:
                continue
            key, offset = f"{segment.name}{SEPARATOR}{kind}", segment.offset + first - segment.start
            filled += last - first
            if kind != WEIGHT and key not in self.keys[number]:
                continue  # a weight that never had a gradient: its moments are zero still
            flat[offset : offset + last - first].copy_(self.files[number].get_slice(key)[first - start : last - start])
        if filled != segment.length:
            raise Failed(f"the checkpoint holds {filled:,} of {segment.length:,} elements of {segment.name} ({kind})")

    def bound_kinds(self, owner: str | int, layout: str) -> list[str]:
        """States of `owner` that only the same layout can read. Failed if the checkpoint has some of another layout."""
        prefix = f"{owner}{SEPARATOR}"
        for index in self.indices:
            if index["bound"] and index["layout"] == layout:
                return [key[len(prefix) :] for key in index["bound"] if key.startswith(prefix)]
        if any(index["bound"] for index in self.indices):
            raise Failed(
                f"this optimizer's state cannot be shared out anew (saved as {self.indices[0]['layout']}, wanted as "
                f"{layout}); resume with the engine and the number of processes that saved it"
            )
        return []

    def bound(self, key: str, layout: str) -> torch.Tensor:
        """Such a state."""
        number = next(i for i, index in enumerate(self.indices) if index["layout"] == layout)
        tensor: torch.Tensor = self.files[number].get_tensor(key)
        return tensor


def write(directory: Path, rank: int, tensors: dict[str, torch.Tensor], index: dict[str, Any]) -> list[Path]:
    """This rank's two files. Tensors go to the file one by one: of those on a GPU one copy is on the host at a time."""
    stem = directory / rank_stem(rank)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with stem.with_suffix(".safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    stem.with_suffix(".json").write_text(json.dumps(index), encoding="utf-8")
    return [stem.with_suffix(".safetensors"), stem.with_suffix(".json")]


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every random number generator of this process: tensors, and plain data."""
    tensors = {"random|torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random|cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["random|numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, numbers, following = random.getstate()
    plain = {"numpy": [name, position, has_gauss, gauss], "python": [version, list(numbers), following]}
    return tensors, plain


def set_random_state(checkpoint: Path, rank: int, plain: Mapping[str, Any]) -> None:
    """The generators as the rank left them."""
    with safe_open((checkpoint / rank_stem(rank)).with_suffix(".safetensors"), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("random|torch"))
        if torch.cuda.is_available() and "random|cuda" in file.keys():  # noqa: SIM118  (no mapping)
            torch.cuda.set_rng_state(file.get_tensor("random|cuda"))
        keys = file.get_tensor("random|numpy").numpy().astype(np.uint32)
    name, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, numbers, following = plain["python"]
    random.setstate((version, tuple(numbers), following))


def _sorted(
    state: Mapping[str, Any], tensor: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """An optimizer's state of one tensor: elementwise tensors, single numbers with their type, names of the rest."""
    elementwise: dict[str, torch.Tensor] = {}
    single: dict[str, Any] = {}
    other: list[str] = []
    for kind, value in state.items():
        if not torch.is_tensor(value):
            if not _is_number(value) and value is not None:
                raise Failed(f"train.optim: its state {kind} ({type(value).__name__}) cannot be saved; choose another")
            single[kind] = (value, None)
        elif value.numel() == 1 and (kind == "step" or value.shape != tensor.shape):
            single[kind] = (value.item(), str(value.dtype).removeprefix("torch."))
        elif value.shape == tensor.shape:
            elementwise[kind] = value
        else:
            other.append(kind)
    if other:  # moments in blocks: the elementwise part means nothing without the rest
        other += list(elementwise)
        elementwise = {}
    return elementwise, single, other


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the host, apart from what training goes on with."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (torch.is_tensor(value) and value.numel() == 1)


def _numbers(owner: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(owner).items() if isinstance(v, (int, float, bool))}
