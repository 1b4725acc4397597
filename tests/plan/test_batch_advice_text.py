"""The arithmetic is the trainer's; the advice and the text say what they should."""

import numpy as np
import pytest

from ftdist.plan.advice import advice
from ftdist.plan.batch import QUANTILES, batch_arithmetic, filling
from ftdist.plan.text import render

BATCH = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "processes": 8,
    "nodes": 1,
    "max_length": 1024,
    "packing": True,
    "rows": None,
    "num_train_epochs": 1.0,
    "max_steps": -1,
}


def test_tokens_per_step():
    batch = batch_arithmetic(**BATCH)
    assert (batch.sequences_per_step, batch.tokens_per_step) == (64, 65_536)
    assert (batch.steps_per_epoch, batch.total_steps) == (None, None)
    assert batch.arithmetic == [
        "4 micro-batch × 2 accumulation × 8 processes = 64 sequences × 1,024 tokens = 65,536 tokens per step"
    ]
    over_nodes = batch_arithmetic(**{**BATCH, "nodes": 4, "packing": False})
    assert over_nodes.tokens_per_step == 4 * 65_536
    assert "8 processes × 4 nodes = 256 sequences" in over_nodes.arithmetic[0]
    assert over_nodes.arithmetic[0].endswith("at most 262,144 tokens per step (rows are not packed)")


def test_steps():
    batch = batch_arithmetic(**{**BATCH, "rows": 1000, "num_train_epochs": 2.5})
    assert (batch.steps_per_epoch, batch.total_steps) == (16, 40)
    assert batch.arithmetic[1] == "1,000 packed rows / 64 = 16 steps per epoch × 2.5 epochs = 40 steps"
    capped = batch_arithmetic(**{**BATCH, "rows": 1000, "max_steps": 8})
    assert (capped.steps_per_epoch, capped.total_steps) == (16, 8)
    assert capped.arithmetic[1].endswith("train.max_steps=8 is 0.5 epochs")
    assert batch_arithmetic(**{**BATCH, "rows": 3}).total_steps == 1


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 100, 101])
@pytest.mark.parametrize(("micro", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_steps_are_those_of_the_trainer(rows, micro, accumulation, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1.5,
        report_to=[],
    )
    trainer = Trainer(LlamaForCausalLM(tiny), arguments, train_dataset=[{"input_ids": [1]}] * rows)
    _, per_epoch, *_, total = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    ours = batch_arithmetic(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        processes=1,
        nodes=1,
        max_length=8,
        packing=False,
        rows=rows,
        num_train_epochs=1.5,
        max_steps=-1,
    )
    assert (ours.steps_per_epoch, ours.total_steps) == (per_epoch, total)


def report_of(lengths, **more):
    points = np.percentile(lengths, [100 * share for share in QUANTILES.values()])
    return {
        "train_sequences": len(lengths),
        "tokens": int(sum(lengths)),
        "token_lengths": dict(zip(QUANTILES, points, strict=True)),
        **more,
    }


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_rows_are_padded_to_the_longest_of_a_micro_batch(rows):
    random = np.random.default_rng(1)
    lengths = random.gamma(4.0, 40.0, 64_000).astype(int) + 1
    filled = filling(report_of(lengths))
    assert filled.tokens == pytest.approx(lengths.mean())
    longest = random.permutation(lengths).reshape(-1, rows).max(axis=1).mean()
    assert filled.padded(rows) == pytest.approx(longest, rel=0.06)


def test_a_pair_is_two_sequences_of_one_prompt():
    pairs = np.full(100, 10 + 20 + 40)  # prompt, chosen, rejected
    means = {"chosen_tokens_mean": 20.0, "rejected_tokens_mean": 40.0}
    filled = filling(report_of(pairs, preference=means))
    assert filled.tokens == filled.padded(4) == 10 + 30


def ask(**change):
    facts = {"strategy": "lora", "examples": 500, "parameters": 8 * 10**9, "processes": 1, "nodes": 1}
    return advice(**{**facts, "device_bytes": 80 * 2**30, **change})


def test_advice_by_number_of_examples():
    assert "try a good prompt" in ask(examples=99)[0]
    assert ask(examples=100) == ["100 examples: LoRA or QLoRA suits 100 to 1,000"]
    assert "strategy=full can learn so few by heart" in ask(examples=1000, strategy="full")[0]
    assert "enough for full, Spectrum" in ask(examples=1001)[0]
    assert ask(examples=None) == []


def test_advice_by_model_and_machine():
    assert "over 30 B QLoRA" in ask(parameters=70 * 10**9)[1]
    assert len(ask(parameters=70 * 10**9, strategy="qlora")) == 1
    assert "15 GiB of bf16 weights on a 16 GiB card" in ask(device_bytes=16 * 2**30)[1]
    assert len(ask(device_bytes=16 * 2**30, strategy="qlora")) == 1
    assert "16 processes: Spectrum" in ask(strategy="full", examples=None, processes=8, nodes=2)[0]


PLAN = {
    "model": "org/model",
    "model_source": "model.architecture",
    "total_parameters": 8_030_261_248,
    "trainable_parameters": 41_943_040,
    "trainable_by_type": {"self_attn.q_proj": 4_194_304, "mlp.down_proj": 37_748_736},
    "data": ["chat.jsonl"],
    "task": "sft",
    "strategy": "qlora",
    "engine": "ddp",
    "precision": "bfloat16",
    "processes": 8,
    "nodes": 2,
    "devices": "GPU",
    "sequences_per_step": 128,
    "tokens_per_step": 131_072,
    "arithmetic": ["a = b", "c = d"],
    "files": {"config.yaml": "the configuration", "final/": "the adapter"},
    "command": [["accelerate", "launch", "-m", "ftdist.worker", "runs/with space"]],
    "advice": [],
}


def test_text():
    lines = render(PLAN).splitlines()
    assert "model      org/model  8,030,261,248 parameters (model.architecture)" in lines
    assert "strategy   qlora  trains 41,943,040 parameters, 0.52 % of the model" in lines
    assert "             mlp.down_proj            37,748,736" in lines
    assert "engine     ddp, 8 processes on each of 2 nodes" in lines
    assert lines[lines.index("batch      a = b") + 1] == "           c = d"
    assert "writes     config.yaml  the configuration" in lines
    assert "runs       accelerate launch -m ftdist.worker 'runs/with space'" in lines
    assert not any(line.startswith("advice") for line in lines)  # nothing to say, no empty heading
