"""How a run of these tests is made, and how two of them are compared bit by bit."""

import json

from safetensors import safe_open

from ftdist.doctor import MEASURED

STEPS = 6
BASE = (
    "train.learning_rate=1e-2",
    "cluster.oversubscribe=true",
    f"train.max_steps={STEPS}",
    "eval.samples=0",
    "checkpoint.every_minutes=null",
)


def last_words(run_dir):
    return "\n".join(f.read_text()[-1500:] for f in sorted((run_dir / "logs").glob("rank-*")) if f.is_file())


def metrics(run_dir):
    """The lines of metrics.jsonl without what was measured on the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def events(run_dir, name):
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
    return [row for row in rows if row["event"] == name]


def state_bytes(checkpoint):
    """Of the tensors in a checkpoint's files, random numbers left out."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys() if not name.startswith("random|"))  # noqa: SIM118
    return total


def weights(run_dir):
    return {f.name: f.read_bytes() for f in sorted((run_dir / "final").glob("*.safetensors"))}


def same(run_dir, other):
    """The same losses, rates, norms and token counts in every step, and the same bits in the end."""
    assert metrics(run_dir) == metrics(other)
    assert weights(run_dir) == weights(other) and weights(other)
