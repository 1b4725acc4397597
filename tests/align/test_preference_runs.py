"""task=dpo through strategies and engines: the same curves, exact resume, the reference in all its forms."""

import json
import shutil
from pathlib import Path

import pytest
from runs import events, last_words, metrics, same
from safetensors import safe_open
from safetensors.numpy import load_file

from ftdist import checkpoint
from ftdist.data.rows import rows_of

pytestmark = pytest.mark.xdist_group("align")

QUICK = {("full", "zero3"), ("lora", "ddp")}
CELLS = [
    pytest.param(s, e, marks=() if (s, e) in QUICK else pytest.mark.slow)
    for s in ("full", "lora", "qlora", "spectrum")
    for e in ("ddp", "zero2", "zero3")
]
KEYS = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
KEYS |= {"rewards/margins", "rewards/accuracies"}


def steps(run_dir):
    return [row for row in metrics(run_dir) if "loss" in row]


def held_out(run_dir):
    return [row for row in metrics(run_dir) if "eval_loss" in row][-1]


def close(one, other, tolerance=2e-4):
    """The same metrics but for rounding."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "eval_loss", *KEYS, *(f"eval_{key}" for key in KEYS)):
            if key in a and not key.endswith("accuracies"):  # at the first step every reward is rounding
                assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), (a["step"], key)


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_the_same_bits_after_a_stop(forks, words, trained, tmp_path, strategy, engine):
    expected = trained(strategy, engine)
    first = steps(expected)[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4), "policy and reference start as one model"
    assert abs(first["rewards/chosen"]) < 1e-4 and first.keys() >= KEYS
    assert steps(expected)[-1]["loss"] < 0.69
    assert {f"eval_{key}" for key in KEYS} <= held_out(expected).keys()
    # means over two steps, and a stop between them: what was summed up so far is in the checkpoint
    run_dir = forks.freeze(tmp_path / "run", *words(strategy, engine, 'train_until="step 3"'))
    assert forks.start(run_dir) == [75, 75], last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, expected)


@pytest.mark.parametrize(
    ("strategy", "engine"), [("full", "zero3"), ("lora", "ddp"), ("qlora", "zero2"), ("spectrum", "zero3")]
)
def test_policy_and_reference_start_as_one_model(trained, strategy, engine):
    run_dir = trained(strategy, engine)
    first = steps(run_dir)[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(first["rewards/chosen"]) < 1e-4 and first.keys() >= KEYS
    assert steps(run_dir)[-1]["loss"] < 0.69
    assert {f"eval_{key}" for key in KEYS} <= held_out(run_dir).keys()


@pytest.mark.parametrize("engine", ["single", "zero1", pytest.param("ddp", marks=pytest.mark.slow)])
def test_curves_are_those_of_any_other_engine(trained, engine):
    close(trained("full", engine), trained("full", "zero3"))


def test_means_go_on_over_a_stop_between_two_logged_steps(forks, words, tmp_path):
    often = ("train.logging_steps=2", "train.eval_strategy=no")
    whole = forks.freeze(tmp_path / "whole", *words("full", "single", *often))
    assert forks.start(whole, 1) == [0], last_words(whole)
    run_dir = forks.freeze(tmp_path / "run", *words("full", "single", *often, 'train_until="step 3"'))
    assert forks.start(run_dir, 1) == [75], last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir, 1) == [0], last_words(run_dir)
    same(run_dir, whole)
    assert [row["step"] for row in metrics(run_dir)] == [2, 4, 6]


@pytest.mark.parametrize("kind", ["cached", "copy"])
def test_an_adapter_switched_off_is_cached_columns_is_a_separate_copy(trained, kind):
    off = trained("lora", "ddp")
    assert json.loads((off / "plan.json").read_text())["reference"] == "adapter_off"
    assert not (off / "reference.safetensors").exists()
    close(off, trained("lora", "ddp", f"task.reference={kind}"), 1e-5)


def test_cached_is_live_where_every_weight_is_trained(trained):
    cached = trained("full", "zero3")
    assert json.loads((cached / "plan.json").read_text())["reference"] == "cached"
    copy = trained("full", "zero3", "task.reference=copy")
    close(cached, copy, 1e-5)
    for rank in (0, 1):
        tensors = json.loads((copy / "logs" / f"rank-{rank}.memory.json").read_text())["tensors"]["between"]
        planned = json.loads((copy / "plan.json").read_text())["states"]
        assert tensors["reference"] == pytest.approx(planned["reference"], rel=0.05)  # padding of shards
        assert {k: planned[k] for k in ("weights", "optimizer")} == {k: tensors[k] for k in ("weights", "optimizer")}


def test_a_copy_computes_in_the_precision_of_the_policy(trained):
    """Autocast too, where weights stay in float32: at the start both are the same model, to the bit."""
    half = ("train.bf16=true", "train.max_steps=1")
    first = steps(trained("full", "single", "task.reference=copy", *half))[0]
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0, 0)


def test_columns_of_other_arithmetic_have_another_name(forks, words, tmp_path):
    """float32 weights under autocast are not bfloat16 weights."""
    keys = [
        json.loads((forks.freeze(tmp_path / e, *words("full", e, "train.bf16=true")) / "plan.json").read_text())
        for e in ("ddp", "zero2", "zero3")
    ]
    ddp, zero2, zero3 = (plan["reference_key"] for plan in keys)
    assert ddp != zero2 == zero3


def test_columns_are_the_bases_own_log_probabilities(trained, model):
    import torch
    from transformers import AutoModelForCausalLM

    run_dir = trained("full", "zero3")
    plan = json.loads((run_dir / "plan.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    columns = load_file(run_dir / "reference.safetensors")
    assert plan["disk_bytes"]["reference"] == sum(column.nbytes for column in columns.values())
    for split in ("train", "validation"):
        rows = rows_of(Path(plan["prepared"]) / split)
        assert columns[split].shape == (len(rows), 2)
        for i in (0, len(rows) - 1):
            for side, row in enumerate((rows[i], rows[i]["rejected"])):
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
                with torch.no_grad():
                    each = base(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                assert columns[split][i, side] == pytest.approx(float(each[labels >= 0].sum()), abs=1e-3)


def test_lost_or_damaged_columns_end_a_resumed_run(forks, words, tmp_path):
    run_dir = forks.freeze(tmp_path / "run", *words("full", "single", 'train_until="step 3"'))
    assert forks.start(run_dir, 1) == [75], last_words(run_dir)
    file = run_dir / "reference.safetensors"
    damaged = shutil.copytree(run_dir, tmp_path / "damaged") / file.name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert forks.change(damaged.parent, "train_until=null") == 0
    assert forks.start(damaged.parent, 1) == [93]
    assert "reference.safetensors is damaged" in last_words(damaged.parent)
    with safe_open(file, framework="np") as opened:
        key = opened.metadata()["key"]
    from_cache = words_cache(forks) / "reference" / f"{key}.safetensors"
    file.unlink()
    kept = from_cache.rename(from_cache.with_suffix(".aside"))
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir, 1) == [93]
    assert "reference.safetensors is gone" in last_words(run_dir)
    kept.rename(from_cache)
    assert forks.start(run_dir, 1) == [0], "the cache has them still"
    assert checkpoint.steps(run_dir)


def words_cache(forks):
    return Path(next(line[13:] for line in Path(f"/proc/{forks.process.pid}/environ").read_text().split("\0")
                     if line.startswith("FTDIST_CACHE=")))  # fmt: skip


def test_a_collapse_of_chosen_answers_is_said(forks, words, tmp_path):
    more = ("train.learning_rate=3e-2", "task.chosen_drop=0.1", "task.beta=1.0")
    run_dir = forks.freeze(tmp_path / "run", *words("full", "single", *more))
    assert forks.start(run_dir, 1) == [0], last_words(run_dir)
    dropped = [row["step"] for row in steps(run_dir) if row["logps/chosen"] < steps(run_dir)[0]["logps/chosen"] - 5]
    said = events(run_dir, "chosen-drop")
    assert bool(said) == bool(dropped), (said, dropped)
    assert said and "task.beta" in said[0]["text"]


def test_pairs_are_learnt_under_a_penalty(forks, words, chat, trained, tmp_path):
    """EWC: the Fisher is of texts, and the first step is that of a run without it."""
    keys = ("forgetting=ewc", f"forgetting.data={chat}", "forgetting.samples=8", "forgetting.strength=1e4")
    run_dir = forks.freeze(tmp_path / "run", *words("full", "zero3", *keys))
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    penalised, plain = steps(run_dir), steps(trained("full", "zero3"))
    penalties = [row["ewc_penalty"] for row in penalised]
    assert penalties[0] == 0 and penalties[-1] > 1e-3
    assert penalised[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-4)
    assert penalised[-1]["loss"] > plain[-1]["loss"] + 1e-4, "it holds back"
