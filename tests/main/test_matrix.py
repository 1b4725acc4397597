"""Every strategy under every engine that a CPU can run, in float32; one engine of each through the console script."""

import json
import math
from collections import defaultdict

import pytest
import torch
from matrix import ENGINES, STEPS, STRATEGIES
from safetensors import safe_open

TOLERANCE = 1e-4  # of a loss, relative
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def cells(*engines):
    return pytest.mark.parametrize(
        ("strategy", "engine"), [(strategy, engine) for strategy in STRATEGIES for engine in engines]
    )


def tensors(directory, name="model.safetensors"):
    """Every tensor of a safetensors file, by name."""
    with safe_open(directory / name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def selected_by_hand(snr, percent):
    """The reference's rule: of each type the best floor(count · percent / 100), and always embeddings and head."""
    types = defaultdict(list)
    for module, entry in snr.items():
        types[entry["type"]].append((entry["snr"], module))
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    for modules in types.values():
        best = sorted(modules, key=lambda entry: -entry[0])[: len(modules) * percent // 100]
        names |= {f"{module}.weight" for _, module in best}
    return names


@cells(*ENGINES)
def test_the_loss_falls(cell, strategy, engine, record_property):
    made = cell(strategy, engine)
    losses = made.losses
    numbers = f"{losses[0]:8.4f} → {losses[-1]:.4f}  {made.held_out[-1]:8.4f}  {made.seconds:6.1f} s"
    record_property("cell", f"{strategy:<9} {engine:<14} {numbers}")
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]
    assert made.held_out[-1] < 0.9 * losses[0]


@cells(*ENGINES)
def test_metrics_have_the_keys_that_others_read(cell, strategy, engine):
    rows = cell(strategy, engine).steps
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert set(row) >= {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
        assert all(isinstance(row[key], (int, float)) for key in row)
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(set(tokens)) and tokens[0] > 0


@cells(*ENGINES)
def test_exactly_the_intended_weights_changed(cell, model, strategy, engine):
    intended_weights_changed(cell(strategy, engine), strategy, model)


def intended_weights_changed(made, strategy, model):
    final, base = made.run_dir / "final", tensors(model)
    assert made.base_untouched
    if strategy in ("lora", "qlora"):
        assert not (final / "model.safetensors").exists()
        adapter = tensors(final, "adapter_model.safetensors")
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in adapter}
        assert modules == set(ADAPTED)
        assert len(adapter) == 2 * len(ADAPTED) * layers
        assert all(tensor.any() for tensor in adapter.values())  # B starts at zero, so all were trained
        trained = sum(tensor.numel() for tensor in adapter.values())
    else:
        tuned = tensors(final)
        assert tuned.keys() == base.keys()
        changed = {name for name in base if not same_bits(base[name], tuned[name])}
        expected = set(base)
        if strategy == "spectrum":
            expected = selected_by_hand(json.loads((made.run_dir / "snr.json").read_text()), 50)
            assert len(expected) < 0.7 * len(base)
        assert changed == expected
        trained = sum(base[name].numel() for name in expected)
    assert made.plan["trainable_parameters"] == trained


@cells(*ENGINES)
def test_what_was_saved_loads_and_answers(cell, model, strategy, engine):
    loads_and_answers(cell(strategy, engine), strategy, model)


def loads_and_answers(made, strategy, model):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = made.run_dir / "final"
    ids = AutoTokenizer.from_pretrained(final)("apple bell bird", return_tensors="pt").input_ids
    base, notes = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    with torch.no_grad():
        before = base(ids).logits
        if strategy in ("lora", "qlora"):
            tuned = peft.PeftModel.from_pretrained(base, final)
        else:
            tuned, notes = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
        after = tuned(ids).logits
    assert not any(notes.values()), notes  # nothing missing, left over or of another shape
    for file in final.glob("*.safetensors"):
        assert all(tensor.numel() and tensor.isfinite().all() for tensor in tensors(final, file.name).values())
    assert after.isfinite().all()
    assert not torch.allclose(after.float(), before.float(), atol=0.1)


@cells("single", "zero1", "zero2", "zero3", "zero3_offload")
def test_every_engine_follows_the_same_curve(cell, strategy, engine):
    """One process with the whole batch, and every way to share the work, are one computation."""
    of_ddp, of_engine = cell(strategy, "ddp"), cell(strategy, engine)
    assert of_engine.losses == pytest.approx(of_ddp.losses, rel=TOLERANCE)
    assert of_engine.held_out == pytest.approx(of_ddp.held_out, rel=TOLERANCE)
    assert [row["tokens"] for row in of_engine.steps] == [row["tokens"] for row in of_ddp.steps]


@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_accumulation_is_a_larger_batch(cell, engine):
    """Micro-batch 4 × accumulation 1 = micro-batch 1 × accumulation 4 (2 × 1 and 1 × 2 in two processes)."""
    whole = cell("full", engine)
    accumulated = cell("full", engine, accumulation=4 if engine == "single" else 2)
    assert accumulated.losses == pytest.approx(whole.losses, rel=TOLERANCE)
    gradients = [[row["grad_norm"] for row in made.steps] for made in (whole, accumulated)]
    assert gradients[0] == pytest.approx(gradients[1], rel=10 * TOLERANCE)


@pytest.mark.parametrize(("strategy", "engine"), [("full", "ddp"), ("spectrum", "zero3"), ("qlora", "zero3")])
def test_in_bfloat16(cell, model, strategy, engine):
    """The precision of real work: other weights are held in other types, and frozen ones still come out untouched."""
    made, exact = cell(strategy, engine, bf16=True), cell(strategy, engine)
    assert made.losses[0] == pytest.approx(exact.losses[0], rel=0.01)
    assert made.losses[-1] < 0.9 * made.losses[0]
    intended_weights_changed(made, strategy, model)
    loads_and_answers(made, strategy, model)
