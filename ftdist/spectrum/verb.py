"""`ftdist scan`: the scan, the selection made from it, their files, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ftdist.spectrum import names, reader
from ftdist.spectrum.names import Shape, Threshold
from ftdist.spectrum.scan import launched_as, scan
from ftdist.spectrum.select import Scan, Selection, load_scan, select, write_reference_json, write_unfrozen_yaml


def run(
    *,
    model_path: str,
    revision: str | None = None,
    processes: int | None,
    device: Literal["auto", "cpu", "cuda"],
    threshold: Threshold,
    group_experts: bool,
    top_percent: float | None,
    types: Literal["all"] | list[str],
    embeddings: bool,
    head: bool,
    norms: bool,
    trainable_budget: float | None,
    output_dir: Path,
    shapes: Mapping[str, Shape] | None = None,
) -> Path:
    """Scans and writes into `output_dir`; returns the path of snr.json.

    Files: snr.json, snr_reference.json, snr_unfrozenparameters.yaml, snr.png. `shapes`: the parameters of the
    loaded model, where they are known; else those on disk are taken.
    """
    path = scan(
        model_path=model_path,
        revision=revision,
        output=output_dir / "snr.json",
        processes=processes,
        device=device,
        threshold=threshold,
        group_experts=group_experts,
    )
    if launched_as()[0] != 0:
        return path
    show(
        load_scan(path),
        shapes if shapes is not None else disk_shapes(reader.find(model_path, revision)),
        output_dir,
        top_percent=top_percent,
        types=types,
        embeddings=embeddings,
        head=head,
        norms=norms,
        trainable_budget=trainable_budget,
    )
    print(f"scan: {path}")
    return path


def show(
    found: Scan,
    shapes: Mapping[str, Shape],
    output_dir: Path,
    *,
    top_percent: float | None,
    types: Literal["all"] | list[str],
    embeddings: bool,
    head: bool,
    norms: bool,
    trainable_budget: float | None,
) -> None:
    """Select, write snr_reference.json, snr_unfrozenparameters.yaml and snr.png, print the table."""
    selection = select(
        scan=found,
        shapes=shapes,
        top_percent=top_percent,
        types=types,
        embeddings=embeddings,
        head=head,
        norms=norms,
        trainable_budget=trainable_budget,
    )
    from ftdist.spectrum.picture import heat_map

    write_reference_json(output_dir / "snr_reference.json", found)
    write_unfrozen_yaml(output_dir / "snr_unfrozenparameters.yaml", selection.modules, selection.whole)
    heat_map(output_dir / "snr.png", selection=selection)
    print(table(selection), flush=True)


def disk_shapes(model_dir: Path) -> dict[str, Shape]:
    """The parameters as they are named on disk; a tied head that was saved as well is left out."""
    shapes = {name: tensor.shape for name, tensor in reader.tensors(model_dir).items()}
    if reader.config(model_dir).get("tie_word_embeddings"):
        for name in names.heads(shapes):
            del shapes[name]
    return shapes


def table(selection: Selection) -> str:
    """Types, counts and parameters of a selection for people to read."""
    rows: list[tuple[str, ...]] = [("type", "modules", "trained", "parameters", "of", "share")]
    for count in selection.types:
        rows.append(_row(count.type, count.modules, count.selected, count.parameters, count.of))
    rows.append(_row("model", None, None, selection.trainable, selection.total))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join([*lines, *(f"note: {note}" for note in selection.notes)])


def _row(kind: str, modules: int | None, selected: int | None, parameters: int, of: int) -> tuple[str, ...]:
    counts = ("" if number is None else f"{number:,}" for number in (modules, selected))
    return (kind, *counts, f"{parameters:,}", f"{of:,}", f"{parameters / of:.1%}")
