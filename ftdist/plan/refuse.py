"""Combinations that cannot work, found before anything loads: each says why, and what would work.

Only what was tried with the pinned stack or is written in its source is refused; each rule names its ground.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from collections.abc import Callable, Collection
from pathlib import Path

from ftdist.errors import UserError

# accelerate's `map_pytorch_optim_to_deepspeed` turns every other optimizer into a 32-bit Adam without a word.
_OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "lion_32bit")

# Model classes of transformers whose recurrent or convolutional state runs on across the documents of a
# packed row: their code takes no sequence indices for it.
_STATE_ACROSS_DOCUMENTS = (
    *(
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "nemotron_h",
        "rwkv",
    ),
    *("xlstm", "zamba2"),
)


def refuse(
    *,
    strategy: str,
    adapters: bool,
    quantizes: bool,
    trains_all: bool,
    use_dora: bool,
    quantized_checkpoint: bool,
    model_type: str,
    attention: Collection[str],
    recomputation: bool,
    positions: int | None,
    attn_implementation: str,
    engine: str,
    stage: int,
    offload: bool,
    nvme_path: str | None,
    processes: int,
    nodes: int,
    gpu: bool,
    gpu_has_bf16: bool | None,
    optim: str,
    bf16: bool,
    fp16: bool,
    gradient_checkpointing: bool,
    max_length: int,
    packing: bool,
    profile: bool = False,
    torch_compile: bool = False,
    liger: bool = False,
    here: bool = True,
    installed: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None,
) -> None:
    """Raises UserError for the first combination that cannot work.

    adapters: the strategy trains adapters, not the base; quantizes: it loads the base in 4 bit; trains_all:
    it trains every weight; quantized_checkpoint: the stored weights are quantised; attention, recomputation,
    positions: what the model class takes; stage: of ZeRO, 0 without; offload: optimizer states leave the
    device; here: the ranks run on this machine; processes: per node; gpu_has_bf16: None if not known.
    """
    # Strategy and model
    if quantized_checkpoint and not adapters:
        raise UserError(
            f"strategy={strategy}: the weights of this model are stored quantised and take no gradient; "
            "use strategy=lora, or the unquantised model"
        )
    if quantizes and trains_all:
        raise UserError(f"strategy={strategy}: 4-bit weights take no gradient; use adapters, or do not quantise")
    # tried: backward fails, AttributeError: 'Params4bit' object has no attribute 'ds_status'
    if quantizes and use_dora and stage == 3:
        raise UserError(
            f"strategy.use_dora=true with engine={engine}: DoRA reads whole weights, which fails for "
            "4-bit ones that ZeRO-3 shards; use engine=zero2, strategy=lora, or strategy.use_dora=false"
        )

    # Model and sequence
    if positions is not None and max_length > positions:
        raise UserError(
            f"train.max_length={max_length}: the model's positions end at {positions}; use "
            f"train.max_length={positions} or less, or a model with a longer context"
        )
    if packing and model_type in _STATE_ACROSS_DOCUMENTS:
        raise UserError(
            f"train.packing=true: {model_type} carries its state from one packed document into the next; "
            "use train.packing=false"
        )
    if gradient_checkpointing and not recomputation:
        raise UserError(f"train.gradient_checkpointing=true: {model_type} does not support it; use false")
    _refuse_attention(attn_implementation, attention, model_type, gpu, installed)

    # Engine
    if engine == "single" and processes * nodes > 1:
        raise UserError(f"engine=single: one process, not {processes * nodes}; use engine=ddp or engine=zero2")
    if offload and optim not in _OFFLOADED_OPTIMIZERS:
        raise UserError(
            f"train.optim={optim} with engine={engine}: offloaded states are DeepSpeed's own CPU "
            f"optimizer, this one would be replaced; use one of {', '.join(_OFFLOADED_OPTIMIZERS)}"
        )
    if nvme_path is not None and here:
        if ctypes.util.find_library("aio") is None:  # DeepSpeed's async_io operator is built on it
            raise UserError(f"engine={engine}: needs libaio, which is not installed here; apt install libaio-dev")
        directory = Path(nvme_path).expanduser()
        if not directory.is_dir() or not os.access(directory, os.W_OK):
            raise UserError(f"engine.nvme_path={nvme_path}: no directory that can be written here; make it first")

    if liger and not (gpu and installed("liger_kernel")):
        lacks = "the package liger_kernel is not installed" if gpu else "its kernels need a GPU"
        raise UserError(f"train.use_liger_kernel=true: {lacks}; use train.use_liger_kernel=false")

    # Measuring
    if profile and torch_compile:
        raise UserError(
            "train.profile=true: a compiled model has no phases to be told apart; use train.torch_compile=false"
        )

    # Precision
    if bf16 and fp16:  # transformers' TrainingArguments
        raise UserError("train.fp16=true with train.bf16=true: one precision at a time; set one of them to false")
    if bf16 and gpu and gpu_has_bf16 is False:
        raise UserError("train.bf16=true: this GPU has no bfloat16 (Ampere and later do); use train.fp16=true")


def _refuse_attention(
    wanted: str, attention: Collection[str], model_type: str, gpu: bool, installed: Callable[[str], bool]
) -> None:
    """As `_check_and_adjust_attn_implementation` of transformers would, after loading for minutes."""
    kind = "flash_attention" if wanted.startswith("flash_attention") else wanted
    if kind not in attention:
        raise UserError(
            f"model.attn_implementation={wanted}: {model_type} takes {', '.join(sorted(attention))}; "
            f"use model.attn_implementation={'sdpa' if 'sdpa' in attention else 'eager'}"
        )
    if kind != "flash_attention":
        return
    if not gpu:
        raise UserError(f"model.attn_implementation={wanted}: needs a GPU; use model.attn_implementation=sdpa")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(wanted)
    if package and not installed(package) and not installed("kernels"):
        raise UserError(
            f"model.attn_implementation={wanted}: the package {package} is not installed; install flash-attn "
            "for this CUDA, or use model.attn_implementation=sdpa"
        )
