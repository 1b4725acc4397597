"""Peak memory and time of merging an adapter into a 1B-shaped bfloat16 model: tensor by tensor, and PEFT's way.

    python tests/bench/merge_memory.py [--layers 16] [--folder /tmp/merge]

Each way runs in a process of its own; the baseline is the peak of a process that has imported the same libraries and
done nothing. Both outputs are compared tensor by tensor at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import json, sys, time
from pathlib import Path
import torch
from ftdist import merge
from ftdist.spectrum import reader
base, adapter, out = map(Path, sys.argv[1:4])
started = time.monotonic()
if len(sys.argv) == 4:
    out.mkdir()
    tensors, config = reader.tensors(base), reader.config(base)
    merge.write_model(tensors, out, merge.Adapter(adapter, tensors, config), "auto", 2_000_000_000)
"""
PEFT = """
import json, sys, time
import peft, torch
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
started = time.monotonic()
if len(sys.argv) == 4:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
END = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.monotonic() - started, "peak": int(peak) * 1024}))
"""


def make(folder, layers):
    """A random Llama-3.2-1B-shaped base and a rank-16 adapter on all its linear layers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    some = torch.randn(1 << 24).mul_(0.02).bfloat16()  # drawn once: a billion random numbers take minutes
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(some)):
            flat[start : start + len(some)] = some[: len(flat) - start]
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    adapted.save_pretrained(folder / "adapter")


def measured(script, *words):
    done = subprocess.run([sys.executable, "-c", script + END, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    started = time.monotonic()
    make(folder, options.layers)
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    print(f"base of {size / 2**30:.2f} GiB made in {time.monotonic() - started:.0f} s")
    places = (folder / "base", folder / "adapter")
    for name, script in (("tensor by tensor", OURS), ("PEFT", PEFT)):
        idle = measured(script, *places, folder / "nothing", "idle")["peak"]
        found = measured(script, *places, folder / name.split()[0])
        extra = found["peak"] - idle
        print(f"{name:<17} {found['seconds']:6.1f} s, peak {found['peak'] / 2**30:.2f} GiB, of which the merge "
              f"{extra / 2**30:.2f} GiB = {extra / size:.2f} of the base's size")  # fmt: skip
    from safetensors import safe_open

    worst = 0.0
    theirs = {}
    for file in (folder / "PEFT").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            theirs |= dict.fromkeys(shard.keys(), file)  # noqa: SIM118
    for file in (folder / "tensor").glob("*.safetensors"):
        with safe_open(file, "pt") as ours:
            for key in ours.keys():  # noqa: SIM118
                with safe_open(theirs[key], "pt") as other:
                    a, b = ours.get_tensor(key).float(), other.get_tensor(key).float()
                    worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    print(f"largest difference of a weight between the two, as a share of its tensor's largest: {worst:.2g}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
