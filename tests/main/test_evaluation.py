"""`ftdist eval` and `ftdist chat` on finished runs and exported directories."""

import json
import math
import shutil

import pytest
from matrix import overrides


@pytest.fixture(scope="session")
def evaluated(run, cell, shared):
    """A copy of a finished run, evaluated on its held-out rows; and what was said."""
    from filelock import FileLock

    copy, said = shared / "evaluated", shared / "evaluated.json"
    with FileLock(shared / "evaluated.lock"):
        if not said.is_file():
            shutil.copytree(cell("lora", "zero3").run_dir, copy)
            finished = run("eval", copy, "eval.samples=12", "eval.max_new_tokens=8", r"eval.answer_pattern='(\w+)\W*$'")
            said.write_text(json.dumps([finished.status, finished.stdout, finished.stderr]))
    status, stdout, stderr = json.loads(said.read_text())
    assert status == 0, stderr
    return copy, stdout


def results(directory):
    metrics = json.loads((directory / "eval" / "metrics.json").read_text())
    return metrics, [json.loads(line) for line in (directory / "eval" / "samples.jsonl").open()]


def test_base_and_tuned_side_by_side(evaluated, cell):
    directory, stdout = evaluated
    metrics, samples = results(directory)
    assert len(samples) == metrics["tuned"]["rows"] == 12
    names = {"loss", "perplexity", "exact_match", "extracted_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    for side in ("base", "tuned"):
        assert names <= set(metrics[side])
        assert metrics[side]["perplexity"] == pytest.approx(math.exp(metrics[side]["loss"]))
    # one process here, two ranks of ZeRO-3 there: the held-out loss is the same number
    assert metrics["tuned"]["loss"] == pytest.approx(cell("lora", "zero3").held_out[-1], rel=1e-4)
    loss = metrics["difference"]["loss"]
    assert loss["difference"] == pytest.approx(metrics["tuned"]["loss"] - metrics["base"]["loss"])
    assert loss["low"] <= loss["difference"] <= loss["high"] < 0 and loss["wins"] > loss["losses"]
    assert loss["wins"] + loss["ties"] + loss["losses"] == metrics["held_out"]  # examples, several in a packed row
    assert metrics["signatures"]["bleu"].startswith("nrefs:1|case:mixed")
    for row in samples:
        assert row["prompt"].rstrip().endswith("assistant") or row["prompt"]
        assert row["scores"]["tuned"]["rougeL"] <= 1 and row["messages"][-1]["role"] == "user"
    assert "95 % interval" in stdout and "wins/ties/losses" in stdout
    assert metrics["without_reference"] == 0 and metrics["held_out"] >= 12
    assert "no reference" not in stdout and f"loss over {metrics['held_out']} held-out rows" in stdout
    assert metrics["overlap"] is None  # the data step has taken shared text out already


def test_answers_while_training_are_those_of_the_saved_model(verb, small, tmp_path):
    """Seven rows on two ranks of ZeRO-3 over a 4-bit base: one rank has a row less, sentences end anywhere."""
    words = (*overrides("qlora", "zero3"), "train.learning_rate=1e-4", "train.eval_strategy=steps",
             "train.eval_steps=3", "eval.during=7", "eval.samples=7", "eval.batch_size=2", "eval.show=0",
             "eval.max_new_tokens=12")  # fmt: skip
    finished = verb("train", *small, *words, f"run_dir={tmp_path / 'run'}")
    assert finished.status == 0, finished
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    held_out = {row["step"]: row for row in rows if "eval_chrf" in row}
    assert sorted(held_out) == [3, 6]
    tuned = results(tmp_path / "run")[0]["tuned"]
    assert tuned["chrf"] > 0  # at this rate the answers are still the base's noise, but there are some
    for name in ("exact_match", "bleu", "chrf", "rouge1", "rougeL"):
        assert held_out[6][f"eval_{name}"] == pytest.approx(tuned[name]), name


def test_answers_do_not_depend_on_the_batch(evaluated, verb, tmp_path):
    """Left padding is masked: a row answers the same alone and beside longer ones."""
    directory, _ = evaluated
    alone = tmp_path / "alone"
    shutil.copytree(directory, alone)
    words = ("eval.samples=12", "eval.max_new_tokens=8", "eval.batch_size=1", "eval.metrics=[exact_match]")
    finished = verb("eval", alone, *words, "eval.resamples=0", "eval.show=0")
    assert finished.status == 0, finished
    (_, one), (metrics, many) = results(alone), results(directory)
    assert [row["tuned"] for row in one] == [row["tuned"] for row in many]
    assert [row["base"] for row in one] == [row["base"] for row in many]
    assert "low" not in results(alone)[0]["difference"]["loss"] and "bleu" not in results(alone)[0]["tuned"]
    assert results(alone)[0]["tuned"]["loss"] == pytest.approx(metrics["tuned"]["loss"], rel=1e-5)


def test_an_exported_model_on_other_data_with_an_overlap(evaluated, verb, chat, model, tmp_path):
    """The directory alone, as on another machine; then the run itself, which knows what it was trained on."""
    directory, _ = evaluated
    exported = tmp_path / "model"
    finished = verb("export", directory, f"export.output={exported}", "export.parity=false", "export.license=mit")
    assert finished.status == 0, finished
    assert "license: mit" in (exported / "README.md").read_text()
    assert "extracted_match" in (exported / "README.md").read_text()
    words = (f"eval.data={chat}", "eval.samples=8", "eval.max_new_tokens=4", "eval.show=0")
    finished = verb("eval", exported, *words, f"eval.base={model}", f"eval.retention={chat}")
    assert finished.status == 0, finished
    assert "not checked" in finished.stdout
    metrics, _ = results(exported)
    assert metrics["tuned"]["retention_loss"] == pytest.approx(metrics["tuned"]["loss"])
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    finished = verb("eval", copy, f"eval.data={chat}", "eval.max_new_tokens=1", "eval.show=0")
    assert "WARNING: " in finished.stdout and "overlap with the training data" in finished.stdout
    metrics, samples = results(copy)
    assert metrics["tuned"]["loss"] == pytest.approx(results(exported)[0]["tuned"]["loss"], rel=1e-4)
    trained_on = json.loads((copy / "data_report.json").read_text())["train"]
    assert trained_on / 2 < sum(row.get("in_training", False) for row in samples) <= trained_on


def test_chat(verb, execute, evaluated, tmp_path):
    directory, _ = evaluated
    (tmp_path / "lines").write_text("Which word is last: pear, plum?\n/what\n/reset\n\nagain\n/quit\nnever asked\n")
    finished = execute("bash", "-c", f"ftdist chat {directory} chat.max_new_tokens=4 < {tmp_path}/lines")
    assert finished.status == 0, finished
    sides = [line.split()[0] for line in finished.stdout.splitlines()[1:] if line[:1] in "bt"]
    assert sides == ["base", "tuned", "base", "tuned"]
    verb("chat", directory, "chat.temprature=1").refused("chat.temprature", "chat.temperature")


def test_bad_input_is_answered_in_one_line(verb, evaluated, model, chat, tmp_path):
    directory, _ = evaluated
    verb("eval", directory, "eval.sampels=3").refused("eval.sampels", "eval.samples")
    verb("eval", directory, "samples=3").refused("samples=3", "eval.KEY=VALUE")
    verb("eval", directory, "eval.answer_pattern='('").refused("eval.answer_pattern=(", "regular expression")
    verb("eval", directory, "eval.samples=4", "eval.g_eval.criteria=good").refused("eval.g_eval.judge")
    words = ("eval.samples=2", "eval.max_new_tokens=2", "eval.show=0")
    verb("eval", directory, *words, "eval.data=/no/where.jsonl").refused("eval.data=/no/where.jsonl")
    verb("eval", model, *words).refused(str(model), "eval.data=FILE")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "and the answer?"}]}\n' * 3)
    verb("eval", directory, *words, f"eval.data={questions}").refused("questions.jsonl line 1")
    verb("eval", directory, *words, "eval.lm_eval=[hellaswag]").refused("eval.lm_eval", "ftdist[lm_eval]")
    gone = tmp_path / "gone"
    shutil.copytree(directory, gone)
    config = (gone / "config.yaml").read_text()
    (gone / "config.yaml").write_text(config.replace(str(model), "/models/that/was"))
    verb("eval", gone, *words).refused("/models/that/was", "is gone", "eval.base=DIR")
    judge = {"criteria": "good", "steps": "look", "model": "m", "retries": 0, "judge": "'http://127.0.0.1:9/v1'"}
    judged = (*words, *(f"eval.g_eval.{key}={value}" for key, value in judge.items()))
    down = verb("eval", gone, *judged, f"eval.base={model}")
    assert down.status == 1 and down.stderr.splitlines()[-1].startswith(
        "ftdist: eval.g_eval.judge=http://127.0.0.1:9/v1"
    )
    assert results(gone)[0]["tuned"]["rows"] == 2  # the rest was written before the judge was asked


def test_an_empty_generation_is_counted(model, verb, tmp_path):
    """A model that ends at once."""
    import torch
    from safetensors.torch import load_file, save_file

    exported = tmp_path / "model"
    shutil.copytree(model, exported)
    weights = load_file(exported / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        weights[name] = torch.zeros_like(weights[name])  # all alike: the first, padding, is taken
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    data = tmp_path / "one.jsonl"
    data.write_text('{"question": "hi", "answer": "yes"}\n')
    finished = verb("eval", exported, f"eval.data={data}", "eval.samples=1", "eval.max_new_tokens=3", "eval.show=0")
    assert finished.status == 0, finished
    metrics, _ = results(exported)
    assert metrics["tuned"]["empty"] == 1 and metrics["tuned"]["exact_match"] == 0
    assert "1 of 1 answers are empty" in finished.stdout
