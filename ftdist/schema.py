"""A function's signature is the schema of its config group: check a user's values against it before it runs."""

from __future__ import annotations

import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ftdist.errors import UserError


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """The end of an error message: the right name if one is close, else all of them."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {prefix}{match[0]}?" if match else "known: " + (", ".join(sorted(known)) or "none")


def keys_of(function: Callable[..., Any], context: Collection[str] = ()) -> list[str]:
    """The keyword-only parameters of `function` that are the user's, not the program's (`context`)."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in context]


def pick(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that `function` takes."""
    return {name: values[name] for name in keys_of(function) if name in values}


def check(group: str, values: Mapping[str, Any], *functions: Callable[..., Any], context: Collection[str] = ()) -> None:
    """UserError names the first key of `values` that no function takes, that is missing, or of a wrong type.

    Types and limits come from the annotations (pydantic's `Field` in `Annotated`), defaults from the YAML files.
    """
    import pydantic

    fields: dict[str, Any] = {}
    for function in functions:
        names = keys_of(function, context)  # only these: other annotations may name classes not imported here
        owner = type(group, (), {"__annotations__": {name: function.__annotations__[name] for name in names}})
        hints = typing.get_type_hints(owner, globalns=vars(sys.modules[function.__module__]), include_extras=True)
        fields |= {name: (hint, ...) for name, hint in hints.items()}
    for name in values:
        if name not in fields:
            raise UserError(f"{_full(group, name)}: no such key; {nearest(name, list(fields), _full(group, ''))}")
    config = pydantic.ConfigDict(coerce_numbers_to_str=True, protected_namespaces=())
    model = pydantic.create_model(group, __config__=config, **fields)
    try:
        model.model_validate(dict(values))
    except pydantic.ValidationError as failure:
        raise UserError(_one_line(group, values, failure.errors()))


def _full(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


def _one_line(group: str, values: Mapping[str, Any], errors: list[Any]) -> str:
    name = str(errors[0]["loc"][0])
    key = _full(group, name)
    if name not in values:
        return f"{key}: missing; set {key}=…"
    reasons = []
    for error in errors:
        reason = error["msg"].replace("Input should be", "should be")
        if error["loc"][0] == name and reason not in reasons:
            reasons.append(reason)
    return f"{key}={values[name]}: {' or '.join(reasons)}"
