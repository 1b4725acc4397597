"""The SNR of a model as a picture: layers across, module types down, what is selected framed."""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path

from ftdist.spectrum import names
from ftdist.spectrum.select import Selection


def heat_map(path: Path, *, selection: Selection) -> Path:
    """Writes a PNG. Colours run within a type, since SNRs of two types do not compare; numbers are SNRs.

    Experts that are ranked apart share a cell: their mean, framed when any of them is selected.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    cells = _cells(selection)
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    columns = sorted({layer for _, layer in cells})
    chosen = {place(module) for modules in selection.modules.values() for module in modules}
    width, height = max(5.0, 0.36 * len(columns) + 3.5), 0.36 * len(rows) + 1.7
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    colours = plt.get_cmap("viridis")
    for y, kind in enumerate(rows):
        finite = [value for (row, _), value in cells.items() if row == kind and math.isfinite(value)]
        for x, layer in enumerate(columns):
            value = cells.get((kind, layer))
            if value is None:
                continue
            shade = _shade(value, finite)
            face = colours(shade) if shade is not None else "0.85"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=0.5))
            ink = "black" if shade is None or shade > 0.55 else "white"
            axes.text(x, y, _short(value), ha="center", va="center", fontsize=5.5, color=ink)
    for kind, number in chosen:
        if number is not None and (kind, number) in cells:
            corner = (columns.index(number) - 0.44, rows.index(kind) - 0.42)
            axes.add_patch(Rectangle(corner, 0.88, 0.84, fill=False, edgecolor="red", linewidth=1.4))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="layer")
    axes.set_xticks(range(len(columns)), [str(layer) for layer in columns], fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    share = selection.trainable / selection.total
    axes.set_title(
        f"SNR by layer and module type; red: trained ({selection.top_percent:.4g} % of each type, "
        f"{share:.1%} of the weights)",
        fontsize=8,
        wrap=True,
    )
    scale = plt.cm.ScalarMappable(cmap=colours)
    bar = figure.colorbar(scale, ax=axes, ticks=[0, 1], pad=0.01, fraction=0.02)
    bar.ax.set_yticklabels(["lowest\nof its type", "highest"], fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    temporary.rename(path)
    return path


def place(module: str) -> tuple[str, int | None]:
    """Row and column of a module."""
    return names.module_type(module, group_experts=True), names.layer(module)


def _cells(selection: Selection) -> dict[tuple[str, int], float]:
    values: dict[tuple[str, int], list[float]] = {}
    for module, snr in selection.scores.items():
        kind, layer = place(module)
        if layer is not None:
            values.setdefault((kind, layer), []).append(snr)
    return {at: sum(found) / len(found) for at, found in values.items()}


def _shade(value: float, finite: list[float]) -> float | None:
    """Position between lowest and highest of the type, in logarithms; None where all are equal or it is nan."""
    if math.isnan(value) or not finite:
        return None
    if math.isinf(value):
        return 1.0
    low, high, at = (math.log(max(n, 1e-6)) for n in (min(finite), max(finite), value))
    return (at - low) / (high - low) if high > low else None


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if math.isinf(value) else "?"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"
