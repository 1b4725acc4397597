"""What importing costs: the garbage collector, and torch's compiler behind bitsandbytes."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While open nothing is collected, and what was made stays out of every later collection.

    torch, transformers and DeepSpeed make a million objects that live as long as the process. The collector walks all
    of them again and again while they come in, a fifth of the time of importing, and at each full collection after.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


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

    setattr(torch, "compile", late)  # noqa: B010  (an assignment has another type)
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("bitsandbytes")
    finally:
        setattr(torch, "compile", compiler)  # noqa: B010  (likewise)
