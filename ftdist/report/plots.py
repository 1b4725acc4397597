"""The plots of a page: matplotlib figures, as SVG whose colours follow the page and as PNG files beside it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdist.report.gather import Run, tasks

# name → (colour on white paper, stand-in that the SVG has until it becomes the page's own colour)
INK, GRID, SERIES = ("#1f2328", "#010203"), ("#d8dee4", "#010204"), [
    ("#0969da", "#010210"), ("#bc4c00", "#010211"), ("#1a7f37", "#010212"), ("#8250df", "#010213"),
    ("#cf222e", "#010214"), ("#9a6700", "#010215"), ("#1b7c83", "#010216"), ("#bf3989", "#010217"),
]  # fmt: skip
# Event → mark and colour; anything else is a fault of some kind.
MARKS = {"start": ("o", 0), "resume": ("^", 3), "restart": ("^", 3), "checkpoint": ("|", 2), "stopped": ("s", 5),
         "finished": ("*", 2), "early-stop": ("s", 0), "best-restored": ("D", 2), "overfitting": ("v", 1)}  # fmt: skip
FAULT = ("X", 4)
COLOURED = 8  # runs that have a colour and a name in a plot, the best ones
AXES = 7  # of parallel coordinates, beside the objective's


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
    _kept(found, run)
    _differences(found, run)
    _trade(found, {run.name: run})
    _step_seconds(found, run)
    _time_line(found, run)
    return found


PAIRS = {
    "rewards/accuracies": "share of pairs whose chosen answer gained more",
    "rewards/margins": "reward of chosen − rejected answers",
    "logps/chosen": "log-probability of a chosen answer (nats)",
    "logps/rejected": "log-probability of a rejected answer (nats)",
}  # of task=dpo


def of_several(
    runs: list[Run], own: dict[str, dict[str, Any]], values: dict[str, float | None], objective: str
) -> dict[str, Plot]:
    """Name → plot that compares `runs`, the best first. own: run name → what it differs in; values: its objective."""
    found: dict[str, Plot] = {}
    curves = {run.name: run for run in runs}
    if len(tasks(runs)) == 1:  # else losses of different things would share an axis
        _curve(found, curves, "held_out_loss", "eval_loss", "held-out loss")
        _curve(found, curves, "loss", "loss", "loss (nats a token)")
    _coordinates(found, own, values, objective)
    _curve(found, curves, "gradient_norm", "grad_norm", "gradient norm")
    _curve(found, curves, "throughput", "tokens_per_second", "tokens/s, all ranks")
    _trade(found, curves)
    return found


def _coordinates(
    found: dict[str, Plot], own: dict[str, dict[str, Any]], values: dict[str, float | None], objective: str
) -> None:
    """Parallel coordinates: an axis for each key that differs and one for the objective, a line a run."""
    names = [name for name in own if values.get(name) is not None]
    keys = list(own[names[0]])[:AXES] if names else []
    if len(names) < 2 or not keys:
        return
    columns = {key: [own[name].get(key) for name in names] for key in keys}
    columns[objective] = [values[name] for name in names]
    scales = [_scale(column) for column in columns.values()]

    def draw(axes: Any, palette: Palette) -> None:
        for x, (marks, _) in enumerate(scales):
            axes.axvline(x, color=palette.grid, linewidth=1, zorder=1)
            for y, text in marks:
                axes.text(x + 0.03, y, _cut(text, 14), fontsize=6.5, color=palette.ink, va="bottom", zorder=20)
        for number, name in enumerate(names):
            heights = [scale[1][number] for scale in scales]
            colour, label = (palette.line(number), _cut(name)) if number < COLOURED else (palette.grid, None)
            width, order = (2.4, 12) if number == 0 else (1.2, 11 - min(number, 9))
            axes.plot(range(len(scales)), heights, color=colour, linewidth=width, zorder=order, label=label)
        axes.set_xticks(range(len(scales)), [_cut(name.rpartition(".")[2], 16) for name in columns])
        axes.set_yticks([])
        axes.set_ylim(-0.08, 1.12)
        axes.set_xlim(-0.15, len(scales) - 0.6)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(frameon=False, fontsize=6.5, labelcolor=palette.ink, ncols=2, loc="upper center",
                    bbox_to_anchor=(0.5, -0.08))  # fmt: skip

    best = ", ".join(f"{key} {_said(column[0])}" for key, column in columns.items())
    words = f"parallel coordinates of {len(names)} runs over {', '.join(columns)}; the best: {best}"
    found["coordinates"] = Plot("what made the difference", words, draw, 2.9)


def _scale(column: list[Any]) -> tuple[list[tuple[float, str]], list[float]]:
    """(height, text) of an axis's marks, and each value's height between 0 and 1.

    Numbers over more than a decade stand by their logarithm; what is no number by its order of appearance.
    """
    numbers = [v for v in column if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(column):
        names = list(dict.fromkeys(map(_said, column)))
        places = {name: i / max(1, len(names) - 1) if len(names) > 1 else 0.5 for i, name in enumerate(names)}
        return [(y, name) for name, y in places.items()], [places[_said(value)] for value in column]
    low, high = min(numbers), max(numbers)
    measure: Callable[[float], float] = math.log if low > 0 and high / low > 10 else float
    span = measure(high) - measure(low)
    heights = [(measure(v) - measure(low)) / span if span else 0.5 for v in numbers]
    shown = sorted(set(numbers)) if len(set(numbers)) <= 5 else [low, high]
    marks = [((measure(v) - measure(low)) / span if span else 0.5, _said(v)) for v in shown]
    return marks, heights


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curve(found: dict[str, Plot], runs: dict[str, Run], name: str, key: str, label: str) -> None:
    """`key` over steps, a line a run; of one run's loss, its parts and the held-out loss too."""
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
        for part in ("target", "general") if key == "loss" else ():  # with replay
            rows = [row for row in run.steps if row.get(f"loss_{part}") is not None]
            if rows:
                lines[part] = ([row["step"] for row in rows], [row[f"loss_{part}"] for row in rows])
        rows = [row for row in run.held_out if row.get(f"eval_{key}") is not None]
        if rows:
            lines["held out"] = ([row["step"] for row in rows], [row[f"eval_{key}"] for row in rows])
    if not lines:
        return

    def draw(axes: Any, palette: Palette) -> None:
        for number, (title, (x, y)) in enumerate(lines.items()):
            mark = "o" if len(x) < 3 or title == "held out" else None
            colour, named = (palette.line(number), _cut(title)) if number < COLOURED else (palette.grid, None)
            order = len(lines) - number if number < COLOURED else 0
            axes.plot(x, y, color=colour, label=named, marker=mark, markersize=3.5, linewidth=1.4, zorder=2 + order)
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


