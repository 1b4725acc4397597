"""Time of a step from operations, memory traffic and communication; what a run then takes and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftdist.plan.hardware import Hardware
from ftdist.plan.memory import Case, model_states
from ftdist.plan.states import WIDTH, quantized_bytes

DEQUANTISED = 1.35  # a 4-bit weight is made whole before each product; ours, QLoRA beside LoRA on one card
PCIE = 3.2e10  # bytes a second between a device and its host: x16 of generation 4
BAND = 1 / 3  # of a step's time, until the machine is calibrated
ADAM_ON_HOST = (
    30  # bytes a parameter that DeepSpeed's CPU Adam moves: three float32 in and out, gradient in, weight out
)


@dataclass(frozen=True)
class Speed:
    """Seconds and operations of one optimizer step on one rank."""

    compute: float
    memory: float  # optimizer states and weights read and written
    communication: float
    seconds: float
    model_flops: float  # 6·N·tokens and attention, the convention of PaLM's appendix B: no recomputation
    mfu: float
    tokens_per_second: float  # over all ranks
    bound: str


def step(case: Case, hardware: Hardware, tokens_per_step: float, length: float) -> Speed:
    """One optimizer step; what can overlap does, and the slower side counts.

    tokens_per_step: without padding, over all ranks; length: that a micro-batch is padded to.
    """
    tokens = case.batch * length * case.accumulation
    width = WIDTH[case.dtype]
    forward = inputs = weights = 0.0
    counted = 0
    below = not case.adapters  # gradients flow down to the embeddings only if something there is trained
    for h in case.held:
        if len(h.shape) < 2:
            continue
        if "embed" in h.name or ".wte." in h.name or ".wpe." in h.name:
            below = below and h.trained
            if not case.tied:
                continue
        share = 1.0
        if len(h.shape) == 3 and case.experts:
            share = case.experts / h.shape[0]
        slow = DEQUANTISED if h.quantized else 1.0
        forward += 2 * h.numel * share * slow
        inputs += 2 * h.numel * share * slow
        weights += 2 * h.numel * share if h.trained else 0.0
        counted += int(h.numel * share)
    heads = case.family.heads * case.family.head_dim if case.family else case.hidden
    attention = 4 * case.layers * heads * length  # scores and values of one token, the whole square
    recomputed = forward + attention if case.checkpointing else 0.0
    again = forward + attention if case.reference in ("adapter_off", "copy") else 0.0  # the reference's own pass
    flops = tokens * (forward + attention + inputs + 2 * attention + weights + recomputed + again)
    model_flops = tokens * (6.0 * counted + 3 * attention)
    compute = flops / (hardware.flops[case.dtype] * hardware.efficiency)

    made = model_states(case)
    memory = (2 * made.optimizer + case.accumulation * 3 * made.weights) / hardware.bandwidth
    memory += _offloaded(case, hardware, made.optimizer + sum(made.host.values()), width)
    link = hardware.link
    if case.world > case.processes:  # rings leave a node through all its ports
        link = min(link, hardware.network * (hardware.ports or case.processes))
    communication = _traffic(case, width) / link
    overlapped = case.stage in (0, 3) or dict(case.zero).get("overlap_comm", 0)
    seconds = (max(compute, communication) if overlapped else compute + communication) + memory
    bound = max((compute, "compute"), (communication, "communication"), (memory, "memory"))[1]
    peak = hardware.flops[case.dtype]
    return Speed(
        compute=compute,
        memory=memory,
        communication=communication,
        seconds=seconds,
        model_flops=model_flops,
        mfu=model_flops / seconds / peak,
        tokens_per_second=tokens_per_step / seconds,
        bound=bound,
    )


def _offloaded(case: Case, hardware: Hardware, states: int, width: int) -> float:
    """Seconds of a step between a device, its node's memory and its disks; the ranks of a node share the latter two.

    Gradients go down in every micro-batch, weights come up once; offloaded weights come up for each pass.
    """
    if not case.offload_optimizer:
        return 0.0
    trained = sum(h.numel for h in case.held if h.trained) / case.world
    crossing = (case.accumulation + 1) * trained * width
    updating = ADAM_ON_HOST * trained * case.processes / hardware.host_bandwidth
    if case.offload_parameters:
        passes = 3 if case.checkpointing else 2
        crossing += case.accumulation * passes * sum(h.numel for h in case.held) / case.world * width
    swapping = 2 * states * case.processes / hardware.nvme if case.nvme else 0.0
    return crossing / min(hardware.link, PCIE) + max(updating, swapping)


def _traffic(case: Case, width: int) -> float:
    """Bytes that a rank sends in a step: rings move (n − 1)/n of what is gathered or reduced."""
    if case.world == 1:
        return 0.0
    ring = (case.world - 1) / case.world
    trained = sum(h.numel for h in case.held if h.trained)
    if case.stage == 0:
        return 2 * ring * trained * WIDTH[case.trained]
    if case.stage == 2:  # gradients are given away in every micro-batch, weights gathered once
        return (case.accumulation + 1) * ring * trained * width
    if case.stage < 3:
        return 2 * ring * trained * width
    whole = sum(
        quantized_bytes(h.numel, case.storage, case.double_quantization)[0] if h.quantized else h.numel * width
        for h in case.held
    )
    return case.accumulation * ring * (2 * whole + trained * width)  # gathered twice, gradients scattered


@dataclass(frozen=True)
class Duration:
    """A whole run."""

    seconds: float
    cost: float | None


def duration(speed: Speed, steps: int, world: int, price_per_hour: float | None) -> Duration:
    """Of `steps` steps on `world` devices."""
    seconds = steps * speed.seconds
    return Duration(
        seconds, None if price_per_hour is None else math.ceil(100 * seconds / 3600 * world * price_per_hour) / 100
    )
