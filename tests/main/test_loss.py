"""The loss and the trainer, in this process: values and gradients against torch's own, token by token."""

import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PhiConfig,
    TrainingArguments,
)
from transformers.models.auto import AutoModelForCausalLM

from ftdist import lease, loss, models, stops
from ftdist.errors import UserError
from ftdist.health import Health
from ftdist.keeper import Keeper
from ftdist.ranks import Ranks
from ftdist.schema import keys_of
from ftdist.strategies import Base, qlora
from ftdist.trainer import TokenTrainer, collate

VOCABULARY, HIDDEN = 37, 24
CONF = Path(__file__).parents[2] / "conf"


def problem(tokens, bias, dtype=torch.float32, seed=0):
    """Hidden states, weight, bias that all want gradients, and targets; twice the same."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, HIDDEN), (VOCABULARY, HIDDEN), *([(VOCABULARY,)] if bias else [])]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)

    def fresh():
        made = [value.clone().requires_grad_() for value in values]
        return (*made, *([] if bias else [None]), targets)

    return fresh(), fresh()


def reference(hidden, weight, bias, targets, smoothing, kind):
    """What torch says, with the full logits."""
    logits = functional.linear(hidden, weight, bias).float()
    losses = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if kind == "dft":
        losses = losses * logits.softmax(-1).gather(1, targets[:, None])[:, 0].detach()
    return losses.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [1, 16, 50])  # one chunk, exactly one, three and a rest
def test_fused_values_and_gradients(monkeypatch, tokens, bias, kind, smoothing):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * 4 * VOCABULARY)
    ours, theirs = problem(tokens, bias)
    got = loss.FusedLinearCrossEntropy.apply(*ours, smoothing, kind)
    wanted = reference(*theirs, smoothing, kind)
    torch.testing.assert_close(got, wanted)
    (got * 0.3).backward()
    (wanted * 0.3).backward()
    for mine, other in zip(ours[: 2 + bias], theirs[: 2 + bias], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_fused_without_a_gradient_for_the_weight():
    """A frozen head, as under LoRA."""
    ours, theirs = problem(20, False)
    ours[1].requires_grad_(False)
    loss.FusedLinearCrossEntropy.apply(*ours, 0.0, "nll").backward()
    reference(*theirs, 0.0, "nll").backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    assert ours[1].grad is None


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_fused_under_autocast(kind):
    """Float32 parameters, bfloat16 products: as near to float32 as torch's own bfloat16 path is."""
    ours, theirs = problem(200, True)
    exact = problem(200, True)[0]
    for values, function in ((ours, loss.FusedLinearCrossEntropy.apply), (theirs, reference)):
        with torch.autocast("cpu", torch.bfloat16):
            total = function(*values, 0.0, kind)
        assert total.dtype == torch.float32
        total.backward()
    truth = reference(*exact, 0.0, kind)
    truth.backward()
    for mine, other, true in zip(ours[:3], theirs[:3], exact[:3], strict=True):
        assert mine.grad.dtype == torch.float32
        error, their_error = (mine.grad - true.grad).norm(), (other.grad - true.grad).norm()
        assert error <= 1.5 * their_error + 1e-3 * true.grad.norm()


def test_full_loss_is_the_same_sum():
    (hidden, weight, bias, targets), _ = problem(20, True)
    targets = torch.cat([torch.full((4,), loss.IGNORED), targets[4:]]).view(2, 10)
    logits = functional.linear(hidden, weight, bias).view(2, 10, -1)
    for kind, smoothing in itertools.product(("nll", "dft"), (0.0, 0.1)):
        wanted = reference(hidden[4:], weight, bias, targets.flatten()[4:], smoothing, kind)
        torch.testing.assert_close(loss.full_loss(logits, targets, smoothing, kind), wanted)


# --- the trainer --------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


DEFAULTS = {group: yaml.safe_load((CONF / group / "default.yaml").read_text()) for group in ("checkpoint", "health")}


