"""What is chosen by device, packages and model, and what the plan says of it."""

import pytest

from ftdist.plan import kernels

EVERY = ("eager", "sdpa", "flash_attention", "flex_attention")
H100 = {"gpu": True, "capability": 9.0, "sixteen_bits": True, "takes": lambda: EVERY, "installed": lambda _: True}


@pytest.mark.parametrize(
    ("facts", "expected", "why"),
    [
        ({}, "flash_attention_3", "Hopper"),
        ({"installed": lambda package: package == "flash_attn"}, "flash_attention_2", "without a mask"),
        ({"capability": 8.0}, "flash_attention_2", "without a mask"),
        ({"capability": 10.0}, "flash_attention_2", "without a mask"),
        ({"capability": None}, "flash_attention_2", "without a mask"),
        ({"capability": 7.5}, "sdpa", "this is 7.5"),
        ({"installed": lambda _: False}, "sdpa", "flash_attn is not installed"),
        ({"sixteen_bits": False}, "sdpa", "train.bf16"),
        ({"takes": lambda: ("eager", "sdpa")}, "sdpa", "takes no FlashAttention"),
        ({"takes": lambda: ("eager",)}, "eager", "takes no FlashAttention"),
        ({"gpu": False, "takes": None}, "sdpa", "needs a GPU"),
    ],
)
def test_attention(facts, expected, why):
    choice = kernels.attention(**(H100 | facts))
    assert choice.value == expected and why in choice.reason


def test_precision_and_recomputation():
    assert kernels.bf16(gpu=True, capability=9.0, fp16=False).value is True
    assert kernels.bf16(gpu=True, capability=7.0, fp16=False).value is False
    assert kernels.bf16(gpu=True, capability=9.0, fp16=True).value is False
    assert kernels.recomputation(gpu=True, parameters=lambda: 8_000_000_000).value is True
    assert kernels.recomputation(gpu=True, parameters=lambda: 500_000_000).value is False
    assert kernels.recomputation(gpu=False, parameters=lambda: 8_000_000_000).value is False


def test_the_plan_tells_the_rule_beside_what_was_asked_for():
    train = {"bf16": True, "gradient_checkpointing": False}
    facts = {"gpu": True, "capability": 9.0, "parameters": 8_000_000_000, "takes": EVERY}
    lines = kernels.all_of(train, "eager", **facts)
    assert lines[0] == "train.bf16=true: compute capability 9 has bfloat16"
    assert lines[1] == (
        "train.gradient_checkpointing=false: as asked; by itself true (a model above 1 billion parameters)"
    )
    assert lines[2].startswith("model.attn_implementation=eager: as asked; by itself ")
