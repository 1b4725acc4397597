"""Spectrum (Hartford et al. 2024, arXiv 2406.06623): train the weights with the best signal-to-noise ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ftdist.errors import UserError
from ftdist.spectrum.formats import Entry, Scan
from ftdist.spectrum.names import Threshold, heads, is_scanned, module_name, module_type
from ftdist.spectrum.select import load_parameter_list, load_scan, select
from ftdist.strategies import Base, Recipe

USUAL_PERCENT = 25.0  # the paper's cheaper setting


def recipe(
    base: Base,
    *,
    parameters: str | list[str] | None,
    scan: str | None,
    top_percent: float | None,
    trainable_budget: float | None,
    types: Literal["all"] | list[str],
    embeddings: bool,
    head: bool,
    norms: bool,
    threshold: Threshold,
    group_experts: bool,
    base_bits: Literal[4] | None,
) -> Recipe:
    """The listed parameters, or those that the scan selects, stay unfrozen; all others are frozen."""
    if parameters is not None:
        names = _listed(parameters, base)
    else:
        names = select(
            scan=_scan(base, scan, group_experts, threshold),
            shapes=base.shapes,
            top_percent=top_percent,
            types=types,
            embeddings=embeddings,
            head=head,
            norms=norms,
            trainable_budget=trainable_budget,
        ).names
    if base_bits is None:
        return Recipe(trainable=names)
    # A tied head has no parameter of its own, but a module that must not be quantised.
    whole = sorted({"lm_head", *(module_name(name) for name in (*names, *heads(base.shapes)))})
    return Recipe(quantization=base.nf4(True) | {"llm_int8_skip_modules": whole}, trainable=names)


def of_matrices(top_percent: float | None) -> dict[str, Any]:
    """How adapters select: linear modules of layers, no norms, no embeddings, no head."""
    percent = USUAL_PERCENT if top_percent is None else top_percent
    everything_else = dict.fromkeys(("embeddings", "head", "norms"), False)
    return {"top_percent": percent, "trainable_budget": None, "types": "all", **everything_else}


def modules(base: Base, scan: str | None, top_percent: float | None) -> list[str]:
    """The linear modules with the best SNR of their type."""
    chosen = select(scan=_scan(base, scan, True, None), shapes=base.shapes, **of_matrices(top_percent))
    return sorted(module_name(name) for name in chosen.names)


def prepare(
    base: Base,
    model_path: str,
    output_dir: Path,
    processes: int,
    *,
    parameters: str | list[str] | None,
    scan: str | None,
    threshold: Threshold,
    group_experts: bool,
    top_percent: float | None,
    trainable_budget: float | None,
    types: Literal["all"] | list[str],
    embeddings: bool,
    head: bool,
    norms: bool,
) -> dict[str, Any]:
    """Scan the weights before any rank starts, unless a scan or names are given; leave the picture of the selection."""
    if parameters is not None:
        return {}
    from ftdist.spectrum.scan import scan as measure
    from ftdist.spectrum.verb import show

    if scan is None:
        path = measure(
            model_path=model_path,
            output=output_dir / "snr.json",
            processes=processes,
            device="auto",
            threshold=threshold,
            group_experts=group_experts,
            alone=True,
        )
    else:
        path = Path(scan).expanduser().absolute()
    show(
        load_scan(path),
        base.shapes,
        output_dir,
        top_percent=top_percent,
        types=types,
        embeddings=embeddings,
        head=head,
        norms=norms,
        trainable_budget=trainable_budget,
    )
    return {"scan": str(path)}


def _listed(parameters: str | list[str], base: Base) -> frozenset[str]:
    """Names from the configuration itself, or from a file."""
    if isinstance(parameters, str):
        return load_parameter_list(Path(parameters).expanduser(), base.shapes)
    known = {module_name(name): name for name in base.shapes} | {name: name for name in base.shapes}
    for name in parameters:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise UserError(f"strategy.parameters={name}: the model has no such parameter; did you mean {near[0]}?")
    return frozenset(known[name] for name in parameters)


def _measured(path: Path, threshold: Threshold | None) -> Scan:
    """A scan that was measured with this threshold; None: with any."""
    found = load_scan(path)
    if threshold not in (None, found.threshold):
        raise UserError(
            f"strategy.threshold={threshold}: {path} was measured with {found.threshold}; set "
            f"strategy.threshold={found.threshold}, or strategy.scan=null to measure the model"
        )
    return found


def _scan(base: Base, scan: str | None, group_experts: bool, threshold: Threshold | None) -> Scan:
    if scan is not None:
        return _measured(Path(scan).expanduser(), threshold)
    if base.measured:
        raise UserError("strategy.scan=null: this run has no scan to select by; start it with ftdist train")
    return _even(base, group_experts)


def _even(base: Base, group_experts: bool) -> Scan:
    """A scan that prefers nothing: enough for a plan, since modules of one type are of one size."""
    entries = [
        Entry(module_name(name), module_type(module_name(name), group_experts=group_experts), 1.0, shape)
        for name, shape in base.shapes.items()
        if is_scanned(name, shape)
    ]
    return Scan(Path("plan"), tuple(entries))
