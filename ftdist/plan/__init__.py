"""What would run, worked out from names, shapes and numbers alone: no torch, no GPU."""

from typing import TypedDict


class _Always(TypedDict):
    model: str  # path or hub id
    model_source: str  # where its shapes come from
    total_parameters: int
    trainable_parameters: int
    trainable_by_type: dict[str, int]  # type of module (`mlp.down_proj`) -> trained parameters
    data: list[str]  # what is trained on, one entry a source
    task: str
    strategy: str
    engine: str
    precision: str
    processes: int  # per node
    nodes: int
    devices: str  # what a process runs on, in words
    sequences_per_step: int
    tokens_per_step: int
    arithmetic: list[str]
    files: dict[str, str]  # file in the run directory -> what it holds
    command: list[list[str]]  # argument vectors, in order
    advice: list[str]


class Plan(_Always, total=False):
    """The plan of a run: `ftdist plan --json` prints it, `plan.json` in the run directory keeps it."""

    steps_per_epoch: int  # once the number of rows is known
    total_steps: int
