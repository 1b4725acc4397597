"""The plots of a page: matplotlib figures, as SVG whose colours follow the page and as PNG files beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdist.report.gather import Run

# name → (colour on white paper, stand-in that the SVG has until it becomes the page's own colour)
INK, GRID, SERIES = ("#1f2328", "#010203"), ("#d8dee4", "#010204"), [
    ("#0969da", "#010210"), ("#bc4c00", "#010211"), ("#1a7f37", "#010212"), ("#8250df", "#010213"),
    ("#cf222e", "#010214"), ("#9a6700", "#010215"), ("#1b7c83", "#010216"), ("#bf3989", "#010217"),
]  # fmt: skip
# Event → mark and colour; anything else is a fault of some kind.
MARKS = {"start": ("o", 0), "resume": ("^", 3), "restart": ("^", 3), "checkpoint": ("|", 2), "stopped": ("s", 5),
         "finished": ("*", 2)}  # fmt: skip
FAULT = ("X", 4)


@dataclass(frozen=True)
class Palette:
    """Colours of one rendering."""

    ink: str
    grid: str
    series: tuple[str, ...]

    def line(self, number: int) -> str:
        return self.series[number % len(self.series)]


PAPER = Palette(INK[0], GRID[0], tuple(pair[0] for pair in SERIES))
PAGE = Palette(INK[1], GRID[1], tuple(pair[1] for pair in SERIES))
Draw = Callable[[Any, Palette], None]  # onto axes


@dataclass(frozen=True)
class Plot:
    """What to draw: `title` above, `alt` for those who do not see it; `height` in inches."""

    title: str
    alt: str
    draw: Draw
    height: float = 2.7


def of_run(run: Run) -> dict[str, Plot]:
    """Name → plot, for what the run has."""
    found: dict[str, Plot] = {}
    curves = {"": run}
    unit = "loss of a pair" if run.plan.get("task") == "dpo" else "loss (nats a token)"
    _curve(found, curves, "loss", "loss", unit)
    _curve(found, curves, "learning_rate", "learning_rate", "learning rate")
    _curve(found, curves, "gradient_norm", "grad_norm", "gradient norm")
    _curve(found, curves, "throughput", "tokens_per_second", "tokens/s, all ranks")
    _curve(found, curves, "memory", "memory_gib", "peak memory, rank 0 (GiB)")
    for name, label in PAIRS.items():
        _curve(found, curves, name.replace("/", "_"), name, label)
    _while_training(found, run)
    _differences(found, run)
    _trade(found, {run.name: run})
    _time_line(found, run)
    return found


PAIRS = {
    "rewards/accuracies": "share of pairs whose chosen answer gained more",
    "rewards/margins": "reward of chosen − rejected answers",
    "logps/chosen": "log-probability of a chosen answer (nats)",
    "logps/rejected": "log-probability of a rejected answer (nats)",
}  # of task=dpo


def of_several(runs: list[Run]) -> dict[str, Plot]:
    """Name → plot that compares."""
    found: dict[str, Plot] = {}
    curves = {run.name: run for run in runs}
    _curve(found, curves, "loss", "loss", "loss (nats a token)")
    _curve(found, curves, "held_out_loss", "eval_loss", "held-out loss")
    _curve(found, curves, "gradient_norm", "grad_norm", "gradient norm")
    _curve(found, curves, "throughput", "tokens_per_second", "tokens/s, all ranks")
    _trade(found, curves)
    return found


def _curve(found: dict[str, Plot], runs: dict[str, Run], name: str, key: str, label: str) -> None:
    """`key` over steps, a line a run; of one run's loss, the held-out loss too."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for run_name, run in runs.items():
        rows = [row for row in (run.held_out if key == "eval_loss" else run.steps) if row.get(key) is not None]
        if key == "tokens_per_second":
            rows = [row for row in rows if row[key] > 0]  # the first after a start has no time to divide by
        if rows:
            lines[run_name] = ([row["step"] for row in rows], [row[key] for row in rows])
    alone = len(runs) == 1
    if alone and (key == "loss" or key in PAIRS):
        (run,) = runs.values()
        if lines:
            lines = {"training": lines.popitem()[1]}
        rows = [row for row in run.held_out if row.get(f"eval_{key}") is not None]
        if rows:
            lines["held out"] = ([row["step"] for row in rows], [row[f"eval_{key}"] for row in rows])
    if not lines:
        return

    def draw(axes: Any, palette: Palette) -> None:
        for number, (title, (x, y)) in enumerate(lines.items()):
            mark = "o" if len(x) < 3 or title == "held out" else None
            axes.plot(x, y, color=palette.line(number), label=_cut(title), marker=mark, markersize=3.5, linewidth=1.4)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=7, labelcolor=palette.ink)

    ends = "; ".join(f"{title or label} from {y[0]:.4g} to {y[-1]:.4g}" for title, (_, y) in lines.items())
    found[name] = Plot(label, f"{label} over steps: {ends}", draw)


