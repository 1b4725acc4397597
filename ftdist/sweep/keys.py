"""The keys of `sweep`, and what `sweep.space` may say."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import schema
from ftdist.errors import UserError

Positive = Annotated[int, Field(ge=1)]
KINDS = "a list of values, or 'uniform LOW HIGH', 'log LOW HIGH', 'int LOW HIGH', 'int log LOW HIGH'"
NOT_SEARCHED = ("sweep", "sweep_dir", "run_dir", "resume", "experiment")


def grid(
    *,
    name: Literal["grid"],
    objective: str,
    direction: Literal["minimize", "maximize"],
    parallel: Positive,
    retries: Annotated[int, Field(ge=0)],
) -> None:
    """The keys of every sweep."""


def search(
    *,
    name: Literal["search"],
    space: dict[str, Any],
    trials: Positive,
    random_trials: Annotated[int, Field(ge=0)],
    pruner: Literal["median", "none"],
    prune_from: Annotated[int, Field(ge=0)],
    prune_after: Annotated[int, Field(ge=0)],
    keep_pruned: bool,
) -> None:
    """The keys of a search beside those of every sweep."""


def check(values: dict[str, Any]) -> None:
    """UserError for the first key that is unknown or holds a wrong value."""
    if values.get("name") == "search":
        others = {key: value for key, value in values.items() if key not in schema.keys_of(search)}
        schema.check("sweep", {k: v for k, v in values.items() if k not in others}, search)
        schema.check("sweep", {"name": "grid", **others}, grid)
        space(values["space"])
    else:
        schema.check("sweep", values, grid)


@dataclass(frozen=True)
class Choice:
    """One of several values, of any kind."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> list[Any]:
        """The values that stand for all when a space is checked."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> list[Any]:
        """The same."""
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]


def space(given: dict[str, Any]) -> dict[str, Choice | Range]:
    """Key → what it may become. UserError names the key, the value and what is allowed."""
    if not given:
        raise UserError('sweep.space={}: nothing to search; {train.learning_rate: "log 1e-5 1e-3"}')
    return {key: _dimension(key, value) for key, value in given.items()}


def _dimension(key: str, value: Any) -> Choice | Range:
    where = f"sweep.space: {key}: {value}"
    if key.partition(".")[0] in NOT_SEARCHED:
        raise UserError(f"{where}: {key} cannot be searched; keys of a run can")
    if isinstance(value, list):
        if len(value) < 2 or any(value[i] in value[:i] for i in range(len(value))):
            raise UserError(f"{where}: should be two or more values, no two alike")
        return Choice(tuple(value))
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    match = re.fullmatch(rf"(uniform|log|int|int log)\s+{number}\s+{number}", str(value).strip())
    if not match:
        raise UserError(f"{where}: should be {KINDS}")
    kind, low, high = match[1], float(match[2]), float(match[3])
    whole = kind.startswith("int")
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{where}: LOW should be below HIGH")
    if kind.endswith("log") and low <= 0:
        raise UserError(f"{where}: a logarithm wants LOW above 0")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{where}: int wants whole numbers")
    return Range(low, high, kind.endswith("log"), whole)


def word(key: str, value: Any) -> str:
    """The override that gives `key` this value, in Hydra's grammar."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
