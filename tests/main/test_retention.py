"""What is learnt beside what is kept: one run through the command line, and the parts of it that need no run."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_loss import CONF, SMALL, new, rows, token_losses, trainer
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ftdist import compose, evaluate, forecast, job, models, resume, start
from ftdist.align.trainer import without_dropout
from ftdist.errors import UserError
from ftdist.evaluate import scores

WORDS = [a + b for a in ("am", "bir", "ced", "du", "em", "fjo", "gro") for b in ("ber", "ch", "ar", "ne", "rd", "ve")]


@pytest.fixture(scope="session")
def general(shared):
    """A folder with two files of made-up sentences: one to replay, one to keep."""
    folder, chance = shared / "general", random.Random(1)
    folder.mkdir(exist_ok=True)
    for name in ("replay", "keep"):
        lines = [json.dumps({"text": " ".join(chance.choices(WORDS, k=16))}) for _ in range(60)]
        if not (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def kept(verb, small, general, tmp_path_factory):
    """A run that ends early by the held-out loss, with replay and two retention sets; and its page."""
    run_dir = tmp_path_factory.mktemp("kept") / "run"
    words = ("engine=single", "cluster.processes=1", "train.per_device_train_batch_size=4", "train.num_train_epochs=9",
             "train.learning_rate=2e-2", "train.eval_strategy=steps", "train.eval_steps=3", "stopping.patience=2",
             "stopping.restore_best=true", "stopping.overfitting_after=1", "stopping.overfitting_rise=0",
             f"data.replay={general}/replay.jsonl", "data.replay_share=0.3", "eval.retention_during=true",
             f"eval.retention={{words: {general}/keep.jsonl, again: {general}/keep.jsonl}}", "eval.samples=2",
             "eval.max_new_tokens=2", "eval.resamples=10")  # fmt: skip
    finished = verb("train", *small, *words, f"run_dir={run_dir}")
    assert finished.status == 0, finished
    assert verb("report", run_dir).status == 0
    return run_dir, finished.stdout


def test_a_run_that_keeps_the_best(kept):
    run_dir, stdout = kept
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    held_out = {row["step"]: row for row in logged if "eval_loss" in row}
    outcome = json.loads((run_dir / "outcome.json").read_text())
    best = min(held_out, key=lambda step: held_out[step]["eval_loss"])
    assert outcome["final_step"] == best < outcome["step"] == max(held_out)
    assert f"final/ holds step {best}, not the last one" in stdout and "general" in stdout
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text())
    assert metrics["tuned"]["loss"] == pytest.approx(held_out[best]["eval_loss"], rel=1e-4)
    base = next(row for row in logged if row["step"] == 0)
    for name in ("retention_words_loss", "retention_again_loss", "retention_loss"):
        assert metrics["base"][name] == pytest.approx(base[f"eval_{name}"], rel=1e-4), name
        assert metrics["tuned"][name] == pytest.approx(held_out[best][f"eval_{name}"], rel=1e-4), name
    for side in ("base", "tuned"):
        assert 0 <= metrics[side]["retention_words_token_accuracy"] <= 1 and "token_accuracy" in metrics[side]
        assert metrics[side]["retention_words_perplexity"] == pytest.approx(
            np.exp(metrics[side]["retention_words_loss"])
        )
    assert metrics["retention_overlap"]["words"]["rows"] == []
    said = [event for event in map(json.loads, (run_dir / "events.jsonl").open()) if event["event"] == "overfitting"]
    assert said and said[-1]["since"] == best and f"warning: step {said[-1]['step']}: {said[-1]['text']}" in stdout
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan["evaluations"] > len(held_out) and plan["evaluation_seconds"] > 0
    page, readme = (run_dir / "report.html").read_text(), (run_dir / "README.md").read_text()
    for part in (f"final/ holds step {best}", "Ended early: eval_loss has not improved in 2", "retention data words",
                 f"overfitting since step {best}", "general from", "loss on general data over steps"):  # fmt: skip
        assert part in page, part
    assert f"final/ holds step {best}" in readme and "general rows" in readme


def test_overlap_with_the_training_data_is_refused(verb, small, chat, tmp_path):
    words = (*small, "engine=single", "cluster.processes=1", f"run_dir={tmp_path / 'run'}")
    answer = verb("train", *words, f"eval.retention={{chats: {chat}}}")
    answer.refused("rows of eval.retention=", "overlap with the training data", f"data.against={chat}")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("eval.retention={a b: x.jsonl}",), ("eval.retention: 'a b'",)),
        (("eval.retention_during=true",), ("eval.retention_during=true", "eval.retention=FILE")),
        (("eval.retention={a: nowhere.jsonl}",), ("eval.retention=nowhere.jsonl: no such file",)),
        (("stopping.patience=0",), ("stopping.patience=0", "greater than or equal to 1")),
        (("stopping.metric=eval_los",), ("stopping.metric=eval_los", "did you mean eval_loss")),
        (("data.replay=x.jsonl", "data.replay_share=1"), ("data.replay_share=1", "less than 1")),
        (("+train.load_best_model_at_end=true",), ("train.load_best_model_at_end", "stopping.restore_best")),
        (("model.dropout=1",), ("model.dropout=1", "less than 1")),
        (("model.dropout={resid_pdrop: 0.1}",), ("model.dropout.resid_pdrop", "model type llama", "attention_dropout")),
    ],
)
def test_refused(small, tmp_path, words, parts):
    (config,) = compose.compose("train", [*small, *words, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError) as failure:
        job.decide(config)
        evaluate.retention_data(config, tmp_path / "run")
    assert all(part in str(failure.value) for part in parts), failure.value


def test_pairs_and_texts_in_one_another_s_key(small, tmp_path):
    """The key that was set is named, with the one that takes such rows."""
    pairs, texts = tmp_path / "pairs.jsonl", tmp_path / "texts.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"a{i}", "chosen": f"b{i}", "rejected": "c"}) for i in range(4)))
    texts.write_text("\n".join(json.dumps({"text": f"some words {i}"}) for i in range(4)))
    keys = (f"eval.retention={pairs}", f"eval.preferences={texts}", "eval.samples=1", f"run_dir={tmp_path / 'run'}")
    (config,) = compose.compose("train", [*small, *keys])
    job.decide(config)
    with pytest.raises(UserError, match=f"eval.retention={pairs}: holds pairs .* eval.preferences"):
        evaluate.retention_data(config, tmp_path / "run")
    with pytest.raises(UserError, match=f"eval.preferences={texts}: holds no pairs .* eval.retention"):
        evaluate.refuse_preferences(config, tmp_path / "run")


def test_general_data_are_read_as_an_adapter_that_goes_on_was_taught(small, chat, tmp_path, monkeypatch, environment):
    """The Fisher's and the retention set's, with its tokenizer and template, as the training data are."""
    monkeypatch.setenv("FTDIST_CACHE", environment["FTDIST_CACHE"])
    run_dir = tmp_path / "run"
    keys = ("forgetting=ewc", f"forgetting.data={chat}", "engine=single", f"run_dir={run_dir}")
    (config,) = compose.compose("train", [*small, f"eval.retention={chat}", *keys])
    job.decide(config)
    shutil.copytree(config["model"]["path"], run_dir / start.FOLDER)
    own = "{% for m in messages %}{{ m['role'] }}!{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (run_dir / start.FOLDER / "chat_template.jinja").write_text(own)
    (run_dir / start.FOLDER / start.WEIGHTS).write_bytes(b"")
    general = job.general_data(config, "no hash", run_dir)
    for folder in (general, *evaluate.retention_data(config, run_dir).values()):
        assert "!" in Path(folder, "chat_template.jinja").read_text(), folder


@pytest.mark.parametrize(
    ("keys", "after"),
    [((), False), (("samples", 1), True), (("retention", "x"), True), (("preferences", "x"), True),
     (("lm_eval", ["x"]), True), (("retention", "x", "retention_during", True), False)],
)  # fmt: skip
def test_what_is_named_is_measured_before_and_after(keys, after):
    """By an evaluation after training, unless every evaluation while training does."""
    values = yaml.safe_load((CONF / "eval" / "default.yaml").read_text())
    stopping = yaml.safe_load((CONF / "stopping" / "default.yaml").read_text())
    assert evaluate.afterwards(values | dict(zip(keys[::2], keys[1::2], strict=True)), stopping) == after


def test_a_run_goes_on_with_the_data_that_its_base_was_measured_on():
    before = {"news": "/cache/data/aa"}
    resume.refuse_other_sets("news.jsonl", before, {"news": "/elsewhere/aa"})
    for now in ({"news": "/cache/data/bb"}, {"code": "/cache/data/aa"}, {}):
        with pytest.raises(UserError, match=r"eval\.retention=x: other data than those on which the base was measured"):
            resume.refuse_other_sets("x", before, now)


def test_the_base_is_read_once_more_than_there_are_evaluations(small, tmp_path):
    keys = ("train.eval_strategy=steps", "train.eval_steps=5", "train.max_steps=20", f"run_dir={tmp_path / 'run'}")
    (config,) = compose.compose("train", [*small, *keys])
    job.decide(config)
    report = {"train_rows": 50, "train": 50, "validation": 9}
    one, more = (job.plan(config, report, held_out_tokens=900, base_tokens=tokens) for tokens in (0, 300))
    assert more["evaluation_seconds"] / one["evaluation_seconds"] == pytest.approx((4 * 900 + 300) / (4 * 900))


def test_dropouts_of_an_architecture():
    assert models.dropouts({"model_type": "gpt2"}, 0.2) == dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2
    )
    assert models.dropouts({"model_type": "llama"}, None) == {}
    with pytest.raises(UserError, match="model type mamba has no dropout"):
        models.dropouts({"model_type": "mamba"}, 0.1)


OWN = {  # beside the sizes; what `model.dropout` may name, and what it may not since no forward pass reads it
    "llama": {"intermediate_size": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "phi": {"intermediate_size": 24},
    "falcon": {},
    "falcon-alibi": {"alibi": True},
    "falcon-serial": {"parallel_attn": False},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gpt_neox": {"intermediate_size": 24},
    "starcoder2": {"intermediate_size": 24},
}


@pytest.mark.parametrize("name", OWN)
def test_every_dropout_that_can_be_set_acts_and_is_off_for_pairs(name):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    values = {"model_type": name.partition("-")[0], **sizes, **OWN[name]}
    known = models.dropouts(values, 0.5)
    assert ("attention_dropout" in known) == (name not in ("falcon", "gpt2"))
    ids = torch.arange(12)[None]
    for one in known:
        config = AutoConfig.for_model(**{**values, **dict.fromkeys(known, 0.0), one: 0.5})
        model = AutoModelForCausalLM.from_config(config).train()
        torch.manual_seed(1)
        assert not torch.equal(model(ids).logits, model(ids).logits), one
        without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits), one
        assert getattr(model.config, one) == 0.5, "what is saved stays as it was"


def test_a_dropout_that_no_forward_pass_reads_is_refused():
    with pytest.raises(UserError, match="model type mpt has no dropout"):
        models.dropouts({"model_type": "mpt"}, 0.1)
    with pytest.raises(UserError, match=r"model\.dropout\.attention_dropout: no dropout of model type falcon"):
        models.dropouts({"model_type": "falcon"}, {"attention_dropout": 0.1})


def test_label_smoothing_is_over_supervised_tokens(tmp_path):
    data, model = rows([12, 25]), new(LlamaConfig(**SMALL))
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0, :-1] for row in data])
    targets = torch.cat([torch.tensor(row["labels"][1:]) for row in data])
    wanted = functional.cross_entropy(logits, targets, label_smoothing=0.2)  # leaves -100 out
    made = trainer(model, tmp_path, data, per_device_train_batch_size=2, label_smoothing_factor=0.2, learning_rate=1e-9)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_an_evaluation_holds_no_logits_and_sends_two_numbers(tmp_path):
    """The head answers with a sum; what the ranks exchange is that and the number of tokens."""
    data, model = rows([40, 30, 20, 10]), new(LlamaConfig(**SMALL))
    made = trainer(model, tmp_path, data, per_device_eval_batch_size=2)
    made.retention = {"eval_retention_a_loss": data[:2], "eval_retention_b_loss": data[2:]}
    made.evaluate()  # the first one compares the fused loss with the full logits of 32 tokens
    answers, sent = [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: answers.append(output.numel()))
    reduce = made.accelerator.reduce
    made.accelerator.reduce = lambda tensor, *a: sent.append(tensor.numel()) or reduce(tensor, *a)
    metrics = made.evaluate()
    assert set(answers) == {1} and len(answers) == 4 and sent == [2, 2, 2]
    with torch.no_grad():
        means = [float(token_losses(model, part).mean()) for part in (data[:2], data[2:])]
    assert metrics["eval_retention_a_loss"] == pytest.approx(means[0], rel=1e-5)
    assert metrics["eval_retention_loss"] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_scores_of_sets():
    one = scores.of_tokens(np.array([6.0, 2.0]), np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    assert one["loss"].total == 8 / 6 and one["token_accuracy"].total == 4 / 6
    other = scores.of_tokens(np.array([5.0]), np.array([0.0]), np.array([1.0]))
    mean = scores.mean_of_sets([one["loss"], other["loss"]])
    assert mean.total == pytest.approx((8 / 6 + 5) / 2) and not mean.higher_is_better
    assert list(mean.rows) == [3.0, 0.5, 5.0]


@pytest.mark.parametrize(
    ("keys", "count"),
    [({"eval_strategy": "no"}, 0), ({"eval_strategy": "epoch"}, 3), ({"eval_strategy": "steps", "eval_steps": 4}, 6),
     ({"eval_strategy": "steps", "eval_steps": 0.25}, 3), ({"eval_strategy": "steps", "eval_steps": None}, 12)],
)  # fmt: skip
def test_how_often_is_evaluated(keys, count):
    assert forecast.evaluations({"logging_steps": 2, **keys}, 25, 10) == count
