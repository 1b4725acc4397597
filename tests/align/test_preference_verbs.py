"""The command line: refusals, the plan of pairs, and one run from training to its page."""

import json
from types import SimpleNamespace

import pytest

from ftdist import compose, job
from ftdist.align.trainer import SUMS, PreferenceTrainer, Tally
from ftdist.errors import UserError


def test_the_wrong_data_for_a_task_is_one_line(run, words, chat, tmp_path):
    own = (*words("lora", "single"), f"run_dir={tmp_path / 'run'}")
    run("train", *own, "task=sft").refused("use task=dpo", "chosen and rejected")
    run("train", *own, f"data.path={chat}").refused("need chosen and rejected", "task=sft")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("task=sft", "data.format=preference"), "data.format=preference: .* use task=dpo"),
        (("data.format=messages",), "data.format=messages: .* task=sft"),
        (("train.packing=true",), "train.packing=true"),
        (("task.beta=0",), "task.beta=0"),
        (
            ("task.loss_type=aot", "train.per_device_eval_batch_size=1"),
            "train.per_device_eval_batch_size=1: .*aot sorts",
        ),
        (("task.loss_typ=ipo",), "task.loss_typ"),
        (("task.loss_type=kto",), "task.loss_type=kto: .* use apo_zero"),
        (("task.reference_model=/nowhere",), "task.reference_model=/nowhere: no such directory"),
    ],
)
def test_what_a_task_refuses_before_anything_is_read(words, more, said):
    with pytest.raises(UserError, match=said):
        (config,) = compose.compose("plan", [*words("lora", "single"), *more])
        job.decide(config)
        job.plan(config)


def test_an_unfinished_run_as_a_reference_is_named_as_one(words, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (config,) = compose.compose("plan", [*words("lora", "single"), f"task.reference_model={tmp_path}"])
    job.decide(config)
    for asked in (job.plan, lambda config: job.other_reference(config, tmp_path / "run")):
        with pytest.raises(UserError, match=f"^task.reference_model={tmp_path}: .*not finished"):
            asked(config)


@pytest.mark.parametrize("off", [True, False])
def test_dropout_of_the_policy_alone_is_no_fault(off):
    """At the first step policy and reference are told apart only where nothing but their weights could do that."""
    told = []
    trainer = SimpleNamespace(
        reference=SimpleNamespace(is_start=True),
        disable_dropout=off,
        tally=Tally(SUMS),
        health=SimpleNamespace(first_difference=lambda *values: told.append(values)),
    )
    PreferenceTrainer._judge_first(trainer, 0.7)
    assert bool(told) == off


def test_identical_answers_are_rejected_and_counted(run, words, pairs, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(pairs.read_text() + json.dumps({"prompt": "x", "chosen": "a", "rejected": "a"}) + "\n")
    answer = run("data", *words("lora", "single"), f"data.path={file}", "data.max_rejects=0.1")
    report = json.loads(
        (tmp_path / answer.stdout.splitlines()[-1].removeprefix("data: ") / "data_report.json").read_text()
    )
    assert report["rejects"] == {"identical chosen and rejected": 1}


def test_a_plan_counts_both_answers(run, words):
    plans = {}
    for name, more in {"dpo": (), "copy": ("task.reference=copy",), "sft": ("task=sft", "train.packing=false")}.items():
        answer = run("plan", *words("full", "zero2", "data.format=auto"), *more, "--json")
        assert answer.status == 0, answer
        plans[name] = json.loads(answer.stdout)
    dpo, copy, sft = plans["dpo"], plans["copy"], plans["sft"]
    assert "8 pairs × 2 sequences × 64 tokens" in dpo["arithmetic"][0]
    assert dpo["tokens_per_step"] == 2 * sft["tokens_per_step"] and dpo["sequences_per_step"] == 8
    assert dpo["phases"]["forward"]["activations"] > 1.9 * sft["phases"]["forward"]["activations"]
    assert (dpo["reference"], copy["reference"]) == ("cached", "copy")
    whole = copy["total_parameters"] * 4
    assert copy["phases"]["step"]["reference"] == copy["states"]["reference"] == whole
    assert "reference" not in dpo["phases"]["step"]
    assert copy["seconds_per_step"] > dpo["seconds_per_step"]


@pytest.mark.xdist_group("align")
def test_from_training_to_the_page(run, words, tmp_path):
    out = tmp_path / "run"
    more = ("eval.samples=8", "eval.max_new_tokens=4", f"run_dir={out}", "train.learning_rate=5e-3")
    answer = run("train", *words("lora", "single"), *more)
    assert answer.status == 0, answer
    found = json.loads((out / "eval" / "metrics.json").read_text())
    assert 0 <= found["base"]["preference_accuracy"] <= 1 and "reward_accuracy" in found["tuned"]
    assert found["difference"]["preference_margin"]["difference"] > 0
    last = [json.loads(line) for line in (out / "metrics.jsonl").open()][-1]
    assert last["eval_rewards/accuracies"] == pytest.approx(found["tuned"]["reward_accuracy"])
    margin = found["difference"]["preference_margin"]["difference"]
    assert last["eval_rewards/margins"] == pytest.approx(0.1 * margin, rel=1e-3)
    page = run("report", out)
    assert page.status == 0, page
    text = (out / "report.html").read_text()
    assert "Preferences" in text and "preference_accuracy" in text
    assert list((out / "plots").glob("rewards_margins.*"))
    exported = run("export", out)
    assert exported.status == 0 and (out / "model" / "model.safetensors").exists(), exported
