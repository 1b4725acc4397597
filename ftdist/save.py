"""The final model as plain transformers/PEFT files: gathered from its shards, complete before it has its name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ftdist import checkpoint, lease


def save_final(model: Any, tokenizer: Any, base: str, directory: Path, main: bool, token: int) -> None:
    """Write `directory` from every rank's shards (all ranks must call; only `main` writes, under its lease's token).

    Adapters: the adapter alone. Otherwise the whole model: trained tensors as they were trained, frozen ones bit for
    bit as in the `base` directory's own files.
    """
    adapter = hasattr(model, "peft_config")
    wanted = [(n, p) for n, p in model.named_parameters() if p.requires_grad or not adapter]
    original = {} if adapter else _original_tensors(base, {n for n, p in wanted if not p.requires_grad})
    state = {}
    for name, parameter in wanted:
        if name in original:
            continue
        if hasattr(parameter, "quant_state"):
            raise RuntimeError(f"{name} is quantised and {base} does not hold it whole: it cannot be saved")
        with _whole(parameter):
            if main:
                state[name] = parameter.detach().to("cpu", copy=True)
    if not main:
        return
    partial = directory.with_name(f"{directory.name}.{token}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if adapter:
        model.save_pretrained(partial, state_dict=state)
    else:
        state |= {n: b.detach().cpu() for n, b in model.named_buffers() if n in model.state_dict()}
        state |= original
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise RuntimeError(f"{empty[0]} is empty: a shard was saved instead of the whole")
        if getattr(model, "hf_quantizer", None) is not None:  # what is saved is whole again
            model.hf_quantizer = None
            del model.config.quantization_config
        widest = max((t.dtype for t in state.values() if t.is_floating_point()), key=lambda d: d.itemsize)
        model.config.dtype = widest
        model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    checkpoint.sync(partial)
    with lease.guarded(directory.parent, token):
        partial.rename(directory)
    checkpoint.sync(directory.parent)


def _whole(parameter: Any) -> Any:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _original_tensors(base: str, names: set[str]) -> dict[str, torch.Tensor]:
    """Those of `names` that the base's safetensors files hold under the same name, as they are on disk."""
    from safetensors import safe_open

    folder = Path(base)
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"} if not index.is_file() else set(json.loads(index.read_text())["weight_map"].values())
    found: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        if (folder / file).is_file():
            with safe_open(folder / file, framework="pt") as shard:
                found |= {name: shard.get_tensor(name) for name in names.intersection(shard.keys())}
    return found