def _while_training(found: dict[str, Plot], run: Run) -> None:
    """What the ranks' answers to held-out rows were worth at every evaluation (eval.during)."""
    lines = {}
    for name in ("extracted_match", "exact_match", "rougeL"):
        rows = [(row["step"], row[f"eval_{name}"]) for row in run.held_out if row.get(f"eval_{name}") is not None]
        if rows:
            lines[name] = rows
    if not lines:
        return

    def draw(axes: Any, palette: Palette) -> None:
        for number, (name, rows) in enumerate(lines.items()):
            x, y = zip(*rows, strict=True)
            axes.plot(x, y, color=palette.line(number), label=name, marker="o", markersize=3.5, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out answers")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(frameon=False, fontsize=7, labelcolor=palette.ink)

    words = "; ".join(f"{name} from {rows[0][1]:.3g} to {rows[-1][1]:.3g}" for name, rows in lines.items())
    found["answers"] = Plot("answers while training", f"held-out answers over steps: {words}", draw)


def _differences(found: dict[str, Plot], run: Run) -> None:
    """tuned − base in points of a hundred, with intervals."""
    rows = []
    for name, d in run.metrics.get("difference", {}).items():
        if name.endswith(("loss", "perplexity")) or name.startswith("g_eval") or d.get("low") is None:
            continue
        scale = 1 if name in ("bleu", "chrf") else 100
        rows.append((name, d["difference"] * scale, d["low"] * scale, d["high"] * scale))
    if not rows:
        return

    def draw(axes: Any, palette: Palette) -> None:
        for y, (_, middle, low, high) in enumerate(rows):
            clear = low > 0 or high < 0
            colour = palette.line(2 if low > 0 else 4) if clear else palette.ink
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
            axes.plot([middle], [y], color=colour, marker="o", markersize=5)
        axes.axvline(0, color=palette.ink, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.margins(y=0.12)
        axes.set_xlabel("tuned − base, points of 100, 95 % interval")

    words = "; ".join(f"{name} {middle:+.3g} [{low:.3g}, {high:.3g}]" for name, middle, low, high in rows)
    found["differences"] = Plot("tuned against base", f"tuned minus base: {words}", draw, 0.9 + 0.3 * len(rows))


def _trade(found: dict[str, Plot], runs: dict[str, Run]) -> None:
    """Learned against forgotten: held-out loss and loss on the retention data, each minus the base's."""
    points = {}
    for name, run in runs.items():
        base, tuned = run.metrics.get("base", {}), run.metrics.get("tuned", {})
        values = [m.get(key) for key in ("loss", "retention_loss") for m in (base, tuned)]
        if None not in values:
            points[name] = (values[3] - values[2], values[1] - values[0])
    if not points:
        return

    def draw(axes: Any, palette: Palette) -> None:
        axes.axhline(0, color=palette.ink, linewidth=0.8, linestyle="--")
        axes.axvline(0, color=palette.ink, linewidth=0.8, linestyle="--")
        axes.plot([0], [0], color=palette.ink, marker="o", linestyle="", label="base")
        for number, (name, (x, y)) in enumerate(points.items()):
            axes.plot([x], [y], color=palette.line(number), marker="D", linestyle="", label=_cut(name))
        axes.margins(0.25)
        axes.set_xlabel("retention loss − base's (right: forgotten)")
        axes.set_ylabel("target loss − base's (down: learned)")
        axes.legend(frameon=False, fontsize=7, labelcolor=palette.ink)

    words = "; ".join(f"{name}: retention {x:+.4g}, target {y:+.4g}" for name, (x, y) in points.items())
    found["target_retention"] = Plot("target against retention", f"change of loss: {words}", draw)


def _time_line(found: dict[str, Plot], run: Run) -> None:
    events = sorted(run.events, key=lambda event: event["time"])
    if not events:
        return
    steps: list[int] = []
    for event in events:  # a restart says no step of its own: it is where the run had come to
        steps.append(event["step"] if isinstance(event.get("step"), int) else steps[-1] if steps else 0)
    begin = events[0]["time"]
    unit, name = (60, "minutes") if events[-1]["time"] - begin < 4 * 3600 else (3600, "hours")

    def draw(axes: Any, palette: Palette) -> None:
        times = [(event["time"] - begin) / unit for event in events]
        placed = list(zip(times, steps, (str(event.get("event")) for event in events), strict=True))
        axes.plot([x for x, _, _ in placed], [y for _, y, _ in placed], color=palette.grid, linewidth=1.2, zorder=1)
        for kind in dict.fromkeys(kind for _, _, kind in placed):
            mark, colour = MARKS.get(kind, FAULT)
            x, y = zip(*((x, y) for x, y, k in placed if k == kind), strict=True)
            size = 9 if mark == "|" else 6
            axes.plot(x, y, linestyle="", marker=mark, markersize=size, color=palette.line(colour), label=_cut(kind))
        axes.set_xlabel(f"{name} since the first start")
        axes.set_ylabel("step")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=7, labelcolor=palette.ink)

    words = ", ".join(f"{e.get('event')} at step {step}" for e, step in list(zip(events, steps, strict=True))[:40])
    found["time_line"] = Plot("starts, checkpoints, faults", f"time line: {words}", draw)


def draw(plots: dict[str, Plot], folder: Path) -> dict[str, str]:
    """Write a PNG of every plot into `folder`; the SVG of each, to stand inside a page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {}
    if plots:
        folder.mkdir(exist_ok=True)
    for name, plot in plots.items():
        for palette in (PAPER, PAGE):
            settings: Any = {
                "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8, "axes.edgecolor": palette.ink,
                "axes.labelcolor": palette.ink, "text.color": palette.ink, "xtick.color": palette.ink,
                "ytick.color": palette.ink, "axes.spines.top": False, "axes.spines.right": False,
                "axes.formatter.limits": (-4, 5), "grid.color": palette.grid, "grid.linewidth": 0.6,
            }  # fmt: skip
            with plt.rc_context(settings):
                figure, axes = plt.subplots(figsize=(4.7, plot.height), layout="constrained")
                axes.grid(True, zorder=0)
                axes.set_axisbelow(True)
                plot.draw(axes, palette)
                if palette is PAPER:
                    partial = folder / f".{name}.png"
                    figure.savefig(partial, dpi=160, facecolor="white", format="png", metadata={"Software": None})
                    partial.replace(folder / f"{name}.png")
                else:
                    text = io.StringIO()
                    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
                    found[name] = _inline(text.getvalue(), name, plot.alt)
                plt.close(figure)
    return found


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG without size and colours of its own; its ids are unique on the page."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda m: m[0] + f"{name}-", body)
    for (_, stand_in), own in ((INK, "var(--ink)"), (GRID, "var(--grid)")):
        body = body.replace(stand_in, own)
    for number, (_, stand_in) in enumerate(SERIES):
        body = body.replace(stand_in, f"var(--c{number})")
    xlink = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {xlink} {box[0] if box else ""} role="img" aria-label="{escape(alt)}">{body}'


def _cut(text: str, width: int = 34) -> str:
    """A label that leaves room for the plot; matplotlib hides labels that begin with an underscore."""
    text = text.lstrip("_").replace("$", r"\$")
    return text if len(text) <= width else "…" + text[1 - width :]
