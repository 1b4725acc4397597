"""Parameter names and shapes of the dense decoder families (and Mixtral) in closed form, from config.json.

Names are those of the loaded model (`named_parameters`), which can differ from the names on disk. A tied
output head is the embedding tensor and is listed once. `tests/plan` compares every family with the real model
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftdist.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """What the plan knows of a model class: all parameters and which modules are linear layers."""

    parameters: dict[str, Shape]  # run-time parameter name -> shape
    linear: dict[str, tuple[int, int]]  # linear module -> (in_features, out_features); the output head too
    embeddings: dict[str, tuple[int, int]]  # embedding module -> (rows, columns)
    head: str | None  # module of the output head
    tied: dict[str, str]  # parameter that shares its tensor -> the parameter that holds it
    attention: tuple[str, ...]  # attention implementations that the model class takes
    recomputation: bool  # gradient checkpointing is supported
    disk_names: bool  # a checkpoint uses these names too, with or without the first part (`model.`)


# What the model class assumes for a key that config.json leaves out (transformers' configuration classes).
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN2 = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_GEMMA = {
    **_LLAMA,
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": {**_MISTRAL, "num_local_experts": 8},
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128},
    "phi3": {
        **_LLAMA,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
    },
    "gemma": _GEMMA,
    "gemma2": {
        **_GEMMA,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "tie_word_embeddings": True,
    },
}
# Keys that are read only if the class has them: a stray `attention_bias` in a Mistral config changes nothing.
_HAS_ATTENTION_BIAS = ("llama", "qwen3", "gemma", "gemma2")
_HAS_MLP_BIAS = ("llama",)


def closed_form(config: dict[str, Any]) -> Architecture | None:
    """The architecture of a known `model_type`, else None. UserError if the config contradicts itself."""
    family = config.get("model_type")
    if family not in DEFAULTS:
        return None
    facts = DEFAULTS[family] | {key: config[key] for key in DEFAULTS[family] if key in config}
    for key, value in facts.items():
        if value is None or isinstance(value, bool):
            continue
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.json of the model: {key}={value!r}: a positive integer is wanted; repair it")
    return _gpt2(facts) if family == "gpt2" else _decoder(family, facts)


def positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that the model's positions cover, in tokens; None if the config does not say."""
    text = config.get("text_config") or config
    defaults = DEFAULTS.get(str(text.get("model_type")), {})
    for key in ("max_position_embeddings", "n_positions"):
        value = text.get(key, defaults.get(key))
        if isinstance(value, int):
            return value
    return None


class _Builder:
    """Collects parameters in the order of the model and remembers what kind of module they belong to."""

    def __init__(self) -> None:
        self.parameters: dict[str, Shape] = {}
        self.linears: dict[str, tuple[int, int]] = {}
        self.embeddings: dict[str, tuple[int, int]] = {}

    def linear(self, name: str, fan_in: int, fan_out: int, bias: bool = False, transposed: bool = False) -> None:
        self.parameters[f"{name}.weight"] = (fan_in, fan_out) if transposed else (fan_out, fan_in)
        if bias:
            self.parameters[f"{name}.bias"] = (fan_out,)
        self.linears[name] = (fan_in, fan_out)

    def embedding(self, name: str, rows: int, columns: int) -> None:
        self.parameters[f"{name}.weight"] = (rows, columns)
        self.embeddings[name] = (rows, columns)

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self.parameters[f"{name}.weight"] = (size,)
        if bias:
            self.parameters[f"{name}.bias"] = (size,)

    def head(self, embedding: str, hidden: int, vocabulary: int, tied: bool) -> dict[str, str]:
        """Adds the output head; returns its weight -> the embedding's if the two are one tensor."""
        if tied:
            self.linears["lm_head"] = (hidden, vocabulary)
            return {"lm_head.weight": f"{embedding}.weight"}
        self.linear("lm_head", hidden, vocabulary)
        return {}


