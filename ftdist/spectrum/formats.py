"""Scans and parameter lists as files: ours, the reference tool's, and the ones that people published.

Three layouts of a scan, all JSON with Python's `Infinity` and `NaN`:
    ours       {module: {"snr": …, "type": …, "shape": […], …}}
    flat       {module: {"snr": …, "type": …}}                    the reference tool's results
    sorted     {type: {module: snr}}                              its `_sorted.json`
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdist.errors import UserError
from ftdist.spectrum import names
from ftdist.spectrum.names import THRESHOLDS, Shape, Threshold
from ftdist.spectrum.reader import write_atomically


@dataclass(frozen=True)
class Entry:
    """One module of a scan."""

    module: str
    type: str
    snr: float  # inf: no noise was found; nan: it could not be measured
    shape: Shape | None  # None in published scans


@dataclass(frozen=True)
class Scan:
    """SNR of the modules of a model, in the order of the file."""

    path: Path
    entries: tuple[Entry, ...]
    threshold: Threshold = "reference"  # that of published scans, which do not say it


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def load_scan(path: Path) -> Scan:
    """A scan in any of the three layouts. UserError: missing, not JSON, another layout."""
    try:
        content = json.loads(path.read_text())
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror}); make a scan with `ftdist scan`")
    except ValueError as failure:
        raise UserError(f"{path}: not JSON ({failure}); give a scan as `ftdist scan` or the Spectrum tool writes it")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no scan; expected {{module: {{snr, type}}}} or {{type: {{module: snr}}}}")
    entries: list[Entry] = []
    measured_with: set[Threshold] = set()
    for key, value in content.items():
        if isinstance(value, dict) and "snr" in value and "type" in value:
            shape = value.get("shape")
            measured_with.add(_threshold(path, key, value))
            entries.append(_entry(path, key, value["type"], value["snr"], tuple(shape) if shape else None))
        elif isinstance(value, dict):
            entries.extend(_entry(path, module, key, snr, None) for module, snr in value.items())
        else:
            raise UserError(f"{path}: {key} holds {value!r}; expected {{snr, type}}, or a type with {{module: snr}}")
    seen: set[str] = set()
    for entry in entries:
        if entry.module in seen:
            raise UserError(f"{path}: names {entry.module} twice; give a scan of one model")
        seen.add(entry.module)
    if len(measured_with) > 1:
        raise UserError(f"{path}: measured partly with one threshold, partly with another; give one scan")
    return Scan(path, tuple(entries), *measured_with)


def _threshold(path: Path, module: str, value: Mapping[str, Any]) -> Threshold:
    found = value.get("threshold", "reference")
    if found not in THRESHOLDS:
        raise UserError(f"{path}: {module} has threshold {found!r}; expected one of {', '.join(THRESHOLDS)}")
    return THRESHOLDS[THRESHOLDS.index(found)]


def _entry(path: Path, module: str, kind: Any, snr: Any, shape: Shape | None) -> Entry:
    if isinstance(snr, bool) or not isinstance(snr, int | float) or snr < 0 or not isinstance(kind, str):
        raise UserError(
            f"{path}: {module} has snr {snr!r} and type {kind!r}; expected a number of at least 0 and a name"
        )
    return Entry(module, kind, float(snr), shape)


def write_reference_json(path: Path, scan: Scan) -> None:
    """The flat layout with the reference tool's types (an expert's number is part of the type there)."""
    content = {
        entry.module: {"snr": entry.snr, "type": names.module_type(entry.module, group_experts=False)}
        for entry in scan.entries
    }
    write_atomically(path, json.dumps(content, indent=4))


def write_unfrozen_yaml(path: Path, unfrozen: Mapping[str, tuple[str, ...]], whole: tuple[str, ...]) -> None:
    """The reference tool's YAML, read by axolotl among others.

    `unfrozen`: type -> modules; `whole`: parameters of head and embedding, written as `^name$`.
    """
    lines = ["unfrozen_parameters:", *(f"- ^{name}$" for name in whole)]
    for kind, modules in unfrozen.items():
        lines += [f"# {kind} layers", *(f"- {module}" for module in modules)]
    write_atomically(path, "\n".join(lines) + "\n")


def load_parameter_list(path: Path, shapes: Mapping[str, Shape]) -> frozenset[str]:
    """Parameters named in an `unfrozen_parameters` YAML or a plain list: names, modules, `^expressions$`.

    `shapes`: the parameters of the loaded model. UserError: not such a file, a line that matches nothing.
    """
    resolve = names.resolver(shapes)
    found: set[str] = set()
    for line in _lines(path):
        matched = _matched(path, line, shapes) if line.startswith("^") else resolve(line)
        if not matched and line in shapes:
            matched = (line,)
        if (
            not matched
            and names.is_head(names.module_name(line.strip("^$").replace("\\.", ".")))
            and not names.heads(shapes)
        ):
            matched = tuple(names.embeddings(shapes))  # the head is the embedding: the file was made for any model
        if not matched:
            matched = tuple(name for name in shapes if name.startswith(f"{line}."))
        if not matched:
            near = difflib.get_close_matches(line, [names.module_name(name) for name in shapes], n=1, cutoff=0)
            raise UserError(f"{path}: {line} matches no parameter of the model; the nearest is {near[0]}")
        found.update(matched)
    return frozenset(found)


def _lines(path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror}); give a YAML file with unfrozen_parameters")
    except yaml.YAMLError as failure:
        raise UserError(
            f"{path}: not YAML ({' '.join(str(failure).split())[:120]}); expected unfrozen_parameters: [names]"
        )
    if isinstance(content, dict):
        content = content.get("unfrozen_parameters")
    if isinstance(content, str):
        content = content.split()  # one name a line
    if not isinstance(content, list) or not content or not all(isinstance(line, str) for line in content):
        raise UserError(f"{path}: holds no list of parameter names; expected unfrozen_parameters: [names]")
    return content


def _matched(path: Path, pattern: str, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    try:
        expression = re.compile(pattern)
    except re.error as failure:
        raise UserError(f"{path}: {pattern} is no valid regular expression ({failure})")
    return tuple(name for name in shapes if expression.match(name))
