"""A run that was interrupted ends as if nothing had happened."""

import json

import pytest
from runs import STEPS, events, last_words, metrics, same, state_bytes

CELLS = [(s, e) for s in ("full", "lora", "qlora", "spectrum") for e in ("ddp", "zero2", "zero3")]


@pytest.mark.parametrize(("strategy", "engine"), CELLS)
def test_the_same_bits_after_a_stop(forks, words, untouched, tmp_path, strategy, engine):
    """Dropout included: adapters have it by default, and its random numbers go on as well."""
    expected = untouched(strategy, engine)
    run_dir = forks.freeze(tmp_path / "run", *words(strategy, engine, 'train_until="step 3"'))
    assert forks.start(run_dir) == [75, 75], last_words(run_dir)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    assert not (run_dir / "final").exists()
    manifest = json.loads((run_dir / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["engine"]) == (3, 2, engine)
    assert manifest["strategy"] == strategy and manifest["versions"]["torch"] and manifest["tokens"] > 0
    assert manifest["samples"] == 3 * 4 and "rank-00001.safetensors" in manifest["files"]
    planned = json.loads((run_dir / "plan.json").read_text())["checkpoint_bytes"]
    assert state_bytes(run_dir / "checkpoints" / "step-00000003") == pytest.approx(planned, rel=0.02)
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir) == [0, 0], last_words(run_dir)
    assert [event["step"] for event in events(run_dir, "resume")] == [3]
    same(run_dir, expected)
    assert len(metrics(run_dir)) == STEPS + 1


@pytest.mark.parametrize(
    ("strategy", "engine", "processes", "more"),
    [
        # Sums over four ranks depend on their order, so on the buckets that DDP sends.
        ("full", "ddp", 4, ("train.gradient_checkpointing=true",)),
        ("lora", "zero2", 2, ("train.gradient_accumulation_steps=2", "train.logging_steps=4", "train.bf16=true",
                              "train.dataloader_num_workers=2")),
    ],
)  # fmt: skip
def test_the_same_bits_in_other_settings(forks, words, untouched, tmp_path, strategy, engine, processes, more):
    expected = untouched(strategy, engine, *more, processes=processes)
    run_dir = forks.freeze(
        tmp_path / "run", *words(strategy, engine, *more, 'train_until="step 3"', processes=processes)
    )
    assert forks.start(run_dir, processes) == [75] * processes, last_words(run_dir)
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir, processes) == [0] * processes, last_words(run_dir)
    same(run_dir, expected)
