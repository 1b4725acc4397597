"""One self-contained page for a run, or one that compares several, with PNGs of its plots beside it."""

from __future__ import annotations

from pathlib import Path

from ftdist.errors import UserError


def write(targets: list[Path], output: Path | None = None) -> Path:
    """The page's file: RUN/report.html for one run, else `output`. A sweep or a folder of runs stands for them."""
    from ftdist.report import compare, gather, page, plots
    from ftdist.sweep.directory import is_sweep

    found = [directory for target in targets for directory in _runs(target)]
    names = [directory.resolve() for directory in found]
    if len(set(names)) < len(names):
        raise UserError("report: a run is named twice; name each once")
    sweep = targets[0] if len(targets) == 1 and is_sweep(targets[0]) else None
    alone = len(found) == 1 and sweep is None
    runs = [gather.run(directory, name) for directory, name in zip(found, _called(names), strict=True)]
    place = output or (found[0] if alone else _folder(targets)) / "report.html"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if alone:
            figures = plots.of_run(runs[0])
        else:
            several = compare.of_sweep(sweep, runs) if sweep else compare.of_runs(runs)
            figures = plots.of_several(several.runs, several.own, several.values, several.objective)
        pictures = place.parent / ("plots" if place.name == "report.html" else f"{place.stem}-plots")
        drawn = plots.draw(figures, pictures)
        text = page.of_run(runs[0], drawn) if alone else page.of_several(several, drawn)
        partial = place.with_name(f".{place.name}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as failure:
        raise UserError(f"report: {place} cannot be written ({failure.strerror}); choose another with --output FILE")
    return place


def _runs(target: Path) -> list[Path]:
    if (target / "config.yaml").is_file():
        return [target]
    if (target / "sweep.yaml").is_file():
        from ftdist.sweep import directory

        members = [target / member.name for member in directory.members(target)]
        begun = [member for member in members if (member / "config.yaml").is_file()]
        if not begun:
            raise UserError(f"{target}: no member of this sweep has begun; ftdist resume {target}")
        return begun
    inside = sorted((p for p in target.glob("*/config.yaml")), key=lambda p: (len(p.parent.name), p.parent.name))
    if not inside:
        raise UserError(
            f"{target}: no run directory and no folder of runs (no config.yaml); runs are made by `ftdist train`"
        )
    return [file.parent for file in inside]


def _called(directories: list[Path]) -> list[str]:
    """The runs' names; members of several sweeps are called alike, so the folders above come to the name."""
    for parts in range(1, max(len(directory.parts) for directory in directories) + 1):
        names = [str(Path(*directory.parts[-parts:])) for directory in directories]
        if len(set(names)) == len(names):
            break
    return names


def _folder(targets: list[Path]) -> Path:
    """Of a comparison: the sweep's own folder, else where the command runs."""
    return targets[0] if len(targets) == 1 else Path.cwd()
