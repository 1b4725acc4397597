"""Elastic weight consolidation through the worker: the same in every engine, and after a stop."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from runs import events, last_words, metrics, same, state_bytes

from ftdist import state

pytestmark = pytest.mark.xdist_group("ewc")  # its runs are compared with one another
STRENGTH = 200.0  # a penalty that is felt within four steps
PLAIN = "forgetting.adapters=plain"
BF16 = "train.bf16=true"
TWICE = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2")
CELLS = [
    ("full", "single"),
    ("full", "ddp"),
    ("full", "zero1"),
    ("full", "zero2", *TWICE),
    ("full", "zero3"),
    ("full", "zero3", BF16),
    ("full", "zero3_offload"),
    ("spectrum", "zero2"),
    ("lora", "ddp"),
    ("lora", "zero3"),
    ("qlora", "zero3"),
    ("lora", "zero3", PLAIN),
]


@pytest.fixture(scope="session")
def on(words, chat):
    """`on(strategy, engine, …)`: words of a run of four steps with a Fisher of 24 rows."""

    def on(strategy, engine, *more):
        return words(
            strategy,
            engine,
            "forgetting=ewc",
            f"forgetting.data={chat}",
            "forgetting.samples=24",
            f"forgetting.strength={STRENGTH}",
            "train.max_steps=4",
            *(("strategy.dropout=0",) if "lora" in strategy else ()),  # its random numbers belong to a rank
            *more,
            processes=processes(engine),
        )

    return on


@pytest.fixture(scope="session")
def penalised(forks, on, environment, tmp_path_factory):
    """`penalised(strategy, engine, …)`: such a run, made once; its Fisher is measured by its own ranks."""
    made = {}

    def penalised(strategy, engine, *more):
        key = strategy, engine, more
        if key not in made:
            made[key] = tmp_path_factory.mktemp("penalised") / "run"
            forks.freeze(made[key], *on(strategy, engine, *more))
            shutil.rmtree(Path(environment["FTDIST_CACHE"], "fisher"), ignore_errors=True)
            assert forks.start(made[key], processes(engine)) == [0] * processes(engine), last_words(made[key])
        return made[key]

    return penalised


def processes(engine):
    return 1 if engine == "single" else 2


def steps(run_dir):
    return [row for row in metrics(run_dir) if "loss" in row]


def kept(folder, kind):
    """Every tensor of that kind in a Fisher's files, whole."""
    saved = state.Saved(folder)
    tensors = {}
    for name, shape in saved.shapes.items():
        tensors[name] = torch.full((math.prod(shape),), math.nan)
        saved.fill(tensors[name], state.Segment(name, 0, math.prod(shape), 0), kind)
    return tensors


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(word.rpartition(".")[2] for word in cell))
def test_every_engine_adds_the_same(penalised, cell):
    """The Fisher, the anchors, the penalty and what becomes of the loss."""
    strategy, engine, *more = cell
    run_dir = penalised(strategy, engine, *more)
    alone = penalised(strategy, "single", *(word for word in more if word not in TWICE))
    rough = 1 if BF16 not in more else 30  # DeepSpeed casts weights, autocast activations
    measured, expected = kept(run_dir / "fisher", "fisher"), kept(alone / "fisher", "fisher")
    assert set(measured) == set(expected)
    for name, values in measured.items():
        near = {"rtol": 2e-3 * rough, "atol": 1e-5 * rough**2 * float(expected[name].max())}
        torch.testing.assert_close(values, expected[name], **near)
    plan = json.loads((run_dir / "plan.json").read_text())
    if strategy in ("full", "spectrum") and BF16 not in more:  # DeepSpeed starts from weights in bfloat16
        assert sum(map(len, measured.values())) == plan["trainable_parameters"]
        anchors = kept(alone / "fisher", "weight")
        assert all(torch.equal(values, anchors[name]) for name, values in kept(run_dir / "fisher", "weight").items())
    ranks = [
        json.loads(file.read_text())["tensors"]["between"]["penalty"] for file in run_dir.glob("logs/*.memory.json")
    ]
    assert max(ranks) == plan["states"]["penalty"] > 0
    assert state_bytes(run_dir / "fisher") == plan["disk_bytes"]["fisher"]
    penalties = [row["ewc_penalty"] for row in steps(run_dir)]
    assert penalties[0] == 0 and penalties[-1] > 1e-4
    assert penalties == pytest.approx([row["ewc_penalty"] for row in steps(alone)], rel=1e-2 * rough)
    expected = [row["loss"] for row in steps(alone)]
    assert [row["loss"] for row in steps(run_dir)] == pytest.approx(expected, rel=1e-3 * rough)