def rows(lengths, seed=0):
    """Unpacked rows; of each the first third is not trained on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        masked = max(length // 3, 1)
        made.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "lengths": [length]})
    return made


def trainer(model, directory, data, *, packing=False, loss_type="nll", replay=False, **arguments):
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        **arguments,
    }
    directory = Path(tempfile.mkdtemp(dir=directory))  # a trainer of its own has a run of its own
    token = lease.take(directory).token
    return TokenTrainer(
        model=model,
        args=TrainingArguments(**settings),
        packing=packing,
        loss_type=loss_type,
        replay=replay,
        trainable=models.trainable_elements(model),
        train_dataset=data,
        eval_dataset=data,
        data_collator=lambda batch: collate(batch, 0),
        keeper=Keeper(directory, Ranks(), token, {}, 0, stops.Limit(None), lambda step: None, **DEFAULTS["checkpoint"]),
        health=Health(directory, token, True, **{key: DEFAULTS["health"][key] for key in keys_of(Health.__init__)}),
    )


def token_losses(model, data):
    """Every supervised token's loss, row by row, from the model's own logits."""
    losses = []
    for row in data:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        losses.append(functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none"))
    return torch.cat(losses)[torch.cat([torch.tensor(row["labels"][1:]) for row in data]) != -100]


def new(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_every_token_weighs_the_same(tmp_path, micro, accumulation):
    """One step of plain gradient descent over rows of very different length, against the formula."""
    data = rows([4, 30, 9, 17])
    model, twin = new(LlamaConfig(**SMALL)), new(LlamaConfig(**SMALL))
    made = trainer(model, tmp_path, data, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    made.train()
    mean = token_losses(twin, data).mean()
    mean.backward()
    mean = mean.detach()
    assert made.state.log_history[0]["loss"] == pytest.approx(float(mean), rel=1e-6)
    assert made.state.log_history[0]["tokens"] == 60
    for (name, tuned), start in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(tuned, start - start.grad, rtol=1e-4, atol=1e-6, msg=name)


ARCHITECTURES = {
    "llama": (LlamaConfig(**SMALL), True),
    "tied": (LlamaConfig(**SMALL, tie_word_embeddings=True), True),
    "bias": (PhiConfig(**SMALL), True),
    "capped": (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0), True),
    "scaled-up": (CohereConfig(**SMALL, logit_scale=4.0), True),
    "scaled-down": (GraniteConfig(**SMALL, logits_scaling=8.0), True),
    "otherwise": (LlamaConfig(**SMALL), False),
}


@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_the_architectures_own(tmp_path, name, kind):
    """Logits that are scaled or capped after the head, too; where something else is done, the full ones are used."""
    config, fused = ARCHITECTURES[name]
    data, model = rows([12, 25]), new(config)
    if name == "otherwise":
        model.register_forward_hook(lambda _model, _inputs, output: setattr(output, "logits", output.logits**3))
    with torch.no_grad():
        if name == "bias":
            model.lm_head.bias.normal_()
        losses = token_losses(model, data)
    wanted = (losses * (-losses).exp() if kind == "dft" else losses).mean()
    made = trainer(model, tmp_path, data, loss_type=kind, gradient_accumulation_steps=2, learning_rate=1e-9)
    made.train()
    assert made.head.usable == fused
    assert made.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["tied", "capped", "scaled-up", "scaled-down"])
def test_gradients_through_what_follows_the_head(tmp_path, monkeypatch, name):
    """Of the loss and of every token's log-probability, in chunks and without the full logits, against torch's own."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)  # 16 tokens at a time
    data, model = rows([12, 25, 31]), new(ARCHITECTURES[name][0])
    made = trainer(model, tmp_path, data)
    batch = collate(data, 0)
    made._examine(model, batch)
    sizes = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
    losses = token_losses(model, data)
    sizes.clear()
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(3))

    def each():
        with made.head.answering(batch["targets"], each=True):
            return made.head.answer(made._forward(model, batch["input_ids"], batch["position_ids"]))

    parameters = list(model.parameters())
    for found, wanted in (
        (made._summed_loss(model, batch), losses.sum()),
        ((each() * weights).sum(), -(losses * weights).sum()),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(wanted, parameters, retain_graph=True)
        for mine, other in zip(torch.autograd.grad(found, parameters), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert sizes == [1, len(losses)], "what the head gave, and no logits"


@pytest.mark.parametrize("arguments", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.2}], ids=str)
def test_held_out_loss_is_the_plain_one(tmp_path, arguments):
    """Whatever is trained on, perplexity is the exponential of the mean negative log-likelihood."""
    data, model = rows([5, 30, 12, 8, 20]), new(LlamaConfig(**SMALL))
    metrics = trainer(model, tmp_path, data, per_device_eval_batch_size=2, **arguments).evaluate()
    with torch.no_grad():
        mean = token_losses(model, data).mean()
    assert metrics["eval_loss"] == pytest.approx(float(mean), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(float(mean.exp()), rel=1e-5)


# --- packing ------------------------------------------------------------------------------------------------------


def packed(parts):
    return {"input_ids": sum((p["input_ids"] for p in parts), []), "labels": sum((p["labels"] for p in parts), []),
            "lengths": [len(p["input_ids"]) for p in parts]}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_the_rows(tmp_path, attention):
    parts = rows([10, 23, 7, 15])
    model = new(LlamaConfig(**SMALL))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        wanted = token_losses(model, parts).mean()
    data = [packed(parts[:2]), packed(parts[2:])]
    made = trainer(model, tmp_path, data, packing=True, per_device_train_batch_size=2, learning_rate=1e-9)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


class Deaf(LlamaForCausalLM):
    """Takes positions and does not listen."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("kind", ["positions ignored", "no positions"])
def test_a_model_that_mixes_packed_rows_is_refused(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "positions ignored":
        model = Deaf(LlamaConfig(**SMALL))
    else:
        model = new(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0))
    data = [packed(rows([20, 25]))]
    with pytest.raises(UserError, match=r"train\.packing=true: packed sequences see one another"):
        trainer(model, tmp_path, data, packing=True).train()
    trainer(model, tmp_path, data, packing=False).train()


# --- 4-bit weights on a CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_adapters_learn_after_an_evaluation(model, dtype):
    """On CPUs with bfloat16 instructions bitsandbytes repacks 4-bit weights when it evaluates, and the layout that
    it leaves behind has no gradient."""
    shapes = {"lm_head.weight": (1, 1)}
    recipe = qlora.recipe(
        Base(shapes, dtype, "uint8", measured=True), r=4, alpha=8, dropout=0.0, targets="all-linear",
        top_percent=None, scan=None, use_rslora=False, use_dora=False, double_quantization=True,
    )  # fmt: skip
    torch.manual_seed(0)
    loaded = models.load(path=str(model), revision=None, dtype="auto", attn_implementation="sdpa",
                         trust_remote_code=False, quantization=recipe.quantization, loaded_dtype=dtype)  # fmt: skip
    tuned = models.apply(loaded, recipe, trained_dtype="float32")
    ids = torch.randint(0, json.loads((model / "config.json").read_text())["vocab_size"], (2, 16))

    def gradients():
        tuned.train()
        tuned.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            tuned(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad}

    before = gradients()
    tuned.eval()
    with torch.no_grad():
        tuned(ids)
        tuned(ids[:1, :1])  # the path of generation
    after = gradients()
    assert all(before[name].any() for name in before if "lora_B" in name)
    assert all(torch.equal(before[name], after[name]) for name in before)
