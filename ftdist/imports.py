"""What importing costs: bitsandbytes without torch's compiler."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock


def bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, before PEFT and transformers do.

    Some of its functions are decorated with `torch.compile`, which imports all of Inductor (more than a second of a
    processor) in every process, whether they are called or not. Here the decorator compiles at the first call.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    compiler: Callable[..., Any] = torch.compile

    def late(function: Callable[..., Any] | None = None, **keywords: Any) -> Any:
        if function is None:
            return functools.partial(late, **keywords)
        made = functools.cache(lambda: compiler(function, **keywords))

        @functools.wraps(function)
        def first(*positional: Any, **named: Any) -> Any:
            return made()(*positional, **named)

        return first

    with mock.patch("torch.compile", late), contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")
