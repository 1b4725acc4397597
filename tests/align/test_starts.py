"""A finished run as the start of another: its model, its adapter merged, its adapter going on."""

import json
import shutil

import pytest
from runs import last_words, metrics
from safetensors.torch import load_file

from ftdist import compose, job, start
from ftdist.errors import UserError

pytestmark = pytest.mark.xdist_group("align")


@pytest.fixture(scope="module")
def supervised(forks, words, chat, tmp_path_factory):
    """`supervised(strategy)`: a finished run of task=sft."""
    made = {}

    def supervised(strategy):
        if strategy not in made:
            run_dir = tmp_path_factory.mktemp("sft") / "run"
            more = (
                ("task=sft", f"data.path={chat}", "strategy.r=4")
                if strategy == "lora"
                else ("task=sft", f"data.path={chat}")
            )
            forks.freeze(run_dir, *words(strategy, "single", *more, "train.packing=false", "export.parity=false"))
            assert forks.start(run_dir, 1) == [0], last_words(run_dir)
            made[strategy] = run_dir
        return made[strategy]

    return supervised


def first(run_dir):
    return metrics(run_dir)[0]


def test_an_adapter_goes_on_and_is_its_own_reference(forks, words, supervised, tmp_path, model):
    sft = supervised("lora")
    own = (f"model.path={sft}", "model.adapter=continue", "strategy.r=4")
    run_dir = forks.freeze(tmp_path / "run", *words("lora", "zero3", *own))
    assert json.loads((run_dir / "plan.json").read_text())["reference"] == "cached"
    aside = sft.rename(sft.with_name("aside"))  # the earlier run may go: what it left is in the new one
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    aside.rename(sft)
    # the policy starts from the adapter, not from the bare base, and so does the reference
    assert first(run_dir)["loss"] == pytest.approx(0.693147, abs=1e-4)
    bare = forks.freeze(tmp_path / "bare", *words("lora", "zero3"))
    assert forks.start(bare) == [0, 0], last_words(bare)
    assert abs(first(bare)["logps/chosen"] - first(run_dir)["logps/chosen"]) > 0.1
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft / "final", run_dir / "final"))
    assert before.keys() == after.keys() and any((before[k] != after[k]).any() for k in before)
    copy = forks.freeze(tmp_path / "copy", *words("lora", "zero2", *own, "task.reference=copy"))
    assert forks.start(copy) == [0, 0], last_words(copy)
    assert metrics(copy)[-1]["eval_loss"] == pytest.approx(metrics(run_dir)[-1]["eval_loss"], abs=1e-4)
    assert start.adapter(run_dir) == run_dir / "start"


def test_an_adapter_is_merged_and_a_new_one_trained(forks, words, supervised, tmp_path):
    sft = supervised("lora")
    run_dir = forks.freeze(tmp_path / "run", *words("lora", "single", f"model.path={sft}"))
    assert json.loads((sft / "model" / "ftdist_export.json").read_text())["kind"] == "merged"
    assert (run_dir / "config.yaml").read_text().count(str(sft / "model"))
    assert forks.start(run_dir, 1) == [0], last_words(run_dir)
    assert first(run_dir)["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_a_whole_model_is_trained_further(forks, words, supervised, tmp_path):
    sft = supervised("full")
    run_dir = forks.freeze(tmp_path / "run", *words("spectrum", "single", f"model.path={sft}"))
    assert forks.start(run_dir, 1) == [0], last_words(run_dir)
    assert f"path: {sft}/final" in (run_dir / "config.yaml").read_text()


def decided(words):
    (config,) = compose.compose("train", list(words))
    job.decide(config)
    return config


def refused(words, said):
    with pytest.raises(UserError, match=said):
        job.plan(decided(words))


def test_starts_that_cannot_be(words, supervised, model, pairs, tmp_path):
    sft, whole = supervised("lora"), supervised("full")
    refused(words("lora", "ddp", "model.adapter=continue"), "is no run of ftdist")
    goes_on = (f"model.path={sft}", "model.adapter=continue")
    refused(words("lora", "ddp", *goes_on), "strategy.r=16: .* was made with 4; use that")
    refused(words("full", "ddp", *goes_on), "strategy=full: .* was made with lora")
    refused(words("full", "ddp", f"model.path={whole}", "model.adapter=continue"), "use model.adapter=merge")
    refused(words("lora", "ddp", *goes_on, "strategy.r=4", "task.reference=adapter_off"), "use cached or copy")
    refused(words("full", "ddp", "task.reference=adapter_off"), "no adapter")
    half = shutil.copytree(sft, tmp_path / "half")
    shutil.rmtree(half / "final")
    refused(words("lora", "ddp", f"model.path={half}"), "not finished")


def test_a_reference_with_another_tokenizer_is_refused(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"Ġapple"', '"Ġpaple"'))
    start.same_tokenizer(str(model), str(model), "task.reference_model", False)
    with pytest.raises(UserError, match="task.reference_model=.*its tokenizer is not that of"):
        start.same_tokenizer(str(model), str(other), "task.reference_model", False)
