"""Tiny models with the layouts of real families, with weights that have a structure."""

import torch

LAYERS = 10  # so that 10, 25, 50 and 75 % take different numbers of modules
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention: key and value are 16 × 32
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def structured(model, seed):
    """Gives every matrix a few strong directions of its own, as training does; random weights alone are noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim < 2:
                continue
            for matrix in weight if weight.ndim == 3 else [weight]:
                rank = int(torch.randint(1, 5, (1,), generator=generator))
                strength = float(torch.rand(1, generator=generator)) * 0.2
                left = torch.randn(matrix.shape[0], rank, generator=generator)
                right = torch.randn(rank, matrix.shape[1], generator=generator)
                noise = torch.randn(matrix.shape, generator=generator) * 0.02
                matrix.copy_(noise + strength * left @ right / matrix.shape[1] ** 0.5)


def build(kind):
    import transformers as hf

    configs = {
        "llama": lambda: hf.LlamaConfig(**SMALL),
        "tied": lambda: hf.Gemma2Config(**SMALL, head_dim=8),
        "phi3": lambda: hf.Phi3Config(**SMALL),
        "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=3),
        "stacked": lambda: hf.GptOssConfig(
            **SMALL, num_local_experts=3, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
        ),
        "biased": lambda: hf.Qwen2Config(**SMALL),
    }
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32)
    structured(model, seed=sorted(configs).index(kind))
    return model
