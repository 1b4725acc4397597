"""The runs of the test matrix: what each is started with, and how it is read afterwards."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

STRATEGIES = ("full", "lora", "qlora", "spectrum")
# zero3_nvme is not among them: its reads and writes are DeepSpeed's async_io operator, which is built against
# libaio's headers and which DeepSpeed's CPU accelerator does not offer. `test_config.py` has its refusals.
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
# Started as people do, with every process new; the others differ in nothing but the starting.
BY_COMMAND = (("full", "single"), ("lora", "ddp"), ("qlora", "zero3"), ("spectrum", "zero2"))
STEPS = 6
GLOBAL_BATCH = 4  # packed rows; the same in every cell, so that curves can be compared
RATE = 1e-2
OVERRIDES = {
    "full": (),
    "lora": ("strategy.dropout=0",),  # whose random numbers belong to a rank
    "qlora": ("strategy.dropout=0",),
    "spectrum": ("strategy.top_percent=50",),
}


def overrides(strategy, engine, accumulation=1, bf16=False):
    """What a cell adds to the smallest run."""
    processes = 1 if engine == "single" else 2
    micro = GLOBAL_BATCH // processes // accumulation
    assert micro * processes * accumulation == GLOBAL_BATCH
    return (
        f"strategy={strategy}",
        *OVERRIDES[strategy],
        f"train.learning_rate={RATE}",
        f"engine={engine}",
        f"cluster.processes={processes}",
        "cluster.oversubscribe=true",
        f"train.per_device_train_batch_size={micro}",
        f"train.gradient_accumulation_steps={accumulation}",
        f"train.max_steps={STEPS}",
        f"train.bf16={str(bf16).lower()}",
    )


@dataclass(frozen=True)
class Cell:
    """A finished run."""

    run_dir: Path
    seconds: float
    base_untouched: bool  # the model directory's bytes were the same before and after

    @functools.cached_property
    def metrics(self):
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]

    @property
    def steps(self):
        return [row for row in self.metrics if "loss" in row]

    @property
    def losses(self):
        return [row["loss"] for row in self.steps]

    @property
    def held_out(self):
        return [row["eval_loss"] for row in self.metrics if "eval_loss" in row]

    @property
    def plan(self):
        return json.loads((self.run_dir / "plan.json").read_text())
