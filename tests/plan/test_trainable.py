"""Counts of trained parameters equal peft's own, without building a model."""

import pytest
from small_configs import SMALL_CONFIGS

from ftdist.errors import UserError
from ftdist.plan.shapes import meta_model, model_shapes
from ftdist.plan.trainable import module_type, trainable_parameters


def shapes_of(name):
    return model_shapes("org/small", SMALL_CONFIGS[name])


def ours(name, peft):
    return trainable_parameters(shapes_of(name), peft={"peft_type": "LORA", **peft}, trainable=None)


def counted_by_peft(name, peft):
    import torch
    from peft import LoraConfig, get_peft_model

    # on the CPU, not on the meta device: as it is in training
    model = meta_model(SMALL_CONFIGS[name], None, False).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    adapted = get_peft_model(model, LoraConfig(**peft))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


ATTENTION = {"gpt2": ["c_attn"], "phi3": ["qkv_proj", "o_proj"]}
REGEX = {"gpt2": r".*\.h\.0\..*c_proj", "phi3": r".*layers\.1\..*(down|gate_up)_proj"}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("r", [4, 16])
@pytest.mark.parametrize("target", ["all-linear", "list", "regex"])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "gpt2"])
def test_lora_count_equals_peft(name, target, r, use_dora):
    targets = {
        "all-linear": "all-linear",
        "list": ATTENTION.get(name, ["q_proj", "v_proj"]),
        "regex": REGEX.get(name, r".*layers\.1\..*(down|up)_proj"),
    }
    peft = {"r": r, "use_dora": use_dora, "target_modules": targets[target]}
    assert sum(ours(name, peft).values()) == counted_by_peft(name, peft)


CORNERS = {
    "mixture of experts": ("mixtral", {"target_modules": "all-linear"}),
    "tied head": ("llama-tied", {"target_modules": "all-linear"}),
    "biases of the adapted layers": ("llama-biases", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias of B": ("llama-biases", {"target_modules": ["q_proj"], "lora_bias": True}),
    "ranks by layer": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.0\..*": 3}},
    ),
    "left out": ("llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    "left out by pattern": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"}),
    "whole head": ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "whole tied head": ("llama-tied", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "whole embedding": ("llama-tied", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}),
    "both ends": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms by the end of the name": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "whole layer that is a target too": (
        "qwen2",
        {"target_modules": "all-linear", "modules_to_save": ["up_proj"]},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding with DoRA": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head by name": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "only A is trained": ("llama", {"target_modules": "all-linear", "init_lora_weights": "mica"}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_of_lora(corner):
    name, peft = CORNERS[corner]
    assert sum(ours(name, {"r": 4, **peft}).values()) == counted_by_peft(name, {"r": 4, **peft})


def test_the_whole_config_of_peft_is_understood(monkeypatch):
    from peft import LoraConfig

    from ftdist.plan import trainable

    monkeypatch.setattr(trainable, "_made_by_peft", None)  # the fast way must do
    config = LoraConfig(r=8, target_modules="all-linear", use_rslora=True, lora_dropout=0.1, task_type="CAUSAL_LM")
    assert sum(ours("llama", config.to_dict()).values()) == counted_by_peft(
        "llama", {"r": 8, "target_modules": "all-linear"}
    )


def test_any_other_adapter_is_counted_by_peft():
    peft = {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    counts = trainable_parameters(shapes_of("llama"), peft=peft, trainable=None)
    assert counts == {"self_attn.k_proj": 2 * 16, "mlp.down_proj": 2 * 48}


def test_lora_by_type():
    peft = {"r": 4, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    assert ours("llama", peft) == {
        "self_attn.q_proj": 2 * 4 * (32 + 32),
        "mlp.down_proj": 2 * 4 * (48 + 32),
        "lm_head": 50 * 32,
    }


def test_target_that_matches_nothing():
    with pytest.raises(UserError, match=r"target_modules=\[qkv\]: matches no layer .* are .*mlp.down_proj"):
        ours("llama", {"r": 4, "target_modules": ["qkv"]})
    with pytest.raises(UserError, match="also matches model.layers.0.self_attn, which is neither"):
        ours("llama", {"r": 4, "target_modules": ["self_attn"]})
    with pytest.raises(UserError, match="no valid regular expression"):
        ours("llama", {"r": 4, "target_modules": "*q_proj"})


def test_full():
    shapes = shapes_of("llama-tied")
    counts = trainable_parameters(shapes, peft=None, trainable=None)
    assert sum(counts.values()) == shapes.total
    assert list(counts)[:2] == ["model.embed_tokens", "self_attn.q_proj"]
    assert "lm_head" not in counts


def test_names():
    shapes = shapes_of("llama-tied")
    names = {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    assert trainable_parameters(shapes, peft=None, trainable=names) == {
        "model.embed_tokens": 50 * 32,  # the tied head is the same tensor
        "mlp.up_proj": 48 * 32,
    }
    with pytest.raises(UserError, match="nearest is model.layers.1.mlp.up_proj.weight"):
        trainable_parameters(shapes, peft=None, trainable={"model.layers.1.mlp.up_prj.weight"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.31.mlp.down_proj.weight", "mlp.down_proj"),
        ("model.layers.0.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("transformer.h.3.attn.c_attn", "attn.c_attn"),
        ("model.layers.2.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "block_sparse_moe.experts.7.w1"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
    ],
)
def test_module_type(name, kind):
    assert module_type(name) == kind