def _kept(found: dict[str, Plot], run: Run) -> None:
    """Losses on the retention sets at every evaluation, the base's first."""
    names = {key for row in run.held_out for key in row if re.fullmatch(r"eval_retention(_.+)?_loss", key)}
    if len(names) > 1:
        names.discard("eval_retention_loss")  # their mean
    lines = {}
    for name in sorted(names):
        rows = [(row["step"], row[name]) for row in run.held_out if row.get(name) is not None]
        title = name.removeprefix("eval_").removesuffix("_loss").removeprefix("retention_").replace("_", " ")
        if rows:
            lines[title] = rows
    if not lines:
        return

    def draw(axes: Any, palette: Palette) -> None:
        for number, (name, rows) in enumerate(lines.items()):
            x, y = zip(*rows, strict=True)
            axes.plot(x, y, color=palette.line(number), label=_cut(name), marker="o", markersize=3.5, linewidth=1.4)
            axes.axhline(y[0], color=palette.line(number), linewidth=0.8, linestyle="--")
        axes.set_xlabel("step")
        axes.set_ylabel("loss on general data")
        axes.legend(frameon=False, fontsize=7, labelcolor=palette.ink)

    words = "; ".join(f"{name} from {rows[0][1]:.4g} to {rows[-1][1]:.4g}" for name, rows in lines.items())
    found["retention"] = Plot("retention while training", f"loss on general data over steps: {words}", draw)


def _differences(found: dict[str, Plot], run: Run) -> None:
    """tuned − base in points of a hundred, with intervals."""
    rows = []
    for name, d in run.metrics.get("difference", {}).items():
        if name.endswith(("loss", "perplexity", "token_accuracy")) or name.startswith("g_eval") or d.get("low") is None:
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
        of_sets = [key for key in tuned if key.startswith("retention") and key.endswith("_loss")]
        values = [m.get(key) for key in ("loss", *(of_sets[-1:] or [""])) for m in (base, tuned)]  # the mean of several
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


def _step_seconds(found: dict[str, Plot], run: Run) -> None:
    """How long steps took, of a profiled run."""
    steps = run.profile.get("steps") or []
    if not steps:
        return

    def draw(axes: Any, palette: Palette) -> None:
        axes.hist(steps, bins=min(40, max(5, len(steps))), color=palette.line(0))
        axes.set_xlabel("seconds of a step, rank 0")
        axes.set_ylabel("steps")

    ordered = sorted(steps)
    alt = f"{len(steps)} steps of {ordered[0]:.3g} to {ordered[-1]:.3g} s, median {ordered[len(steps) // 2]:.3g} s"
    found["step_seconds"] = Plot("length of steps", alt, draw)


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
    head = width // 3
    return text if len(text) <= width else f"{text[:head]}…{text[head + 1 - width :]}"
