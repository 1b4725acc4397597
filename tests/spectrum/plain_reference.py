"""The Spectrum algorithm as plainly as it can be written: the peer of the tests and of the benchmark.

The whole model in float32, `torch.linalg.svdvals` of every weight, as the reference tool (QuixiAI/spectrum) does.
As a program: `python plain_reference.py MODEL_DIR OUT.json`; a directory without a config.json is taken as tensors.
"""

import json
import math
import os
import sys


def snr_of(weight):
    import torch

    weight = weight.detach().float()
    if weight.ndim < 2:
        weight = weight[None]
    values = torch.linalg.svdvals(weight)
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
    rows, columns = weight.shape
    threshold = sigma * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    signal = values[values > threshold].sum()
    noise = values[values <= threshold].sum() if bool((values <= threshold).any()) else torch.tensor(1.0)
    return float(signal / noise / values[0]) if noise > 0 else math.inf


def type_of(module):
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])


def scan_tensors(weights):
    """Named tensors -> {module: {snr, type}} for every `.weight`."""
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return {module: {"snr": snr_of(weights[f"{module}.weight"]), "type": type_of(module)} for module in modules}


def selected(scan, percent):
    """The modules that the reference tool writes into its YAML."""
    by_type = {}
    for module, entry in scan.items():
        by_type.setdefault(entry["type"], []).append((module, entry["snr"]))
    found = set()
    for members in by_type.values():
        ranked = sorted(members, key=lambda member: member[1], reverse=True)
        found |= {module for module, _ in ranked[: int(len(ranked) * percent / 100)]}
    return found


def main(model_dir, output):
    import torch

    if not os.path.exists(f"{model_dir}/config.json"):
        from safetensors.torch import load_file

        weights = {name: weight.float() for name, weight in load_file(f"{model_dir}/model.safetensors").items()}
        write(scan_tensors(weights), output)
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, low_cpu_mem_usage=True)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim in (1, 2):
            found[name] = {"snr": snr_of(weight), "type": type_of(name)}
    write(found, output)


def write(found, output):
    with open(output, "w") as stream:
        json.dump(found, stream, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