def _decoder(family: str, facts: dict[str, Any]) -> Architecture:
    hidden, inner = facts["hidden_size"], facts["intermediate_size"]
    heads = facts["num_attention_heads"]
    kv_heads = facts["num_key_value_heads"] or heads
    head_dim = facts["head_dim"] or hidden // heads
    if heads % kv_heads:
        raise UserError(
            f"config.json of the model: num_attention_heads={heads} is no multiple of "
            f"num_key_value_heads={kv_heads}; repair it"
        )
    attention_bias = family in _HAS_ATTENTION_BIAS and facts["attention_bias"]
    qkv_bias = attention_bias or family == "qwen2"
    mlp_bias = family in _HAS_MLP_BIAS and facts["mlp_bias"]

    b = _Builder()
    b.embedding("model.embed_tokens", facts["vocab_size"], hidden)
    for layer in range(facts["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        if family == "phi3":  # fused projections
            b.linear(f"{at}.self_attn.o_proj", heads * head_dim, hidden)
            b.linear(f"{at}.self_attn.qkv_proj", hidden, (heads + 2 * kv_heads) * head_dim)
            b.linear(f"{at}.mlp.gate_up_proj", hidden, 2 * inner)
            b.linear(f"{at}.mlp.down_proj", inner, hidden)
        else:
            b.linear(f"{at}.self_attn.q_proj", hidden, heads * head_dim, bias=qkv_bias)
            b.linear(f"{at}.self_attn.k_proj", hidden, kv_heads * head_dim, bias=qkv_bias)
            b.linear(f"{at}.self_attn.v_proj", hidden, kv_heads * head_dim, bias=qkv_bias)
            b.linear(f"{at}.self_attn.o_proj", heads * head_dim, hidden, bias=attention_bias)
            if family == "qwen3":
                b.norm(f"{at}.self_attn.q_norm", head_dim)
                b.norm(f"{at}.self_attn.k_norm", head_dim)
            if family == "mixtral":  # all experts of a layer in two tensors; neither they nor the router is nn.Linear
                experts = facts["num_local_experts"]
                b.parameters[f"{at}.mlp.gate.weight"] = (experts, hidden)
                b.parameters[f"{at}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
                b.parameters[f"{at}.mlp.experts.down_proj"] = (experts, hidden, inner)
            else:
                b.linear(f"{at}.mlp.gate_proj", hidden, inner, bias=mlp_bias)
                b.linear(f"{at}.mlp.up_proj", hidden, inner, bias=mlp_bias)
                b.linear(f"{at}.mlp.down_proj", inner, hidden, bias=mlp_bias)
        b.norm(f"{at}.input_layernorm", hidden)
        b.norm(f"{at}.post_attention_layernorm", hidden)
        if family == "gemma2":
            b.norm(f"{at}.pre_feedforward_layernorm", hidden)
            b.norm(f"{at}.post_feedforward_layernorm", hidden)
    b.norm("model.norm", hidden)
    tied = b.head("model.embed_tokens", hidden, facts["vocab_size"], facts["tie_word_embeddings"])
    return Architecture(
        parameters=b.parameters,
        linear=b.linears,
        embeddings=b.embeddings,
        head="lm_head",
        tied=tied,
        # gemma2 caps its attention scores, which torch's scaled_dot_product_attention cannot
        attention=("eager", "flash_attention", "flex_attention") + (() if family == "gemma2" else ("sdpa",)),
        recomputation=True,
        disk_names=family != "mixtral",  # on disk every expert is a tensor of its own
    )


def _gpt2(facts: dict[str, Any]) -> Architecture:
    hidden = facts["n_embd"]
    inner = facts["n_inner"] or 4 * hidden
    b = _Builder()
    b.embedding("transformer.wte", facts["vocab_size"], hidden)
    b.embedding("transformer.wpe", facts["n_positions"], hidden)
    for layer in range(facts["n_layer"]):
        at = f"transformer.h.{layer}"
        # Conv1D keeps its weight as (in, out)
        b.norm(f"{at}.ln_1", hidden, bias=True)
        b.linear(f"{at}.attn.c_attn", hidden, 3 * hidden, bias=True, transposed=True)
        b.linear(f"{at}.attn.c_proj", hidden, hidden, bias=True, transposed=True)
        b.norm(f"{at}.ln_2", hidden, bias=True)
        b.linear(f"{at}.mlp.c_fc", hidden, inner, bias=True, transposed=True)
        b.linear(f"{at}.mlp.c_proj", inner, hidden, bias=True, transposed=True)
    b.norm("transformer.ln_f", hidden, bias=True)
    tied = b.head("transformer.wte", hidden, facts["vocab_size"], facts["tie_word_embeddings"])
    return Architecture(
        parameters=b.parameters,
        linear=b.linears,
        embeddings=b.embeddings,
        head="lm_head",
        tied=tied,
        attention=("eager", "sdpa", "flash_attention"),
        recomputation=True,
        disk_names=True,
    )
