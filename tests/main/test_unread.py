"""Keys that fit their types and that nothing reads beside the others: one line with the key, its value and the fix."""

import copy
import json

import pytest

from ftdist import compose, job
from ftdist.errors import UserError

NEVER = {"train.eval_strategy": "no"}
DPO = ("task=dpo", "strategy=lora")
EWC = ("forgetting=ewc",)
BASES = {  # words, and values besides
    "sft": ((), {}),
    "never": ((), NEVER),
    "general": ((), {"eval.retention": "x"}),
    "retained": ((), {"eval.retention": "x"} | NEVER),
    "plateau": ((), {"train.lr_scheduler_type": "reduce_lr_on_plateau", "train.warmup_steps": 0}),
    "constant": ((), {"train.lr_scheduler_type": "constant"}),
    "dpo": (DPO, {}),
    "sft loss": (DPO, {"task.loss_type": ["sft"]}),
    "no reference": (DPO, {"task.reference": "none"}),
    "other reference": (DPO, {"task.reference_model": "x"}),
    "ewc": (EWC, {"forgetting.data": "x"}),
    "given": (EWC, {"forgetting.fisher": "x"}),
}


@pytest.fixture(scope="module")
def config():
    """`config(base, {key: value})`: a configuration of a base with these values."""
    made = {}

    def config(base, values=()):
        words, own = BASES[base]
        if words not in made:
            (made[words],) = compose.compose("plan", ["model.path=x", "data.path=y", *words])
        found = copy.deepcopy(made[words])
        for name, value in (own | dict(values)).items():
            group, key = name.split(".")
            found[group][key] = value
        return found

    return config


@pytest.mark.parametrize(
    ("base", "key", "value", "said"),
    [
        ("never", "eval.during", 5, "train.eval_strategy=steps"),
        ("retained", "eval.retention_during", True, "train.eval_strategy=steps"),
        ("never", "stopping.metric", "loss", "nothing is evaluated"),
        ("never", "stopping.direction", "min", "nothing is evaluated"),
        ("never", "stopping.overfitting_after", 5, "nothing is evaluated"),
        ("never", "stopping.overfitting_rise", 0.1, "nothing is evaluated"),
        ("never", "checkpoint.keep_best", 1, "nothing is evaluated"),
        ("never", "train.eval_steps", 5, "nothing is evaluated"),
        ("sft", "train.eval_steps", 5, "not read with train.eval_strategy=epoch"),
        ("general", "stopping.max_forgetting", 0.1, "nothing asks for that; set stopping.restore_best=true"),
        ("sft", "stopping.metric", "loss", "nothing asks for that; set stopping.restore_best=true"),
        ("sft", "stopping.direction", "min", "nothing asks for that; set stopping.restore_best=true"),
        ("sft", "stopping.min_delta", 0.1, "stopping.patience"),
        ("plateau", "train.warmup_steps", 10, "set train.warmup_steps=0"),
        ("constant", "train.warmup_steps", 0.1, "constant_with_warmup"),
        ("constant", "train.lr_scheduler_kwargs", {"a": 1}, "takes none"),
        ("plateau", "train.lr_scheduler_kwargs", {"mode": "min"}, "stopping.direction"),
        ("sft", "data.replay_repeats", 3, "set data.replay=FILE"),
        ("sft", "eval.retention_overlap", "warn", "set eval.retention=FILE"),
        ("dpo", "data.mask", "all", "leave it out"),
        ("sft loss", "task.beta", 0.3, "task.loss_type=sft"),
        ("dpo", "strategy.dropout", 0.1, "task.disable_dropout=false"),
        ("no reference", "task.chosen_drop", 2.0, "leave it out"),
        ("other reference", "task.chosen_drop", 2.0, "leave it out"),
        ("ewc", "forgetting.decay", 0.5, "set forgetting.earlier=RUN"),
        ("given", "forgetting.samples", 8, "forgetting.data=FILE"),
        ("given", "forgetting.batch", 2, "forgetting.data=FILE"),
    ],
)
def test_refused(config, base, key, value, said):
    job.check(config(base))
    with pytest.raises(UserError) as failure:
        job.check(config(base, {key: value}))
    text = str(failure.value)
    assert text.startswith(f"{key}={value}: ") and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("base", "values"),
    [
        ("sft", {"stopping.min_delta": 0.1, "stopping.patience": 2}),
        ("sft", {"eval.during": 5, "stopping.overfitting_after": 5, "train.warmup_steps": 7}),
        ("never", {"stopping.overfitting_after": None}),
        ("constant", {"train.warmup_steps": 0}),
        ("dpo", {"strategy.dropout": 0.2, "task.disable_dropout": False}),
        ("dpo", {"strategy.dropout": 0.0}),
        ("dpo", {"task.beta": 0.3, "task.chosen_drop": 2.0}),
        ("sft loss", {"task.beta": 0.3, "task.loss_type": ["sft", "odds"]}),
        ("ewc", {"forgetting.decay": 0.5, "forgetting.earlier": "x", "forgetting.samples": 8}),
    ],
)
def test_read(config, base, values):
    job.check(config(base, values))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("base", "key", "inside"),
    [("dpo", "task.beta", False), ("dpo", "task.loss_weights", True), ("dpo", "task.margin", False),
     ("dpo", "task.chosen_drop", False), ("sft", "stopping.min_delta", False),
     ("sft", "stopping.max_forgetting", False),
     ("sft", "stopping.overfitting_rise", False)],
)  # fmt: skip
def test_what_is_no_number_is_no_value(config, base, key, inside, value):
    with pytest.raises(UserError, match=f"{key}=.*finite"):
        job.check(config(base, {key: [value] if inside else value}))


def test_without_a_held_out_row_the_reason_is_said(small, tmp_path):
    """Known when the data are prepared; what was asked of evaluations cannot be then."""
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) for i in range(8)))
    keys = (
        "data.validation_share=0",
        f"data.path={file}",
        "train.packing=false",
        "train.eval_strategy=steps",
        "train.eval_steps=5",
    )
    (config,) = compose.compose("train", [*small, *keys, "stopping.overfitting_after=5", f"run_dir={tmp_path / 'run'}"])
    job.decide(config)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"no row is held out .*stopping.overfitting_after=5"):
        job.freeze(config, tmp_path / "run")