def test_the_same_bits_after_a_stop(forks, penalised, on, tmp_path):
    """Fisher and anchors come from the run's own files; files that have another bit are not trusted."""
    expected = penalised("full", "zero2")
    run_dir = forks.freeze(tmp_path / "run", *on("full", "zero2", 'train_until="step 2"'))
    assert forks.start(run_dir) == [75, 75], last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    file = run_dir / "fisher" / "rank-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert 93 in forks.start(run_dir) and "rank-00001.safetensors does not have the bytes" in last_words(run_dir)
    hidden = (run_dir / "fisher").rename(tmp_path / "hidden")
    assert 93 in forks.start(run_dir) and "not measured again for weights that have moved" in last_words(run_dir)
    file = hidden.rename(run_dir / "fisher") / file.name
    file.write_bytes(whole)
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    assert [event["step"] for event in events(run_dir, "resume")][-1:] == [2]
    same(run_dir, expected)


def test_a_penalty_of_nothing_changes_no_bit(forks, on, words, untouched, tmp_path):
    plain = untouched("full", "zero2", "train.max_steps=4")
    run_dir = forks.freeze(tmp_path / "run", *on("full", "zero2", "forgetting.strength=0"))
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    same(run_dir, plain)
    assert "off" in json.loads((run_dir / "plan.json").read_text())["forgetting"] and not (run_dir / "fisher").exists()


def test_a_fisher_serves_other_runs_and_grows_over_tasks(forks, penalised, on, tmp_path):
    """One of two ranks under ZeRO-3 on one process; F = decay·F_earlier + F. Then one that lacks trained weights."""
    first = penalised("full", "zero3")
    given = (f"forgetting.fisher={first}", "forgetting.data=null", "forgetting.samples=512")
    run_dir = forks.freeze(
        tmp_path / "run", *on("full", "single", *given, f"forgetting.earlier={first}/fisher", "forgetting.decay=0.5")
    )
    assert forks.start(run_dir, 1) == [0], last_words(run_dir)
    before, after = kept(first / "fisher", "fisher"), kept(run_dir / "fisher", "fisher")
    assert all(torch.equal(values, 1.5 * before[name]) for name, values in after.items())
    assert steps(run_dir)[0]["loss"] == pytest.approx(steps(first)[0]["loss"], rel=1e-5)
    less = penalised("spectrum", "single")
    given = (f"forgetting.fisher={less}", "forgetting.data=null", "forgetting.samples=512")
    run_dir = forks.freeze(tmp_path / "less", *on("full", "single", *given))
    assert forks.start(run_dir, 1) == [2] and "holds nothing of model." in last_words(run_dir)


def test_general_data_that_left_the_cache_are_prepared_again(forks, on, chat, tmp_path):
    """As long as the Fisher is not measured; from the same files alone."""
    file = tmp_path / "general.jsonl"
    file.write_text("\n".join(chat.read_text().splitlines()[3:40]))
    run_dir = forks.freeze(tmp_path / "run", *on("full", "single", f"forgetting.data={file}"))
    prepared = Path(json.loads((run_dir / "plan.json").read_text())["fisher_data"])
    for left in ("", "x"):
        shutil.rmtree(prepared)
        if left:
            file.write_text("\n".join(file.read_text().splitlines()[:-1]))
        assert (forks.change(run_dir, "train_until=null") == 0) == (not left)
        assert prepared.is_dir() == (not left)
