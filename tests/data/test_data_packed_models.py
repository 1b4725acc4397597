"""Loss and gradients of packed rows equal those of the same sequences one by one, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from data_help import pair, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 704,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen2": Qwen2Config, "mistral": MistralConfig}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> list[dict[str, list[int]]]:
    from data_help import DEFAULTS

    from ftdist.data.prepare import prepare

    folder = tmp_path_factory.mktemp("packed")
    prepared = prepare(
        **{**DEFAULTS, "path": str(write_jsonl(folder / "a.jsonl", [pair(i, 4 + i % 23) for i in range(24)]))},
        tokenizer_path=str(tokenizer_path),
        revision=None,
        trust_remote_code=False,
        max_length=192,
        packing=True,
        task="sft",
        seed=1,
        cache_dir=folder / "cache",
    )
    rows = list(datasets.load_from_disk(str(prepared / "train")))[:3]
    assert max(len(row["lengths"]) for row in rows) >= 3
    return rows


def loss(model: Any, ids: list[int], labels: list[int], lengths: list[int]) -> torch.Tensor:
    """Summed cross-entropy of one row; positions begin anew in each sequence, and there is no attention mask."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    logits = model(input_ids=torch.tensor([ids]), position_ids=positions[None], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[0, :-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
    )


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_unpacked(rows: list[dict[str, list[int]]], name: str, attention: str) -> None:
    torch.manual_seed(0)
    config: PretrainedConfig = CONFIGS[name](**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).train()
    packed = sum((loss(model, r["input_ids"], r["labels"], r["lengths"]) for r in rows), torch.tensor(0.0))
    together = gradients(model, packed)
    alone = torch.tensor(0.0)
    for row in rows:
        at = 0
        for length in row["lengths"]:
            part = slice(at, at + length)
            alone = alone + loss(model, row["input_ids"][part], row["labels"][part], [length])
            at += length
    apart = gradients(model, alone)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    assert together.keys() == apart.keys()
    for key, gradient in apart.items():
        torch.testing.assert_close(together[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)
    # the comparison can fail: positions that go on across sequences see their neighbours
    leaked = sum((loss(model, r["input_ids"], r["labels"], [len(r["input_ids"])]) for r in rows), torch.tensor(0.0))
    assert abs(leaked.item() - alone.item()) > 1e-3
