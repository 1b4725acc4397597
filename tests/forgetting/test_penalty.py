"""The Fisher and the penalty's gradient as numbers, without an engine."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ftdist import ewc, fisher
from ftdist.ranks import Ranks
from ftdist.state import State

STRENGTH = 3.0


def small_llama():
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def samples(count=6):
    numbers = torch.Generator().manual_seed(2)
    return [torch.randint(31, (1, 5 + i), generator=numbers) for i in range(count)]


def summed(model, ids):
    """The negative log-likelihood of a sequence, over its tokens."""
    logits = model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")


def one_by_one(model, rows, parameters):
    """Σ of squared gradients of plain backward passes, and the number of tokens."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for ids in rows:
        model.zero_grad()
        summed(model, ids).backward()
        for name, p in parameters.items():
            total[name] += p.grad.square()
    return total, sum(ids.shape[1] - 1 for ids in rows)


def tally(sizes, batched=False, scale=1.0):
    """A tally for tensors of these sizes, a buffer each."""
    buffers = [torch.zeros(size) for size in sizes.values()]
    places = {name: [fisher.Place(i, 0, size, 0)] for i, (name, size) in enumerate(sizes.items())}
    return fisher.Tally(buffers, places, together=False, batched=batched, scale=scale)


def prepared(optimizer):
    """As accelerate has it."""
    return SimpleNamespace(optimizer=optimizer)


def test_per_sample_fisher_is_that_of_single_backward_passes():
    model, rows = small_llama(), samples()
    named = dict(model.named_parameters())
    expected, tokens = one_by_one(model, rows, named)
    model.zero_grad()
    found = tally({name: p.numel() for name, p in named.items()})
    backward = fisher.gradients_of_weights(model, found)
    for ids in rows:
        backward(lambda ids=ids: summed(model, ids))
    found.finish(1, len(rows), 1, tokens)
    for values, total in zip(found.squares, expected.values(), strict=True):
        torch.testing.assert_close(values, total.flatten() / tokens)
        assert values.max() > 0
    assert all(p.grad is None for p in named.values())


def test_small_gradients_are_not_lost_in_float16():
    """Gradients around its smallest number, 6e-8, of weights and, through outputs, of frozen ones."""
    rows = samples()
    for adapters in (False, True):
        found = []
        for dtype, scale in ((torch.float32, 1.0), (torch.float16, fisher.FLOAT16), (torch.float16, 1.0)):
            model = small_llama().to(dtype)
            named = {name: p for name, p in model.named_parameters() if "o_proj" in name}
            made = tally({name: p.numel() for name, p in named.items()}, scale=scale)
            if adapters:
                paths = {name: model.get_submodule(name.removesuffix(".weight")) for name in named}
                model.requires_grad_(False)
                backward = fisher.gradients_of_modules(paths, made)
            else:
                backward = fisher.gradients_of_weights(model, made)
            for ids in rows:
                backward(lambda ids=ids, model=model: 3e-7 * summed(model, ids).float())
            made.finish(1, len(rows), 1, 1)
            found.append(torch.cat(made.squares).sqrt())
        exact, scaled, lost = found
        assert (scaled - exact).abs().mean() < 0.05 * exact.mean()
        assert (lost - exact).abs().mean() > 0.1 * exact.mean()


def test_fisher_of_frozen_base_weights_below_adapters():
    """Of the first layer too, below which nothing is trained."""
    model, rows = small_llama(), samples()
    wanted = {name: p for name, p in model.named_parameters() if "_proj" in name}
    expected, tokens = one_by_one(model, rows, wanted)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    modules = {
        f"{path.removeprefix('base_model.model.')}.weight": module.base_layer
        for path, module in adapted.named_modules()
        if hasattr(module, "base_layer")
    }
    found = tally({name: expected[name].numel() for name in modules})
    backward = fisher.gradients_of_modules(modules, found)
    for ids in rows:
        backward(lambda ids=ids: summed(adapted, ids))
    found.finish(1, len(rows), 1, tokens)
    assert len(modules) == 14
    for name, values in zip(modules, found.squares, strict=True):
        torch.testing.assert_close(values, expected[name].flatten() / tokens, rtol=1e-4, atol=1e-8)


def partitions(items, size):
    """Every way to part `items` into sets of `size`."""
    if not items:
        yield []
        return
    for rest in itertools.combinations(items[1:], size - 1):
        left = [item for item in items[1:] if item not in rest]
        for others in partitions(left, size):
            yield [(items[0], *rest), *others]


