"""The closed form of activations against the real model classes, whose every storage is watched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ftdist.loss import Head
from ftdist.plan.activations import Setting, Trained, activations, family
from ftdist.plan.trace import trace

BATCH, LENGTH, LAYERS = 2, 64, 3
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "llama-dropout": {"attention_dropout": 0.1},
    "phi3-dropout": {"resid_pdrop": 0.1},
}
# strategy, autocast (float32 weights beside a bfloat16 computation), bfloat16
KINDS = {
    "full float32": ("full", False, False),
    "full bfloat16": ("full", False, True),
    "full autocast": ("full", True, True),
    "lora bfloat16": ("lora", False, True),
    "lora autocast": ("lora", True, True),
    "chosen layers": ("spectrum", False, True),
}


def built(config, strategy, autocast, bf16, attention):
    torch.manual_seed(0)
    whole = autocast and strategy == "full"
    kind = config["model_type"]
    made = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    dtype = torch.bfloat16 if bf16 and not whole else torch.float32
    model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention)
    if strategy == "lora":
        adapters = LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32 if autocast else dtype)
    if strategy == "spectrum":
        for name, parameter in model.named_parameters():
            chosen = any(part in name for part in ("embed", "lm_head", "layers.1.mlp.down", "layers.2.self_attn.q"))
            parameter.requires_grad_(chosen)
    return model.train()


def layers_of(model, strategy, autocast):
    base = model.get_base_model() if strategy == "lora" else model
    names = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modules = dict(base.named_modules())
    made = []
    for number in range(LAYERS):
        prefix = f"model.layers.{number}."
        trained = frozenset(n[len(prefix) :] for n, grad in names.items() if n.startswith(prefix) and grad)
        if strategy == "lora":
            adapted = [n for n, m in modules.items() if n.startswith(prefix) and hasattr(m, "lora_A")]
            made.append(Trained(frozenset(), frozenset(), tuple((n[len(prefix) :], 4) for n in adapted)))
        else:
            made.append(Trained(trained | ({"whole"} if autocast else set()), frozenset(), ()))
    return base, made


def compared(name, strategy, autocast, bf16, attention, recompute, packed):
    """Predicted (kept, highest point) and the same of the real model."""
    config = {**SIZES, **FAMILIES[name], "model_type": name.split("-")[0]}
    model = built(config, strategy, autocast, bf16, attention)
    base, layers = layers_of(model, strategy, autocast)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if strategy == "lora":
            model.enable_input_require_grads()
    head = Head(model, 0.0, "nll")
    ids = torch.randint(0, 1000, (BATCH, LENGTH))
    line = torch.cat([torch.arange(LENGTH // 2)] * 2) if packed else torch.arange(LENGTH)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), head.answering(ids):
            return model(input_ids=ids, position_ids=line.expand(BATCH, -1), use_cache=False).logits

    found = trace(model, forward)
    weight = base.get_output_embeddings().weight
    embeddings = base.get_input_embeddings().weight
    wide = 4 if autocast or not bf16 else 2
    setting = Setting(
        compute=2 if bf16 else 4,
        autocast=autocast,
        weight=wide,
        frozen=4 if not bf16 or (autocast and strategy == "full") else 2,
        adapter=wide,
        dropout=0.05,
        mask=0,
    )
    shape = family(config)
    said = activations(
        shape,
        layers,
        setting,
        batch=BATCH,
        length=LENGTH,
        supervised=BATCH * LENGTH,
        attention=attention,
        packed=packed,
        checkpointing=recompute,
        embeddings_trained=embeddings.requires_grad,
        input_gradients=recompute and strategy == "lora",
        final_norm_trained=base.model.norm.weight.requires_grad,
        trained_head=weight.requires_grad,
        head_weight=weight.element_size(),
        tied=weight is embeddings,
        fused=True,
    )
    hidden = BATCH * LENGTH * shape.hidden * (4 if not bf16 or (autocast and strategy == "full") else 2)
    # what logsumexp takes and gives back inside itself is not seen by the watch
    peak = max(said.kept + said.forward + said.loss.peak - said.loss.hidden + hidden, said.backward)
    return (said.kept + said.loss.saved, peak), (
        found.between if recompute else found.saved,
        max(found.forward, found.backward),
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma"])
def test_closed_form_is_the_real_model(name, kind, recompute):
    (kept, peak), (real_kept, real_peak) = compared(name, *KINDS[kind], "sdpa", recompute, packed=True)
    assert kept == pytest.approx(real_kept, rel=0.01)
    assert peak == pytest.approx(real_peak, rel=0.025)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2", "qwen3", "llama-dropout", "phi3-dropout"])
def test_other_families_and_attentions(name, attention):
    (kept, peak), (real_kept, real_peak) = compared(name, "full", False, True, attention, False, packed=False)
    assert kept == pytest.approx(real_kept, rel=0.01)
    assert peak == pytest.approx(real_peak, rel=0.025)
