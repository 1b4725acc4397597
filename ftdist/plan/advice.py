"""Which method suits the data, the model and the machine. Advice only: it never changes the configuration."""

from __future__ import annotations

_FEW, _SOME = 100, 1_000  # examples
_LARGE = 30_000_000_000  # parameters
_WEIGHTS_SHARE = 0.6  # of a card's memory for bf16 weights, the rest for activations and states


def advice(
    *,
    strategy: str,
    examples: int | None,
    parameters: int,
    processes: int,
    nodes: int,
    device_bytes: int | None,
) -> list[str]:
    """Lines of advice. `processes` per node; `device_bytes` of one accelerator, None without one."""
    lines = []
    adapters = strategy in ("lora", "qlora")
    if examples is not None and examples < _FEW:
        lines.append(f"{examples:,} examples: fewer than {_FEW}; first try a good prompt with some of them in it")
    elif examples is not None and examples <= _SOME:
        line = f"{examples:,} examples: LoRA or QLoRA suits {_FEW} to {_SOME:,}"
        lines.append(line if adapters else f"{line}; strategy={strategy} can learn so few by heart (strategy=lora)")
    elif examples is not None:
        lines.append(f"{examples:,} examples: enough for full, Spectrum, or Spectrum with a quantised base")

    if parameters > _LARGE and strategy != "qlora":
        lines.append(f"{parameters / 1e9:.0f} B parameters: over 30 B QLoRA needs the fewest cards (strategy=qlora)")
    elif (
        device_bytes
        and 2 * parameters > _WEIGHTS_SHARE * device_bytes
        and processes * nodes == 1
        and strategy != "qlora"
    ):
        lines.append(
            f"{2 * parameters / 2**30:.0f} GiB of bf16 weights on a {device_bytes / 2**30:.0f} GiB card: "
            "QLoRA loads them in a quarter (strategy=qlora)"
        )
    if processes * nodes > 1 and strategy == "full":
        lines.append(
            f"{processes * nodes} processes: Spectrum trains the most informative layers only, with less "
            "memory and traffic between them (strategy=spectrum)"
        )
    return lines
