"""The losses of pairs and their gradients: ours beside TRL's own code and beside the papers' formulas."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from ftdist import align, compose, job, loss
from ftdist.align.losses import LOSSES, Objective, Pairs
from ftdist.align.pairs import collate_pairs
from ftdist.align.reference import Reference
from ftdist.align.trainer import SUMS, PreferenceTrainer, Tally, without_dropout
from ftdist.data.rows import IGNORED, PairRows
from ftdist.errors import UserError

ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
    {"prompt_ids": [11], "chosen_ids": [12, 13, 14, 15], "rejected_ids": [16, 17]},
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
]
REFERENCE = torch.tensor([[-3.0, -2.5], [-9.0, -4.0], [-1.5, -8.0]])
FILLER = {"input_ids": [5, 6], "labels": [IGNORED, IGNORED], "lengths": [2], "filler": True}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.3, **sizes))


def batch_of(rows=ROWS, reference=REFERENCE, fillers=0):
    pairs = PairRows(rows)
    pairs.reference = reference.numpy()
    return collate_pairs([*(pairs[i] for i in range(len(rows))), *([FILLER] * fillers)], 0)


def trainer_of(model, objective):
    """A trainer without its engine: what it makes of a batch is asked alone."""
    made = PreferenceTrainer.__new__(PreferenceTrainer)
    made.head, made.objective, made.takes_positions, made.reference = (
        loss.Head(model, 0.0, "nll"),
        objective,
        True,
        None,
    )
    made.examined, made.step_sums, made.step_losses = True, 0, []
    made.accelerator = SimpleNamespace(num_processes=1)
    return made


def ours(model, objective, batch):
    counts = torch.tensor([len(ROWS), int((batch["targets"][: len(batch["targets"]) // 2] != IGNORED).sum())])
    return trainer_of(model, objective).compute_loss(model, batch, num_items_in_batch=counts)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def of_trl(model, names, weights, beta, smoothing):
    """TRL's `_compute_loss` itself, on a model that answers as its fused head does."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    columns = [
        {**row, "ref_chosen_logps": float(known[0]), "ref_rejected_logps": float(known[1])}
        for row, known in zip(ROWS, REFERENCE, strict=True)
    ]
    inputs = DataCollatorForPreference(pad_token_id=0)(columns)

    def answering(input_ids, attention_mask, labels, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        each = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(each)
        return SimpleNamespace(
            log_probs=torch.where(wanted, each, 0.0), entropy=nothing, mean_logits=nothing, is_top1=wanted
        )

    gather = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=names, loss_weights=weights, beta=beta,
        label_smoothing=smoothing, args=SimpleNamespace(discopop_tau=0.05), use_weighting=False, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    return DPOTrainer._compute_loss(stub, answering, inputs, False), stub._metrics["train"]


CASES = [([name], None, 0.1 if name in ("robust", "exo_pair") else 0.0) for name in LOSSES if name != "odds"]
CASES += [(["sft"], None, 0.0), (["sigmoid", "sft", "ipo"], [0.8, 0.3, 0.01], 0.0), (["robust", "hinge"], [1, 2], 0.2),
          (["aot"], None, 0.1), (["aot_unpaired"], None, 0.1)]  # fmt: skip


@pytest.mark.parametrize(("names", "weights", "smoothing"), CASES, ids=lambda value: str(value))
def test_loss_and_gradients_are_trls(tiny, names, weights, smoothing):
    expected, recorded = of_trl(tiny, names, weights or [1.0] * len(names), 0.3, smoothing)
    wanted = gradients(tiny, expected)
    task = {"loss_type": names, "loss_weights": weights}
    objective = Objective(align.weighted_losses(task), 0.3, smoothing)
    batch = batch_of(fillers=2)
    found = ours(tiny, objective, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(gradients(tiny, found), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    trainer = trainer_of(tiny, objective)
    means = trainer._means(trainer._summed(trainer._pairs(tiny, batch)))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert means[name] == pytest.approx(recorded[name][0], rel=1e-4), name
    assert means["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_mean_over_pairs_does_not_depend_on_micro_batches(tiny):
    """The shares of two micro-batches add up to one: pairs weigh the same, and for `sft` tokens do."""
    objective = Objective([("sigmoid", 1.0), ("sft", 0.5)], 0.1)
    whole = ours(tiny, objective, batch_of())
    wanted = gradients(tiny, whole)
    counts = torch.tensor([3, 7])
    trainer = trainer_of(tiny, objective)
    parts = [batch_of(ROWS[:1], REFERENCE[:1]), batch_of(ROWS[1:], REFERENCE[1:], fillers=1)]
    total = sum(trainer.compute_loss(tiny, part, num_items_in_batch=counts) for part in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, other in zip(gradients(tiny, total), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def values():
    of = torch.tensor
    return Pairs(of([-2.0, -7.0]), of([-3.0, -5.0]), of([-2.5, -6.0]), of([-2.0, -6.0]), of([2, 4]), of([3, 2]))


def test_the_formulas_of_the_papers():
    p = values()
    difference = torch.tensor([0.5 - -1.0, -1.0 - 1.0])
    mean = torch.tensor([0.5 / 2 + 1 / 3, -1 / 4 - 1 / 2])

    def check(name, expected, **keys):
        torch.testing.assert_close(Objective([(name, 1.0)], 0.4, **keys).of_pairs(p), expected)

    check("sigmoid", -logsigmoid(0.4 * difference))
    check("sigmoid", -0.9 * logsigmoid(0.4 * difference) - 0.1 * logsigmoid(-0.4 * difference), smoothing=0.1)
    check("sigmoid_norm", -logsigmoid(0.4 * mean - 0.3), margin=0.3)
    check("ipo", (mean - 1 / 0.8) ** 2)
    chances = [(math.exp(c / n), math.exp(r / m)) for c, n, r, m in ((-2, 2, -3, 3), (-7, 4, -5, 2))]
    odds = torch.tensor([math.log(c / (1 - c)) - math.log(r / (1 - r)) for c, r in chances])
    check("odds", -0.4 * logsigmoid(odds))


@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_in_chunks_are_those_of_the_full_logits(monkeypatch, bias):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)  # 16 tokens at a time
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 30, bias=bias)
    hidden, targets = torch.randn(40, 8, requires_grad=True), torch.randint(30, (40,))
    upstream = torch.randn(40)
    arguments = [hidden, head.weight, *([head.bias] if bias else [])]
    each = loss.TokenLogProbabilities.apply(hidden, head.weight, head.bias, targets)
    plain = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(each, plain)
    for one, other in zip(*(torch.autograd.grad((v * upstream).sum(), arguments) for v in (each, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_padding_and_fillers_change_no_log_probability(tiny):
    alone = [trainer_of(tiny, None).log_probabilities(tiny, batch_of(ROWS[i : i + 1])).tolist() for i in range(3)]
    together = trainer_of(tiny, None).log_probabilities(tiny, batch_of(fillers=1))
    chosen, rejected = together.reshape(2, -1)
    assert chosen.tolist() == pytest.approx([*(c for c, _ in alone), 0.0], abs=1e-5)
    assert rejected.tolist() == pytest.approx([*(r for _, r in alone), 0.0], abs=1e-5)


TASK = {"loss_type": "sigmoid", "loss_weights": None, "label_smoothing": 0.0, "margin": 0.0, "reference": "auto",
        "reference_model": None, "disable_dropout": True}  # fmt: skip
TRAIN = {"packing": False, "loss_type": "nll", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
         "eval_strategy": "epoch"}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "train", "said"),
    [
        ({"loss_weights": [1.0, 2.0]}, {}, "task.loss_weights"),
        ({"loss_type": ["ipo", "hinge"], "label_smoothing": 0.1}, {}, "task.label_smoothing=0.1: read by sigmoid"),
        ({"loss_type": "exo_pair"}, {}, "1e-3"),
        ({"loss_type": "ipo", "margin": 1.0}, {}, "task.margin=1.0: read by"),
        ({"loss_type": "ipo", "reference": "none"}, {}, "ipo compares with a reference"),
        ({"reference": "adapter_off", "reference_model": "x"}, {}, "task.reference_model=x"),
        ({}, {}, "task.disable_dropout=false"),
        ({"loss_type": ["sft", "aot"]}, {"per_device_train_batch_size": 1}, "sorts the pairs of a micro-batch; use 2"),
        ({"loss_type": "aot"}, {"per_device_eval_batch_size": 1}, "train.per_device_eval_batch_size=1"),
        ({}, {"packing": True}, "use train.packing=false"),
        ({}, {"loss_type": "dft"}, "use task.loss_type"),
        ({}, {"label_smoothing_factor": 0.1}, "use task.label_smoothing"),
    ],
)
def test_keys_that_do_not_fit_one_another(task, train, said):
    align.check(TASK, TRAIN, {"dropout": None})
    with pytest.raises(UserError, match=said):
        align.check(TASK | task, TRAIN | train, {"dropout": 0.1 if "dropout" in said else None})


@pytest.mark.parametrize("name", ["orpo", "kto", ["sigmoid", "simpo"]])
def test_losses_of_other_trainers_are_named_with_what_there_is(name):
    with pytest.raises(UserError, match=r"task\.loss_type=\w+: .*use task|on pairs use apo_zero"):
        align.refuse_by_name({"loss_type": name})
    align.refuse_by_name({"loss_type": list(LOSSES)})


def test_how_the_reference_is_had():
    kind = align.reference_kind
    assert kind(TASK, True, False) == "adapter_off"
    assert kind(TASK, False, False) == kind(TASK, True, True) == "cached"
    assert kind(TASK | {"reference_model": "x"}, True, False) == "cached"
    with pytest.raises(UserError, match="no adapter"):
        kind(TASK | {"reference": "adapter_off"}, False, False)
    with pytest.raises(UserError, match="goes on from an earlier run"):
        kind(TASK | {"reference": "adapter_off"}, True, True)


def test_a_batch_of_fillers_alone_asks_for_no_columns(tiny, tmp_path):
    """The last, short step of an epoch has them; cached log-probabilities come with rows, and here is none."""
    batch = collate_pairs([FILLER, FILLER], 0)
    assert "reference" not in batch
    made = trainer_of(tiny, Objective([("sigmoid", 1.0)], 0.1, 0.0))
    made.reference = Reference("cached", "", tmp_path, 1, None, is_start=True)
    assert len(made._pairs(tiny, batch).chosen) == 0
    total = made.compute_loss(tiny, batch, num_items_in_batch=torch.tensor([4, 9]))
    total.backward()
    assert float(total) == 0


@pytest.mark.parametrize("name", ["OPT", "Bloom", "GPT2"])
def test_dropout_is_off_however_an_architecture_calls_it(name):
    import transformers

    sizes = {
        "OPT": {"ffn_dim": 16, "word_embed_proj_dim": 8, "activation_dropout": 0.3},
        "Bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
        "GPT2": {},
    }[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_collapse_is_said_once_also_over_a_stop(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ftdist.align.trainer.record", lambda *a, **k: None)
    lost = dict.fromkeys(SUMS, 0.0) | {"chosen_ratio": -30.0, "chosen_tokens": 10.0}
    kept = lost | {"chosen_ratio": -1.0}

    def started(state=None):
        made = trainer_of(tiny, None)
        made.tally, made.chosen_drop, made.state = Tally(SUMS), 1.0, SimpleNamespace(global_step=1)
        made.keeper = SimpleNamespace(main=True, run_dir=tmp_path, token=1)
        vars(made.tally).update(json.loads(json.dumps(state or {})))  # as the keeper does
        return made

    first = started()
    first._watch_chosen(lost)
    assert capsys.readouterr().out.count("chosen answers have lost 3 nats") == 1
    resumed = started(first.tally.state()["attributes"])
    resumed._watch_chosen(lost)
    assert not capsys.readouterr().out
    resumed._watch_chosen(kept)
    resumed._watch_chosen(lost)
    assert "chosen answers have lost" in capsys.readouterr().out


def test_certain_answers_have_finite_odds():
    chosen = torch.tensor([-1e-9], requires_grad=True)
    one = torch.ones(1)
    pairs = Pairs(chosen, -5 * one, 0 * one, 0 * one, one, one)
    Objective([("odds", 1.0)], 0.1, 0.0).of_pairs(pairs).sum().backward()
    assert torch.isfinite(chosen.grad).all()


def test_orpo_and_simpo_are_choices_of_task(tiny):
    """`task=orpo` is the loss of TRL's ORPOTrainer over the answers' tokens, `task=simpo` has a margin."""
    from trl.experimental.orpo import ORPOTrainer

    batch = batch_of(reference=torch.zeros(3, 2))
    for choice in ("orpo", "simpo"):
        (config,) = compose.compose("plan", [f"task={choice}", "model.path=x", "data.path=y"])
        job.check(config)
        task = config["task"]
        objective = Objective(align.weighted_losses(task), task["beta"], task["label_smoothing"], task["margin"])
        found = ours(tiny, objective, batch)
        p = trainer_of(tiny, objective)._pairs(tiny, batch)
        chosen, rejected = p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens
        assert task["reference"] == "none"
        if choice == "orpo":
            stub = SimpleNamespace(beta=task["beta"], accelerator=SimpleNamespace(device="cpu"))
            of_odds = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0].mean()
            expected = -p.chosen.sum() / p.chosen_tokens.sum() - of_odds
        else:
            expected = -logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()
        torch.testing.assert_close(found, expected)
