"""Every rule refuses its combination in one line, and lets its neighbours through."""

import pytest

from ftdist.errors import UserError
from ftdist.plan.refuse import refuse

GOOD = {
    "strategy": "lora",
    "adapters": True,
    "quantizes": False,
    "trains_all": False,
    "use_dora": False,
    "quantized_checkpoint": False,
    "model_type": "llama",
    "attention": ("eager", "sdpa", "flash_attention", "flex_attention"),
    "recomputation": True,
    "positions": 2048,
    "attn_implementation": "sdpa",
    "engine": "zero3",
    "stage": 3,
    "offload": False,
    "nvme_path": None,
    "here": True,
    "processes": 8,
    "nodes": 2,
    "gpu": True,
    "gpu_has_bf16": True,
    "optim": "adamw_torch_fused",
    "bf16": True,
    "fp16": False,
    "gradient_checkpointing": True,
    "max_length": 2048,
    "packing": True,
    "installed": lambda package: False,
}
FULL = {"strategy": "full", "adapters": False, "trains_all": True}
QLORA = {"strategy": "qlora", "quantizes": True}

REFUSED = {
    "full on quantised weights": (
        {**FULL, "quantized_checkpoint": True},
        "stored quantised .* use strategy=lora",
    ),
    "spectrum on quantised weights": (
        {**FULL, "strategy": "spectrum", "trains_all": False, "quantized_checkpoint": True},
        "strategy=spectrum: .* stored quantised",
    ),
    "4-bit weights as trainable": (
        {**FULL, "strategy": "own", "quantizes": True},
        "4-bit weights take no gradient",
    ),
    "QDoRA under ZeRO-3": (
        {**QLORA, "use_dora": True},
        "strategy.use_dora=true with engine=zero3: .* use engine=zero2",
    ),
    "too long": ({"max_length": 2049}, "train.max_length=2049: the model's positions end at 2048"),
    "packed recurrent": ({"model_type": "mamba2"}, "train.packing=true: mamba2 carries its state"),
    "a profile of a compiled model": (
        {"profile": True, "torch_compile": True},
        "train.profile=true: a compiled model has no phases",
    ),
    "kernels that are not installed": ({"liger": True}, "use_liger_kernel=true: the package liger_kernel is not"),
    "kernels on a CPU": ({"liger": True, "gpu": False, "bf16": False}, "use_liger_kernel=true: its kernels need a GPU"),
    "no recomputation": (
        {"recomputation": False},
        "train.gradient_checkpointing=true: llama does not support it",
    ),
    "no sdpa": ({"attention": ("eager",)}, "attn_implementation=sdpa: llama takes eager; .*=eager"),
    "flash attention on a CPU": (
        {"attn_implementation": "flash_attention_2", "gpu": False},
        "flash_attention_2: needs a GPU",
    ),
    "flash attention without its package": (
        {"attn_implementation": "flash_attention_2"},
        "flash_attn is not installed",
    ),
    "one process": ({"engine": "single", "stage": 0}, "engine=single: one process, not 16"),
    "offloaded 8-bit optimizer": (
        {"engine": "zero3_offload", "offload": True, "optim": "adamw_bnb_8bit"},
        "train.optim=adamw_bnb_8bit with engine=zero3_offload: .* would be replaced",
    ),
    "NVMe path": ({"nvme_path": "/nowhere/fast"}, "engine.nvme_path=/nowhere/fast: no directory"),
    "two precisions": ({"fp16": True}, "one precision at a time"),
    "old GPU": ({"gpu_has_bf16": False}, "this GPU has no bfloat16"),
}

ALLOWED = {
    "as it is": {},
    "full": FULL,
    "LoRA on quantised weights": {"quantized_checkpoint": True},
    "selected layers over a 4-bit base": {**QLORA, "strategy": "spectrum", "adapters": False},
    "QLoRA under ZeRO-3": QLORA,
    "QDoRA under ZeRO-2": {**QLORA, "use_dora": True, "engine": "zero2", "stage": 2},
    "DoRA under ZeRO-3": {"use_dora": True},
    "positions not known": {"positions": None, "max_length": 10**6},
    "unpacked recurrent": {"model_type": "mamba2", "packing": False},
    "no recomputation wanted": {"recomputation": False, "gradient_checkpointing": False},
    "flash attention from a package": {
        "attn_implementation": "flash_attention_2",
        "installed": lambda package: package == "flash_attn",
    },
    "one process, one engine": {"engine": "single", "stage": 0, "processes": 1, "nodes": 1},
    "ZeRO with one process": {"processes": 1, "nodes": 1},
    "offload": {"engine": "zero3_offload", "offload": True},
    "8-bit optimizer on the device": {"optim": "adamw_bnb_8bit"},
    "bf16 on a CPU": {"gpu": False, "gpu_has_bf16": None},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libaio.so.1")
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        refuse(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ALLOWED)
def test_allowed(case, tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libaio.so.1")
    refuse(**{**GOOD, "nvme_path": str(tmp_path), **ALLOWED[case]})


def test_nvme_needs_libaio_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UserError, match="engine=zero3: needs libaio"):
        refuse(**{**GOOD, "nvme_path": str(tmp_path)})
    refuse(**{**GOOD, "nvme_path": "/only/on/the/nodes", "here": False})


def test_packing_list_names_real_models_without_sequence_borders():
    from importlib.util import find_spec
    from pathlib import Path

    from ftdist.plan.refuse import _STATE_ACROSS_DOCUMENTS

    models = Path(find_spec("transformers").origin).parent / "models"
    for name in _STATE_ACROSS_DOCUMENTS:
        code = (models / name / f"modeling_{name}.py").read_text()
        assert "seq_idx" not in code and "cu_seq" not in code, name
