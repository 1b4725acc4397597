"""The plan as people read it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from ftdist.plan import Plan


def render(plan: Plan) -> str:
    """Every number of the plan with where it comes from; commands that can be pasted."""
    total, trained = plan["total_parameters"], plan["trainable_parameters"]
    world = f"{plan['processes']} process" + ("es" if plan["processes"] > 1 else "")
    if plan["nodes"] > 1:
        world += f" on each of {plan['nodes']} nodes"
    entries = [
        ("model", [f"{plan['model']}  {total:,} parameters ({plan['model_source']})"]),
        ("data", plan["data"]),
        ("task", [plan["task"]]),
        (
            "strategy",
            [f"{plan['strategy']}  trains {trained:,} parameters, {_percent(trained, total)} of the model"],
        ),
        ("", _table(plan["trainable_by_type"])),
        ("engine", [f"{plan['engine']}, {world}"]),
        ("devices", [plan["devices"]]),
        ("precision", [plan["precision"]]),
        ("batch", plan["arithmetic"]),
        ("writes", _files(plan["files"])),
        ("runs", [shlex.join(command) for command in plan["command"]]),
        ("advice", plan["advice"]),
    ]
    return "\n".join(_entry(title, lines) for title, lines in entries if lines)


def _entry(title: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{title if first else '':<10} {line}".rstrip() for first, line in _firsts(lines))


def _firsts(lines: Iterable[str]) -> Iterable[tuple[bool, str]]:
    return ((number == 0, line) for number, line in enumerate(lines))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 1 else f"{share:.2g} %"


def _table(counts: dict[str, int]) -> list[str]:
    """Type of module and its trained parameters, aligned."""
    width = max((len(kind) for kind in counts), default=0)
    return [f"  {kind:<{width}}  {count:>17,}" for kind, count in counts.items()]


def _files(files: dict[str, str]) -> list[str]:
    width = max((len(name) for name in files), default=0)
    return [f"{name:<{width}}  {meaning}".rstrip() for name, meaning in files.items()]
