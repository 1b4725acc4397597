"""Which step is the best, when training ends, since when it overfits: the judge alone."""

import json
import math

import pytest
import yaml
from test_loss import CONF

from ftdist import judge
from ftdist.errors import UserError
from ftdist.judge import Judge

DEFAULTS = yaml.safe_load((CONF / "stopping" / "default.yaml").read_text())


def new(**keys):
    return Judge(**DEFAULTS | keys)


def told(made, values, metric="eval_loss"):
    """Verdicts of one evaluation after another."""
    return [made.evaluated(10 * (i + 1), {"eval_loss": 1.0, metric: value}) for i, value in enumerate(values)]


def test_patience_and_the_least_change():
    made = new(patience=3, min_delta=0.05)
    values = [2.0, 1.9, 1.88, 1.86, 1.84, 1.84, 1.83, 1.82]
    verdicts = told(made, values)
    assert [bool(v.stop) for v in verdicts] == [False] * 7 + [True]  # 1.84 is 0.06 below 1.9; three in a row after it
    assert [v.best for v in verdicts] == [True, True, True, True, True, False, True, True]  # any lower value is
    assert made.memory.best_step == 80 and "at step 80" in verdicts[-1].stop


@pytest.mark.parametrize(("metric", "direction"), [("eval_exact_match", "auto"), ("eval_oddity", "max")])
def test_higher_is_better(metric, direction):
    made = new(metric=metric, direction=direction, patience=2)
    verdicts = told(made, [0.1, 0.5, 0.4, 0.5], metric)
    assert [v.best for v in verdicts] == [True, True, False, False] and verdicts[-1].stop
    assert made.memory.best_step == 20 and "0.5 at step 20" in verdicts[-1].stop


def test_a_value_of_training():
    made = new(metric="grad_norm")
    made.trained({"loss": 1.0, "grad_norm": 3.0})
    assert made.evaluated(1, {"eval_loss": 1.0}).score == 3.0
    with pytest.raises(UserError, match=r"stopping\.metric=eval_los: not recorded.*eval_loss"):
        new(metric="eval_los", direction="min").evaluated(1, {"eval_loss": 1.0})


def test_a_value_of_training_that_is_not_logged_yet():
    """The step does not count, and patience does not wait for it."""
    made = new(metric="grad_norm", patience=1)
    verdicts = [made.evaluated(step, {"eval_loss": 1.0}) for step in (1, 2)]
    assert all((v.score, v.stop) == (None, None) and "has not been logged yet" in v.why_not for v in verdicts)
    made.trained({"loss": 1.0, "grad_norm": 3.0})
    assert made.evaluated(3, {"eval_loss": 1.0}).best


def test_nan_is_never_the_best():
    made = new(patience=2)
    verdicts = told(made, [1.0, math.nan, math.nan])
    assert [v.best for v in verdicts] == [True, False, False] and verdicts[-1].stop and made.memory.best_step == 10


def test_the_best_among_those_that_keep_what_they_knew():
    made = new(max_forgetting=0.05)
    made.memory.base = {"eval_retention_a_loss": 2.0, "eval_retention_b_loss": 4.0}
    steps = [(3.0, 2.0, 4.0), (2.0, 2.09, 4.1), (1.0, 2.0, 4.3), (1.5, 2.11, 4.0), (1.9, 2.1, 4.2)]
    verdicts = [
        made.evaluated(i, {"eval_loss": loss, "eval_retention_a_loss": a, "eval_retention_b_loss": b})
        for i, (loss, a, b) in enumerate(steps, 1)
    ]
    assert [v.best for v in verdicts] == [True, True, False, False, True]
    assert [v.score for v in verdicts] == [3.0, 2.0, None, None, 1.9]
    assert "retention_b" in verdicts[2].why_not and "+7.50%" in verdicts[2].why_not
    assert "retention_a" in verdicts[3].why_not and made.memory.best_step == 5
    nan = made.evaluated(6, {"eval_loss": 0.1, "eval_retention_a_loss": math.nan, "eval_retention_b_loss": 4.0})
    assert nan.score is None and "retention_a" in nan.why_not


@pytest.mark.parametrize(
    ("training", "held_out", "since"),
    [
        ([3.0, 2.5, 2.0, 1.5, 1.0], [3.0, 2.8, 2.9, 2.95, 3.0], [None, None, None, None, 20]),
        ([3.0, 2.5, 2.6, 2.7, 2.8], [3.0, 2.8, 2.9, 2.95, 3.0], [None] * 5),  # training did not fall: it diverges
        ([3.0, 2.5, 2.0, 1.5, 1.0], [3.0, 2.8, 2.81, 2.82, 2.82], [None] * 5),  # less than 1 % is noise
        ([3.0, 2.5, 2.0, 1.5, 1.0, 0.9], [3.0, 2.8, 2.9, 2.8, 2.9, 2.9], [None] * 6),  # not in a row
    ],
    ids=["overfits", "diverges", "noise", "interrupted"],
)
def test_overfitting(training, held_out, since):
    made, found = new(), []
    for i, (loss, value) in enumerate(zip(training, held_out, strict=True), 1):
        made.trained({"loss": 99.0, "loss_target": loss + 0.1})
        made.trained({"loss": 99.0, "loss_target": loss - 0.1})
        found.append(made.evaluated(10 * i, {"eval_loss": value}).overfitting)
    assert found == since


