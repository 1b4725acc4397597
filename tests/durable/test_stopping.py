"""Early stopping, the best step restored, replay, retention, a schedule that follows a metric: exact over a stop."""

import json
import random

import pytest
import torch
from runs import events, last_words, metrics, same, weights
from safetensors.torch import load_file
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ftdist import schedule
from ftdist.errors import UserError
from ftdist.judge import PLATEAUS

WORDS = [a + b for a in ("am", "bir", "ced", "du", "em", "fjo", "gro") for b in ("ber", "ch", "ar", "ne", "rd", "ve")]

# The highest held-out loss is called the best: that of the first evaluation, and training ends two later.
FIRST_IS_BEST = ("train.max_steps=12", "train.eval_strategy=steps", "train.eval_steps=2", "train.logging_steps=2",
                 "stopping.direction=max", "stopping.patience=2", "stopping.restore_best=true",
                 "checkpoint.keep_last=1", "train.lr_scheduler_type=reduce_lr_on_plateau",
                 "+train.lr_scheduler_kwargs={factor: 0.5, patience: 0}", "eval.retention_during=true")  # fmt: skip

CELLS = [
    ("lora", "ddp", 3, ("strategy.dropout=0.3",)),
    ("full", "zero2", 2, ("model.dropout=0.2",)),  # a stop that an evaluation is due at
    ("spectrum", "zero3", 3, ("train.label_smoothing_factor=0.1",)),
]


@pytest.fixture(scope="session")
def general(tmp_path_factory):
    """Overrides: two files of made-up sentences, one to replay and one to keep."""
    folder, chance = tmp_path_factory.mktemp("general"), random.Random(0)
    for name in ("replay", "keep"):
        lines = [json.dumps({"text": " ".join(chance.choices(WORDS, k=16))}) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return (
        f"data.replay={folder}/replay.jsonl",
        "data.replay_share=0.25",
        f"eval.retention={{words: {folder}/keep.jsonl}}",
    )


@pytest.mark.parametrize(("strategy", "engine", "at", "more"), CELLS, ids=[cell[1] for cell in CELLS])
def test_the_same_end_after_a_stop(forks, words, untouched, general, tmp_path, strategy, engine, at, more):
    expected = untouched(strategy, engine, *FIRST_IS_BEST, *general, *more)
    outcome = json.loads((expected / "outcome.json").read_text())
    assert (outcome["step"], outcome["final_step"]) == (6, 2) and "has not improved in 2" in outcome["ended_early"]
    assert [event["step"] for event in events(expected, "early-stop")] == [6]
    assert [event["step"] for event in events(expected, "best-restored")] == [2]
    trained = [row for row in metrics(expected) if "loss" in row]
    assert [row["learning_rate"] for row in trained] == [0.01, 0.01, 0.005]  # logged before the evaluation halves it
    assert all("loss_general" in row for row in trained) and any(row["loss_general"] for row in trained)
    base, *held_out = [row for row in metrics(expected) if "eval_retention_words_loss" in row]
    assert base["step"] == 0 and "eval_loss" not in base and [row["step"] for row in held_out] == [2, 4, 6]
    for row in held_out:
        rise = row["eval_retention_words_loss"] / base["eval_retention_words_loss"] - 1
        assert row["eval_retention_words_change"] == pytest.approx(rise)

    stopped = forks.freeze(
        tmp_path / "run", *words(strategy, engine, *FIRST_IS_BEST, *general, *more, f'train_until="step {at}"')
    )
    assert forks.start(stopped) == [75, 75], last_words(stopped)
    manifest = json.loads((stopped / "checkpoints" / f"step-{at:08d}" / "manifest.json").read_text())
    assert manifest["evaluation_pending"] == (at == 2) and manifest["judge"]["base"]
    assert forks.change(stopped, "train_until=null") == 0
    assert forks.start(stopped) == [0, 0], last_words(stopped)
    same(stopped, expected)
    assert json.loads((stopped / "outcome.json").read_text()) == outcome

    short = ("train.max_steps=2", "stopping.restore_best=false", "stopping.patience=null")
    two = untouched(strategy, engine, *FIRST_IS_BEST, *general, *more, *short)
    assert weights(two) == weights(expected)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_norms_and_biases_do_not_decay(words, untouched, model, engine):
    """One step with decay and one without, from the same gradients: what differs is rate · decay · weight."""
    step = ("train.max_steps=1", "train.eval_strategy=no")
    plain, decayed = (
        load_file(untouched("full", engine, *step, *decay) / "final" / "model.safetensors")
        for decay in ((), ("train.weight_decay=0.5",))
    )
    start = load_file(model / "model.safetensors")
    assert any("norm" in name for name in start)
    for name, weight in start.items():
        difference = plain[name] - decayed[name]
        if "norm" in name:
            assert not difference.any(), name
        else:
            assert (difference - 0.01 * 0.5 * weight).abs().max() < 1e-6, name


KEYWORDS = {"warmup_stable_decay": {"num_decay_steps": 3}, "cosine_with_min_lr": {"min_lr": 1e-5},
            "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keywords", "words"),
    [("cosine", {"bogus": 2}, "{'bogus': 2}: .*cosine takes no bogus; it takes num_cycles"),
     ("linear", {"num_cycles": 2}, ".*takes no num_cycles; it takes none"),
     ("reduce_lr_on_plateau", {"factor": 2}, "{'factor': 2}: .*Factor should be < 1.0.*patience"),
     ("cosine_with_min_lr", {}, "{}: .*min_lr"),
     ("warmup_stable_decay", {}, "{}: .*num_decay_steps")],
)  # fmt: skip
def test_keywords_of_a_schedule_are_refused_before_anything_is_launched(name, keywords, words):
    schedule.check("cosine", {}, 0.1)
    schedule.check("greedy", {"patience": 2}, 0.1)
    with pytest.raises(UserError, match=rf"train\.lr_scheduler_kwargs={words}"):
        schedule.check(name, keywords, 0.1)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_goes_on_from_its_state(name):
    """As a checkpoint holds it: JSON, and the rate of the parameter groups."""

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        keywords = {
            "num_warmup_steps": 2,
            "num_training_steps": 12,
            "scheduler_specific_kwargs": KEYWORDS.get(name, {}),
        }
        return optimizer, get_scheduler(name, optimizer, **keywords)

    def rates(optimizer, schedule, steps):
        for i in steps:
            optimizer.step()
            schedule.step(*([1.0 + i] if name in PLATEAUS else []))
            yield optimizer.param_groups[0]["lr"]

    wanted = list(rates(*made(), range(30)))
    optimizer, schedule = made()
    got = list(rates(optimizer, schedule, range(15)))
    state, rate = json.loads(json.dumps(schedule.state_dict())), optimizer.param_groups[0]["lr"]
    optimizer, schedule = made()
    schedule.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = rate
    assert got + list(rates(optimizer, schedule, range(15, 30))) == wanted
    assert len(set(wanted)) > 1 or name == "constant"
