"""From a scan to the exact names of the parameters that stay unfrozen. Needs no torch and no model."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ftdist.errors import UserError
from ftdist.spectrum import names
from ftdist.spectrum.formats import (
    Entry,
    Scan,
    load_parameter_list,
    load_scan,
    write_reference_json,
    write_unfrozen_yaml,
)
from ftdist.spectrum.names import Shape

__all__ = [
    "Entry",
    "Scan",
    "Selection",
    "TypeCount",
    "load_parameter_list",
    "load_scan",
    "select",
    "write_reference_json",
    "write_unfrozen_yaml",
]


@dataclass(frozen=True)
class TypeCount:
    """What a module type has and what of it is trained."""

    type: str
    modules: int
    selected: int
    parameters: int  # of the selected modules
    of: int  # of all of them


@dataclass(frozen=True)
class Selection:
    """The parameters that stay unfrozen."""

    names: frozenset[str]  # of parameters of the loaded model
    modules: dict[str, tuple[str, ...]]  # type -> selected modules, highest SNR first
    types: tuple[TypeCount, ...]  # ranked types, then embeddings and head
    whole: tuple[str, ...]  # parameters of head and embedding that are trained
    scores: dict[str, float]  # every unit that can be frozen by itself -> SNR
    top_percent: float
    trainable: int
    total: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Unit:
    """What is frozen or trained as one: a module, or all experts of a layer that share a tensor."""

    name: str
    type: str
    snr: float
    parameters: tuple[str, ...]
    is_norm: bool


def select(
    *,
    scan: Scan,
    shapes: Mapping[str, Shape],
    top_percent: float | None,
    types: Literal["all"] | list[str],
    embeddings: bool,
    head: bool,
    norms: bool,
    trainable_budget: float | None,
) -> Selection:
    """The `top_percent` of each module type with the highest SNR, and embedding and head if wanted.

    `shapes`: the parameters of the loaded model. Of n modules of a type, floor(n·top_percent/100) are
    taken, as the reference tool does. `trainable_budget` (a number of parameters, or a share below 1 of
    all) takes the largest percentage that stays within it; `top_percent` must be None then. `norms`: 1-D
    weights are ranked too.
    UserError: a scan of another model, a percentage not inside 0 … 100, a budget for nothing or for
    everything.
    """
    _check_percentage(top_percent, trainable_budget)
    notes: list[str] = []
    units = _units(scan, shapes, notes)
    ranked = _ranked(units, types, norms)
    whole = _whole(shapes, embeddings, head, notes)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    extra = sum(size[name] for name in whole)
    if trainable_budget is not None:
        top_percent = _percentage(ranked, size, extra, sum(size.values()), trainable_budget)
    assert top_percent is not None
    chosen: dict[str, list[_Unit]] = {unit.type: [] for unit in units}  # in the order of the scan
    for kind, members in ranked.items():
        count = _count(len(members), top_percent)
        chosen[kind] = members[:count]
        notes += _ties(kind, members, count)
    taken = [unit for members in chosen.values() for unit in members]
    if not taken:
        largest = max(len(members) for members in ranked.values())
        raise UserError(
            f"strategy.top_percent={top_percent:g}: selects nothing of at most {largest} modules of a type; "
            f"the least is {math.ceil(10000 / largest) / 100:g}"
        )
    trained = frozenset(name for unit in taken for name in unit.parameters) | frozenset(whole)
    counts = [
        TypeCount(
            kind,
            len(members),
            len(chosen[kind]),
            sum(size[name] for unit in chosen[kind] for name in unit.parameters),
            sum(size[name] for unit in members for name in unit.parameters),
        )
        for kind, members in ranked.items()
    ]
    for name in [*names.heads(shapes), *names.embeddings(shapes)]:
        used = name in whole
        counts.append(TypeCount(names.module_name(name), 1, int(used), size[name] if used else 0, size[name]))
    return Selection(
        names=trained,
        modules={kind: tuple(unit.name for unit in members) for kind, members in chosen.items()},
        types=tuple(counts),
        whole=whole,
        scores={unit.name: unit.snr for unit in units},
        top_percent=top_percent,
        trainable=sum(size[name] for name in trained),
        total=sum(size.values()),
        notes=tuple(notes),
    )


def _check_percentage(top_percent: float | None, trainable_budget: float | None) -> None:
    if (top_percent is None) == (trainable_budget is None):
        raise UserError(
            f"strategy.top_percent={top_percent} and strategy.trainable_budget={trainable_budget}: set "
            "exactly one of "
            "them, the other to null"
        )
    if top_percent is not None and not 0 < top_percent < 100:
        fix = "; to train everything use strategy=full" if top_percent >= 100 else ""
        raise UserError(f"strategy.top_percent={top_percent:g}: must be above 0 and below 100{fix}")
    if trainable_budget is not None and not (0 < trainable_budget < math.inf):
        raise UserError(
            f"strategy.trainable_budget={trainable_budget:g}: must be a number of parameters, or a share "
            "between 0 and 1"
        )


def _units(scan: Scan, shapes: Mapping[str, Shape], notes: list[str]) -> list[_Unit]:
    """The scan in terms of the model; refuses a scan of another one."""
    resolve = names.resolver(shapes)
    tied = not names.heads(shapes)
    members: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in scan.entries:
        parameters = resolve(entry.module)
        if parameters:
            members[parameters].append(entry)
        elif not (tied and names.is_head(entry.module)):
            near = difflib.get_close_matches(entry.module, [names.module_name(n) for n in shapes], n=1, cutoff=0)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise UserError(f"{scan.path}: a scan of another model: this one has no {entry.module}{nearest}")
    _check_shapes(scan, members, shapes)
    _check_complete(scan, members, shapes)
    units, shared = [], 0
    for parameters, entries in members.items():
        entry = entries[0]
        is_norm = len(shapes[parameters[0]]) == 1
        if len(entries) == 1:
            units.append(_Unit(entry.module, entry.type, entry.snr, parameters, is_norm))
        else:
            shared += len(entries)
            module = names.module_name(parameters[0])
            mean = sum(entry.snr for entry in entries) / len(entries)
            units.append(_Unit(module, names.module_type(module, group_experts=True), mean, parameters, is_norm))
    if shared:
        notes.append(
            f"{shared} expert matrices lie in {sum(len(e) > 1 for e in members.values())} tensors of the "
            "loaded model; "
            "each tensor is ranked by the mean SNR of its experts"
        )
    unmeasured = [unit.name for unit in units if math.isnan(unit.snr)]
    if unmeasured:
        notes.append(f"{len(unmeasured)} modules have no SNR (nan) and rank last: {unmeasured[0]} …")
    return units


def _check_shapes(scan: Scan, members: Mapping[tuple[str, ...], list[Entry]], shapes: Mapping[str, Shape]) -> None:
    for parameters, entries in members.items():
        wanted = shapes[parameters[0]]
        if len(entries) == 1 and entries[0].shape not in (None, wanted):
            raise UserError(
                f"{scan.path}: a scan of another model: {entries[0].module} has shape "
                f"{list(entries[0].shape or ())} "
                f"there and {list(wanted)} here"
            )
        measured = [math.prod(entry.shape) for entry in entries if entry.shape is not None]
        if len(measured) == len(entries) and sum(measured) != math.prod(wanted):
            raise UserError(
                f"{scan.path}: a scan of another model: its {len(entries)} experts in {parameters[0]} have "
                f"{sum(measured):,} weights and this one's {math.prod(wanted):,}"
            )


def _check_complete(scan: Scan, members: Mapping[tuple[str, ...], list[Entry]], shapes: Mapping[str, Shape]) -> None:
    """Every module of a scanned type must be in the scan: one of 16 layers must not select from 32."""
    found = {parameters[0] for parameters in members}
    kinds = {names.module_type(names.module_name(name), group_experts=True) for name in found}
    for name, shape in shapes.items():
        if name in found or not names.is_scanned(name, shape):
            continue
        module = names.module_name(name)
        if names.layer(module) is not None and names.module_type(module, group_experts=True) in kinds:
            raise UserError(f"{scan.path}: a scan of another model: it lacks {module}")


def _ranked(units: list[_Unit], types: Literal["all"] | list[str], norms: bool) -> dict[str, list[_Unit]]:
    """Type -> its units, highest SNR first; equal ones in the order of the layers, nan last."""
    by_type: dict[str, list[_Unit]] = defaultdict(list)
    for unit in units:
        if not names.is_embedding_or_head(unit.name) and (norms or not unit.is_norm):
            by_type[unit.type].append(unit)
    if types != "all":
        for kind in types:
            if kind not in by_type:
                raise UserError(f"strategy.types={kind}: not in the scan; its types are {', '.join(by_type)}")
        by_type = defaultdict(list, {kind: by_type[kind] for kind in by_type if kind in types})
    if not types:
        raise UserError("strategy.types=[]: selects nothing; name types, or set all")
    if not by_type:
        raise UserError("strategy.types: the scan has no type that can be selected from; scan the model again")
    for members in by_type.values():
        members.sort(key=lambda unit: (math.isnan(unit.snr), -unit.snr, names.natural_order(unit.name)))
    return dict(by_type)


def _whole(shapes: Mapping[str, Shape], embeddings: bool, head: bool, notes: list[str]) -> tuple[str, ...]:
    """Parameters of head and embedding that are trained as a whole."""
    embedding_names, head_names = names.embeddings(shapes), names.heads(shapes)
    if (embeddings or head) and not embedding_names:
        raise UserError(
            f"strategy.embeddings={str(embeddings).lower()}, strategy.head={str(head).lower()}: no "
            "embedding is "
            "recognised among the names of this model; set both to false"
        )
    if not head_names:  # the head is the embedding
        if embeddings != head:
            raise UserError(
                f"strategy.embeddings={str(embeddings).lower()}, strategy.head={str(head).lower()}: they "
                "are one tensor "
                f"in this model ({embedding_names[0]}); set both to the same"
            )
        if head:
            notes.append(f"the output head is the embedding ({embedding_names[0]}): counted once")
        head_names = []
    return (*(head_names if head else ()), *(embedding_names if embeddings else ()))


def _count(modules: int, top_percent: float) -> int:
    """floor(modules · percent / 100) in the reference tool's own floating-point order."""
    return int(modules * top_percent / 100)