@pytest.mark.parametrize("size", [2, 3])
def test_the_batched_estimate_is_right_in_expectation(size):
    """Over all partitions into batches, with a mean gradient that is far from zero."""
    torch.manual_seed(3)
    gradients = torch.randn(6, 8, dtype=torch.float32) + 0.7
    estimates, raw = [], []
    for batches in partitions(tuple(range(6)), size):
        found = tally({"w": 8}, batched=True)
        for batch in batches:
            found.add("w", gradients[list(batch)].sum(0))
        raw.append(found.squares[0] / 6)
        unclamped = found.squares[0] - (size - 1) / (6 - size) * (found.sums[0].square() - found.squares[0])
        estimates.append(unclamped / 6)
        found.finish(1, 6, size, 6)
        torch.testing.assert_close(found.squares[0], estimates[-1].clamp(min=0))
    exact = gradients.square().mean(0)
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(raw).mean(0), exact, rtol=0.2)  # uncorrected, even times the batch size


def consolidation(form, tmp_path):
    """The penalty of a run with this form, as `begin` leaves it."""
    keys = {"samples": 1, "batch": 1, "fisher": None, "earlier": None, "decay": 1.0}
    made = ewc.Consolidation(
        tmp_path, lambda: None, lambda: None, {}, strength=STRENGTH, adapters="plain", dtype="float32", **keys
    )
    made.form, made.ranks = form, Ranks()
    return made


@pytest.mark.parametrize("clip", [0.1, 100.0])
def test_the_penalty_on_a_quadratic(tmp_path, clip):
    """Loss ½a(θ−t)²: a step of plain descent goes by −η(c·a(θ−t) + λF(θ−θ*)); c clips the loss alone."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    start, target = torch.randn(3), torch.randn(3)
    stiffness, importance = torch.rand(3) + 0.5, torch.rand(3) + 0.5
    model.weight.data = start[None].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    form = ewc.Weights(model, State(model, prepared(optimizer), 0, 1))
    form.fisher = [importance.clone()]
    penalised, number = consolidation(form, tmp_path), itertools.count(1)
    penalised.join(optimizer, lambda: next(number))
    expected, clipped = start.clone(), []
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * stiffness * (model.weight[0] - target).square()).sum().backward()
        clipped.append(bool(nn.utils.clip_grad_norm_(model.parameters(), clip) > clip))
        optimizer.step()
        gradient = stiffness * (expected - target)
        gradient *= min(1.0, clip / float(gradient.norm()))
        penalty = float(STRENGTH / 2 * (importance * (expected - start).square()).sum())
        assert penalised.penalty() == pytest.approx(penalty, rel=1e-4)
        expected = expected - 0.1 * (gradient + STRENGTH * importance * (expected - start))
        torch.testing.assert_close(model.weight.detach()[0], expected)
    assert clipped == [clip < 1] * 3 and not torch.equal(expected, start)


def test_the_penalty_on_a_model_is_autograds(monkeypatch):
    monkeypatch.setattr(ewc, "CHUNK", 100)  # tensors of the test are worked on in several pieces
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    form = ewc.Weights(model, State(model, prepared(optimizer), 0, 1))
    form.fisher = [torch.rand(p.numel()) for p in model.parameters()]
    anchors = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.grad = torch.ones_like(p)
    penalty = sum(
        STRENGTH / 2 * (f.view_as(p) * (p - anchor).square()).sum()
        for p, f, anchor in zip(model.parameters(), form.fisher, anchors, strict=True)
    )
    expected = torch.autograd.grad(penalty, list(model.parameters()))
    found = sum(form.pull(p, STRENGTH, 2.0) for p in model.parameters())
    assert found == pytest.approx(float(penalty), rel=1e-5)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad - 1, 2.0 * gradient, rtol=1e-4, atol=1e-5)


def test_the_penalty_of_a_drift_is_autograds():
    """λ/2·ΣF(s·(B·A − B₀·A₀))² through autograd, against dB = s·(λF∘ΔW)Aᵀ and dA = s·Bᵀ(λF∘ΔW)."""
    adapted = get_peft_model(small_llama(), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for p in trained:
        p.data = torch.randn_like(p)
        p.grad = torch.zeros_like(p)
    held = State(adapted, prepared(torch.optim.AdamW(trained)), 0, 1)
    form = ewc.Drift(adapted, held, Ranks(), torch.device("cpu"))
    form.fisher = [torch.rand_like(values) for values in form.fisher]
    layers = [module for module in adapted.modules() if hasattr(module, "base_layer")]
    merged = [3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
    before = [weight.detach() for weight in merged]
    assert float(form.begin(STRENGTH)) == 0
    with torch.no_grad():
        for p in trained:
            p += torch.randn_like(p)
    merged = [3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
    drifts = [after - start for after, start in zip(merged, before, strict=True)]
    penalty = sum(STRENGTH / 2 * (f.view_as(d) * d.square()).sum() for f, d in zip(form.fisher, drifts, strict=True))
    expected = torch.autograd.grad(penalty, trained)
    assert form.begin(STRENGTH) == pytest.approx(float(penalty), rel=1e-4)
    for p in trained:
        form.pull(p, STRENGTH, 1.0)
    for p, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)
