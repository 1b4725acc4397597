"""Small configs of every family that the plan knows in closed form."""

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 50, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


def _small(model_type, **changes):
    return {"model_type": model_type, **_SMALL, **changes}


SMALL_CONFIGS = {
    "llama": _small("llama"),
    "llama-tied": _small("llama", tie_word_embeddings=True),
    "llama-biases": _small("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head_dim": _small("llama", head_dim=16, num_key_value_heads=None),
    "mistral": _small("mistral"),
    "mistral-head_dim": _small("mistral", head_dim=16, attention_bias=True),
    "mixtral": _small("mixtral", num_local_experts=3),
    "qwen2": _small("qwen2"),
    "qwen2-tied": _small("qwen2", tie_word_embeddings=True, num_key_value_heads=4),
    "qwen3": _small("qwen3", head_dim=16),
    "qwen3-tied-bias": _small("qwen3", head_dim=8, tie_word_embeddings=True, attention_bias=True),
    "phi3": _small("phi3"),
    "phi3-tied-mha": _small("phi3", tie_word_embeddings=True, num_key_value_heads=4),
    "gemma": _small("gemma", head_dim=16),
    "gemma-untied": _small("gemma", head_dim=16, tie_word_embeddings=False, attention_bias=True),
    "gemma2": _small("gemma2", head_dim=16),
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2-inner-untied": {"model_type": "gpt2", **_GPT2, "n_inner": 24, "tie_word_embeddings": False},
}
