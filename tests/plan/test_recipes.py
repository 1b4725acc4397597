"""The shipped models and recipes: published parameter counts, and the values that each recipe stands for."""

import re
from pathlib import Path

import pytest

from ftdist import job
from ftdist.compose import choices, compose
from ftdist.plan.batch import QUANTILES
from ftdist.plan.shapes import model_shapes

TOTALS = {
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "phi3_mini": 3_821_079_552,
    "qwen25_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
}
WITHOUT_ARCHITECTURE = {"custom", "default", "demo"}

# model, strategy, engine, nodes, processes, tokens in a sequence, learning rate
RECIPES = {
    "practice_1b": ("llama32_1b", "lora", "ddp", 1, "auto", 1024, 2e-4),
    "practice_3b": ("llama32_3b", "qlora", "ddp", 1, "auto", 1024, 2e-4),
    "phi3_mini_qlora": ("phi3_mini", "qlora", "ddp", 1, "auto", 1024, 2e-4),
    "llama31_8b_qlora": ("llama31_8b", "qlora", "ddp", 1, "auto", 1024, 2e-4),
    "llama31_8b_lora": ("llama31_8b", "lora", "ddp", 1, "auto", 2048, 2e-4),
    "llama31_8b_full_zero3": ("llama31_8b", "full", "zero3", 1, 8, 2048, 1e-5),
    "llama31_8b_spectrum25_zero3": ("llama31_8b", "spectrum", "zero3", 1, 8, 4096, 1e-5),
    "llama31_70b_qlora_zero3": ("llama31_70b", "qlora", "zero3", 1, 8, 1024, 1e-4),
    "llama31_70b_spectrum_nodes": ("llama31_70b", "spectrum", "zero3", 4, 8, 4096, 1e-5),
}


def test_every_model_is_known_here():
    assert set(choices("model")) == set(TOTALS) | WITHOUT_ARCHITECTURE


def test_every_recipe_is_known_here():
    assert set(choices("experiment")) - {"quickstart", "align_demo", "align_demo_dpo"} == set(RECIPES)


@pytest.mark.parametrize("name", TOTALS)
def test_published_parameter_counts(name):
    (config,) = compose("plan", [f"model={name}"])
    shapes = model_shapes(config["model"]["path"], config["model"]["architecture"])
    assert shapes.total == TOTALS[name]
    assert shapes.dtype == "bfloat16"


def test_models_have_the_keys_of_the_default():
    for name in choices("model"):
        (config,) = compose("plan", [f"model={name}", "model.path=here"])
        assert list(config["model"]) == [
            *("path", "revision", "dtype", "attn_implementation", "dropout"),
            *("trust_remote_code", "architecture", "adapter"),
        ]


def planned(name):
    """What `ftdist plan experiment=NAME` counts, on a machine with one device."""
    (config,) = compose("plan", [f"experiment={name}"])
    job.decide(config)
    lengths = dict.fromkeys(QUANTILES, 500)
    report = {"train_rows": 10_000, "train": 10_000, "train_sequences": 10_000, "tokens": 5_000_000}
    return job.plan(config, report={**report, "token_lengths": lengths})


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    (config,) = compose("plan", [f"experiment={name}"])
    model, strategy, engine, nodes, processes, length, rate = RECIPES[name]
    (of_model,) = compose("plan", [f"model={model}"])
    assert config["model"] == of_model["model"]
    assert (config["strategy"]["name"], config["engine"]["name"]) == (strategy, engine)
    assert (config["cluster"]["nodes"], config["cluster"]["processes"]) == (nodes, processes)
    train = config["train"]
    assert (train["max_length"], train["learning_rate"]) == (length, rate)
    assert train["gradient_checkpointing"] is True and train["packing"] is True
    if strategy == "qlora":
        assert 2 <= train["per_device_train_batch_size"] <= 8
        made = planned(name)
        assert 0.001 < made["trainable_parameters"] / made["total_parameters"] < 0.02
    if strategy == "spectrum":
        assert config["strategy"]["top_percent"] == 25


def test_recipes_can_be_changed_on_the_command_line():
    (config,) = compose("plan", ["experiment=llama31_8b_qlora", "train.max_length=512", "engine=zero2"])
    assert (config["train"]["max_length"], config["engine"]["name"]) == (512, "zero2")


@pytest.mark.parametrize("group", ["model", "experiment"])
def test_each_has_a_line_of_meaning(group):
    for name, meaning in choices(group).items():
        assert 10 < len(meaning) <= 105, name


def test_the_learning_path_tells_the_truth():

    text = (Path(__file__).parents[2] / "docs" / "learning_path.md").read_text()
    assert set(re.findall(r"experiment=(\w+)", text)) - {"NAME"} == set(RECIPES)
    table = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+|by the scan) \| ([\d,]+) \|$", text, re.M)
    assert {row[0] for row in table} == set(RECIPES)
    for name, *cells in table:
        made = planned(name)
        known = "by the scan" if made["strategy"] == "spectrum" else f"{made['trainable_parameters']:,}"
        assert cells == [f"{made['total_parameters']:,}", known, f"{made['tokens_per_step']:,}"], name