def _ties(kind: str, members: list[_Unit], count: int) -> list[str]:
    if not 0 < count < len(members) or members[count - 1].snr != members[count].snr:
        return []
    value = members[count].snr
    tied = [unit for unit in members if unit.snr == value]
    taken = sum(unit.snr == value for unit in members[:count])
    return [f"{kind}: {len(tied)} modules tie at SNR {value:g}; the first {taken} in the order of the layers are taken"]


def _percentage(
    ranked: Mapping[str, list[_Unit]], size: Mapping[str, int], extra: int, total: int, budget: float
) -> float:
    """The largest percentage that stays within the budget, embedding and head included."""
    limit = budget * total if budget < 1 else budget

    def trained(percent: float) -> int:
        return extra + sum(
            size[name]
            for members in ranked.values()
            for unit in members[: _count(len(members), percent)]
            for name in unit.parameters
        )

    steps = {Fraction(100 * k, len(members)) for members in ranked.values() for k in range(1, len(members))}
    # The next float up where rounding would fall below the step: floor(n·p/100) must reach k.
    candidates = sorted({math.nextafter(float(step), math.inf) for step in steps})
    fitting = [percent for percent in candidates if trained(percent) <= limit]
    if not fitting:
        least = f"{trained(candidates[0]):,}" if candidates else "all"
        raise UserError(
            f"strategy.trainable_budget={budget:g}: too small; embedding and head take {extra:,}, and the "
            "least that can "
            f"be selected makes it {least}; set strategy.embeddings=false strategy.head=false, or raise it"
        )
    if limit >= trained(100):
        raise UserError(
            f"strategy.trainable_budget={budget:g}: everything that could be selected fits into it; to "
            "train everything "
            "use strategy=full"
        )
    return fitting[-1]