def test_it_goes_on_from_its_state():
    """Through JSON, in the middle, with the same verdicts."""
    values = [2.0, 1.5, 1.7, 1.8, 1.9, 2.0]

    def verdicts(cut):
        made, found = new(patience=4), []
        for i, value in enumerate(values):
            made.trained({"loss": 5.0 - i})
            if i == cut:
                state = json.loads(json.dumps(made.state()))
                made = new(patience=4)
                made.load(state)
            found.append(made.evaluated(i, {"eval_loss": value}))
        return found

    assert all(verdicts(cut) == verdicts(None) for cut in range(len(values)))
    assert verdicts(None)[-1].stop and verdicts(None)[4].overfitting == 1


USUAL = {"eval_strategy": "steps", "schedule": "cosine", "logging_steps": 1, "eval_steps": 5, "retention": (),
         "replay": False, "saves": True, "held_out": ["loss", "perplexity", "chrf"], "training": ()}  # fmt: skip
PAIRS = {"held_out": ["loss", "rewards/margins"], "training": ["rewards/margins"]}


@pytest.mark.parametrize(
    ("keys", "facts", "words"),
    [
        ({"metric": "eval_los"}, {}, r"stopping\.metric=eval_los: not recorded by this run; did you mean eval_loss"),
        ({"metric": "eval_bleu"}, {}, r"stopping\.metric=eval_bleu: not recorded"),
        ({"metric": "eval_retention_a_loss"}, {}, r"stopping\.metric=eval_retention_a_loss: not recorded"),
        ({"patience": 2}, {"eval_strategy": "no"}, r"stopping\.patience=2: nothing is evaluated.*train\.eval_strategy"),
        ({"restore_best": True}, {"eval_strategy": "no"}, r"stopping\.restore_best=True: nothing is evaluated"),
        ({"restore_best": True}, {"saves": False}, r"stopping\.restore_best=true: engine=zero3_nvme"),
        ({"max_forgetting": 0.1}, {}, r"stopping\.max_forgetting=0\.1: of what\?.*eval\.retention"),
        ({}, {"schedule": "reduce_lr_on_plateau", "eval_strategy": "no"}, r"reduce_lr_on_plateau: nothing is eval"),
        ({"metric": "loss"}, {"schedule": "reduce_lr_on_plateau"}, r"follows an evaluation, and stopping\.metric=loss"),
        ({"metric": "learning_rate"}, {}, r"stopping\.metric=learning_rate: is a lower or a higher value better\?"),
        ({"metric": "eval_perplexity"}, PAIRS, r"stopping\.metric=eval_perplexity: not recorded"),
        ({"metric": "foo/loss"}, {}, r"stopping\.metric=foo/loss: not recorded"),
        ({"metric": "loss_general"}, {}, r"stopping\.metric=loss_general: not recorded"),
        ({"metric": "eval_retention_typo_loss"}, {"retention": ["retention_news"]}, r"mean eval_retention_news_loss"),
        ({"metric": "eval_retention_loss"}, {"retention": ["retention_news"]}, r"eval_retention_loss: not recorded"),
        ({"metric": "loss"}, {"logging_steps": 10}, r"logged every 10 steps and judged every 5"),
    ],
)
def test_refused(keys, facts, words):
    with pytest.raises(UserError, match=words):
        judge.check(DEFAULTS | keys, **USUAL | facts)


@pytest.mark.parametrize(
    ("metric", "facts"),
    [
        *((name, {}) for name in ("loss", "grad_norm", "eval_perplexity", "eval_chrf")),
        *((name, PAIRS) for name in ("eval_rewards/margins", "rewards/margins")),
        ("loss_general", {"replay": True}),
        ("eval_retention_change", {"retention": ["retention"]}),
        ("eval_retention_loss", {"retention": ["retention_a", "retention_b"]}),
    ],
)
def test_allowed(metric, facts):
    judge.check(DEFAULTS | {"metric": metric}, **USUAL | facts)


def test_a_nan_does_not_end_the_watch_for_overfitting():
    made = new(patience=None)
    verdicts = []
    for step, value in enumerate([math.nan, 1.0, 1.2, 1.4, 1.6, 1.8]):
        made.trained({"loss": 5.0 - step})
        verdicts.append(made.evaluated(step, {"eval_loss": value}))
    assert [v.overfitting for v in verdicts if v.overfitting is not None] == [1]
