"""What is chosen for a device when it is left to the program, and why.

Each rule is a function of facts about the device, the installed packages and the model. A value that the user has given
stands, and the plan says what the rule would take. The rules for GPUs follow what the libraries document; none of them
was measured on a GPU by this project yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AMPERE, HOPPER = 8.0, 9.0  # compute capabilities; Ampere: the first GPUs with bfloat16 and FlashAttention-2
RECOMPUTE_ABOVE = 1_000_000_000  # parameters; below, activations are small beside what a GPU holds


@dataclass(frozen=True)
class Choice:
    """A value and its reason, in a few words."""

    value: Any
    reason: str


def installed(package: str) -> bool:
    """Whether it could be imported; nothing is."""
    return importlib.util.find_spec(package) is not None


def bf16(*, gpu: bool, capability: float | None, fp16: bool) -> Choice:
    """`train.bf16`. capability: None if not known, which counts as a processor's."""
    if fp16:
        return Choice(False, "train.fp16 is on")
    if capability:
        has = capability >= AMPERE
        return Choice(has, f"compute capability {capability:g} has {'' if has else 'no '}bfloat16")
    has = _cpu_has_bf16()
    where = "this machine's processor" if not gpu else "the GPU is not known, and this machine's processor"
    return Choice(has, f"{where} {'multiplies' if has else 'does not multiply'} bfloat16 by itself")


def recomputation(*, gpu: bool, parameters: Callable[[], int]) -> Choice:
    """`train.gradient_checkpointing`. parameters: of the model, asked on GPUs alone."""
    if not gpu:
        return Choice(False, "on a CPU time is what lacks, not memory")
    large = parameters() > RECOMPUTE_ABOVE
    return Choice(large, f"a model {'above' if large else 'of at most'} {RECOMPUTE_ABOVE // 10**9} billion parameters")


def attention(
    *,
    gpu: bool,
    capability: float | None,
    sixteen_bits: bool,
    takes: Callable[[], Collection[str]],
    installed: Callable[[str], bool] = installed,
) -> Choice:
    """`model.attn_implementation`. takes: kinds of attention that the model class has, asked on GPUs alone.

    FlashAttention takes packed rows by their lengths; sdpa builds a mask of length × length for them.
    """
    if not gpu:
        return Choice("sdpa", "FlashAttention needs a GPU")
    if "flash_attention" not in takes():
        kind = "sdpa" if "sdpa" in takes() else "eager"
        return Choice(kind, "the model class takes no FlashAttention")
    if not sixteen_bits:
        return Choice("sdpa", "FlashAttention needs train.bf16 or train.fp16")
    if capability and capability < AMPERE:
        return Choice("sdpa", f"FlashAttention needs compute capability {AMPERE:g}, this is {capability:g}")
    if capability and HOPPER <= capability < HOPPER + 1 and installed("flash_attn_interface"):
        return Choice("flash_attention_3", "a Hopper GPU, and flash_attn_interface is installed")
    if installed("flash_attn"):
        return Choice("flash_attention_2", "flash_attn is installed: packed rows without a mask")
    return Choice("sdpa", "flash_attn is not installed (flex_attention packs without it, not measured yet)")


def liger(*, gpu: bool, installed: Callable[[str], bool] = installed) -> Choice:
    """`train.use_liger_kernel`: norms, rotations and gated layers in one kernel each; the loss stays ftdist's own."""
    if not gpu:
        return Choice(False, "its kernels need a GPU")
    if not installed("liger_kernel"):
        return Choice(False, "liger_kernel is not installed")
    return Choice(False, "installed, but not measured here yet: train.use_liger_kernel=true takes it")


def said(key: str, value: Any, choice: Choice) -> str:
    """A line of the plan."""
    shown, other = (str(v).lower() if isinstance(v, bool) else v for v in (value, choice.value))
    if value == choice.value:
        return f"{key}={shown}: {choice.reason}"
    return f"{key}={shown}: as asked; by itself {other} ({choice.reason})"


def all_of(
    train: Mapping[str, Any], attn_implementation: str, *, gpu: bool, capability: float | None,
    parameters: int, takes: Collection[str],
) -> list[str]:  # fmt: skip
    """Every choice of a configuration, a line each."""
    fp16 = bool(train.get("fp16"))
    sixteen = bool(train["bf16"]) or fp16
    rules = {
        "train.bf16": (bool(train["bf16"]), bf16(gpu=gpu, capability=capability, fp16=fp16)),
        "train.gradient_checkpointing": (
            bool(train["gradient_checkpointing"]),
            recomputation(gpu=gpu, parameters=lambda: parameters),
        ),
        "model.attn_implementation": (
            attn_implementation,
            attention(gpu=gpu, capability=capability, sixteen_bits=sixteen, takes=lambda: takes),
        ),
        "train.use_liger_kernel": (bool(train.get("use_liger_kernel")), liger(gpu=gpu)),
    }
    return [said(key, value, choice) for key, (value, choice) in rules.items()]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by itself; without, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
