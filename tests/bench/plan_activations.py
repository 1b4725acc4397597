"""Predicted against traced activations of real shapes (1B to 14B): the real model classes under fake tensors.

    python tests/bench/plan_activations.py

No memory is used and no weights are needed: every storage that the forward and backward passes of the transformers
classes would make is added up. The last hidden state stands for the loss. Worst rows first.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel

from ftdist.compose import compose
from ftdist.plan.activations import Setting, Trained, activations, family
from ftdist.plan.trace import trace

QWEN_14B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
CELLS = (
    ("llama32_1b", 8, 512), ("llama32_1b", 1, 2048), ("qwen3_0_6b", 1, 8192), ("phi3_mini", 1, 2048),
    ("qwen25_7b", 4, 1024), ("llama31_8b", 1, 8192), ("qwen3_8b", 2, 2048), ("qwen25_14b", 1, 2048),
)  # fmt: skip


def row(name: str, config: dict, batch: int, length: int, recompute: bool) -> tuple[float, str]:
    """Error of the peak, and the line of the table."""
    with FakeTensorMode():
        made = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
        model = AutoModel.from_config(made, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(batch, length, dtype=torch.long)
        found = trace(model, lambda: model(input_ids=ids, use_cache=False).last_hidden_state.sum())
    shape = family(config)
    names = {n.removeprefix("layers.0.") for n, _ in model.named_parameters() if n.startswith("layers.0.")}
    said = activations(
        shape,
        [Trained(frozenset(names), frozenset(), ())] * shape.layers,
        Setting(2, False, 2, 2, 2, 0.0, 0),
        batch=batch, length=length, supervised=0, attention="sdpa", packed=True, checkpointing=recompute,
        embeddings_trained=True, input_gradients=False, final_norm_trained=True, trained_head=False, head_weight=2,
        tied=False, fused=True,
    )  # fmt: skip
    kept, peak = said.kept, said.backward
    real_kept, real_peak = found.between, found.backward
    errors = kept / real_kept - 1, peak / real_peak - 1
    kind = "recomputed" if recompute else "kept"
    numbers = (
        f"{kept / 1e6:,.1f} | {real_kept / 1e6:,.1f} | {errors[0]:+.2%} | {peak / 1e6:,.1f} | {real_peak / 1e6:,.1f}"
    )
    return abs(errors[1]), f"| {name} | {batch} × {length:,} | {kind} | {numbers} | {errors[1]:+.2%} |"


def main() -> None:
    rows = []
    for (name, *shape), recompute in itertools.product(CELLS, (False, True)):
        known = name == "qwen25_14b"
        config = QWEN_14B if known else compose("plan", [f"model={name}"])[0]["model"]["architecture"]
        rows.append(row(name, dict(config), *shape, recompute))
        print(rows[-1][1], file=sys.stderr, flush=True)
    print("| model | micro-batch | activations | kept, MB | traced | error | peak, MB | traced | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for _, line in sorted(rows, reverse=True):
        print(line)
    errors = sorted(error for error, _ in rows)
    print(f"\n{len(rows)} rows: worst {errors[-1]:.2%}, median {errors[len(errors) // 2]:.2%}")


if __name__ == "__main__":
    main()
