"""What a real model keeps and needs for one forward and backward pass, by running it and watching every storage.

Slow (imports torch and transformers); for architectures without a closed form, and to check the closed form.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Traced:
    """Bytes beyond what existed before."""

    saved: int  # held by autograd between the passes; parameters are not counted
    between: int  # all that is alive between the passes
    forward: int  # highest point
    backward: int


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when they die."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.live, self.top = known, 0, 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.top = max(self.top, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.alive.pop(key, 0)


def trace(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Traced:
    """Run `forward`, which returns a scalar, and its backward pass; gradients of parameters exist before."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    known |= {p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    watch = _Watch(known)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watch:
        value = forward()
        high, between = watch.top, watch.live
        watch.top = watch.live
        value.backward()
    return Traced(sum(kept.values()), between, high, watch.top)


def meta(
    config: dict[str, Any],
    directory: Any,
    trust_remote_code: bool,
    *,
    batch: int,
    length: int,
    dtype: str,
    attention: str,
    recompute: bool,
    trained: set[str] | None,
) -> tuple[int, int]:
    """Bytes kept and the peak of one micro-batch up to the last hidden state, on tensors without memory.

    trained: names that want a gradient, None for all. Where the model class cannot be run so, a rule of thumb.
    """
    from ftdist.plan.shapes import meta_model

    model = meta_model(config, directory, trust_remote_code).to(getattr(torch, dtype))
    if trained is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    model.train()
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    if recompute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name is not in every supported transformers
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    body = model.base_model

    def forward() -> torch.Tensor:
        states: torch.Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return states.sum()

    try:
        found = trace(model, forward)
    except Exception:  # control flow that needs numbers, code of the model's own
        width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        text = config.get("text_config") or config
        hidden = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 1)
        layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 1)
        one = 17 * width * batch * length * hidden  # Korthikanti et al. 2022, equation 1, without the scores
        return (
            (layers * one, (layers + 1) * one) if not recompute else (layers * one // 17, layers * one // 17 + 2 * one)
        )
    return found.between, max(found.forward, found.backward)
