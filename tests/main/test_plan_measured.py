"""The plan beside what ranks measured: the runs of the matrix, the run's page, the refusal of what cannot fit."""

import json

import pytest
from matrix import ENGINES, STRATEGIES

KINDS = ("weights", "quantization", "gradients", "optimizer", "buckets", "gradients_in_backward")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_model_states_are_exact_to_the_byte(cell, strategy, engine):
    plan = cell(strategy, engine).plan
    counted = plan["measured"]["states"]
    assert {kind: plan["states"].get(kind, 0) for kind in KINDS} == {kind: counted[kind] for kind in KINDS}
    assert counted["optimizer"] > 0 and counted["gradients_in_backward"] > 0


@pytest.mark.parametrize(("strategy", "engine"), [("full", "zero3"), ("qlora", "ddp")])
def test_every_rank_reports_its_peaks(cell, strategy, engine):
    made = cell(strategy, engine)
    measured = made.plan["measured"]
    assert [rank["rank"] for rank in measured["ranks"]] == [0, 1]
    for rank in measured["ranks"]:
        assert {"load", "train", "step", "evaluation", "save"} == set(rank["peak_bytes"])
        assert all(peak > rank["at_start_bytes"] // 2 for peak in rank["peak_bytes"].values())
    assert measured["tokens_per_second"] > 0
    page = (made.run_dir / "README.md").read_text()
    assert "## Predicted and measured" in page and "| device peak |" in page


def test_train_refuses_what_cannot_fit(verb, small, tmp_path):
    words = (*small, "strategy=full", "engine=zero2", "cluster.processes=2", "cluster.oversubscribe=true")
    tight = ("hardware=cpu", "hardware.memory=8e8", f"run_dir={tmp_path / 'run'}")
    verb("train", *words, *tight).refused("does not fit", "must_fit=false")
    assert not (tmp_path / "run").exists()


def test_a_plan_says_what_would_fit_and_the_fix_fits(verb, tmp_path):
    words = (
        "plan",
        "experiment=llama31_8b_full_zero3",
        "data.path=demo",
        "hardware=l4",
        "cluster.processes=4",
        "--json",
    )
    plan = json.loads(verb(*words, cwd=tmp_path).stdout)
    assert plan["fits"] is False and plan["margin_bytes"] < 0 and plan["fixes"]
    for fix in plan["fixes"]:
        mended = json.loads(verb(*words, *fix["overrides"], cwd=tmp_path).stdout)
        assert mended["fits"] is True, fix
        assert mended["device_peak_bytes"] == fix["device_peak_bytes"]
    assert len({fix["seconds_per_step"] for fix in plan["fixes"]}) > 1
