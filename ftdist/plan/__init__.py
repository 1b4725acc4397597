"""What would run, worked out from names, shapes and numbers alone: no torch, no GPU."""

from typing import Any, TypedDict


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
    loaded: str  # element type of the weights as they are loaded
    reference: str  # task=dpo: cached, adapter_off, copy or none
    reference_key: str  # of the content that cached log-probabilities depend on
    forgetting: str  # what holds weights near their start, if anything does
    choices: list[str]  # what depends on device and packages, with the reason
    steps_are_a_guess: bool  # from the size of the data, nothing being prepared yet
    # what `forecast.py` adds
    device_peak_bytes: int  # of one rank, in its highest phase
    band_bytes: int  # by which that may be wrong
    host_peak_bytes_per_node: int
    checkpoint_bytes: int  # over all ranks
    disk_bytes: dict[str, int]
    phases: dict[str, dict[str, int]]  # phase -> kind -> bytes of a rank's device
    host_phases: dict[str, dict[str, int]]  # the same of a node's host memory
    states: dict[str, int]  # the model states of a rank between two steps, exact
    hardware: dict[str, Any]
    real_tokens_per_step: int  # about, without padding and room that is left
    tokens_per_second: float  # real ones
    seconds_per_step: float
    step_bound_by: str
    mfu: float
    time_calibrated: bool
    total_seconds: float
    evaluations: int
    evaluation_seconds: float  # of all of them
    checkpoints: int  # that will be written, if nothing stops the run
    cost: float
    asks: dict[str, str]  # cluster=slurm: the job's memory and time
    fits: bool | None  # None: no memory is known to compare with
    margin_bytes: int | None
    scarce: str | None  # device or host
    certain: bool  # the margin is larger than the band
    notes: list[str]
    fixes: list[dict[str, Any]]
    largest_top_percent: int | None  # of Spectrum, that still fits
    measured: dict[str, Any]  # at the end of the run
