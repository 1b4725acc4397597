"""Host memory while a model is loaded: PSS (pages that processes share count once) of 1, 2 and 4 ranks of one node that
load the same directory at the same time, as a multiple of the model's bytes.

    python tests/bench/loading.py                  whole weights, as they are stored, and in 4 bit (QLoRA)
    python tests/bench/loading.py --ranks 1 2 --hidden 512 --layers 12

`held`: when every rank has its model; `peak`: the highest sum that was seen on the way (50 looks a second). What a rank
had before it loaded (the libraries) is taken off. The model is float32 unless --stored says otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def pss(pid: int) -> tuple[int, int]:
    """Bytes of a process: proportional share, and the anonymous part of it."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) << 10
    return found["Pss"], found["Pss_Anon"]


def rank(path: str, bits: int, dtype: str, gate: Any, pipe: Any) -> None:
    """One rank: imports, waits for the others, loads, waits until it was looked at."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  (what the class brings in is no weight)

    from ftdist import imports, models

    imports.bitsandbytes()
    torch.set_num_threads(1)
    quantization = None
    if bits == 4:
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    pipe.send("ready")
    gate.wait()
    model = models.load(
        path=path, revision=None, dtype="auto", attn_implementation="sdpa", trust_remote_code=False,
        quantization=quantization, loaded_dtype=dtype,
    )  # fmt: skip
    total = 0.0
    for parameter in model.parameters():  # every page is read, as training would
        total += float(parameter.detach().float().sum())
    pipe.send(total)
    pipe.recv()


def measured(path: str, ranks: int, bits: int, dtype: str) -> tuple[int, int, int]:
    """Bytes over all ranks, above what they had before: held, held without the shared file pages, peak."""
    gate = multiprocessing.Event()
    pipes = [multiprocessing.Pipe() for _ in range(ranks)]
    children = [multiprocessing.Process(target=rank, args=(path, bits, dtype, gate, end)) for _, end in pipes]
    for child in children:
        child.start()
    for own, _ in pipes:
        assert own.recv() == "ready"

    def now() -> tuple[int, int]:
        parts = [pss(child.pid or 0) for child in children]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    before = now()
    gate.set()
    peak = 0
    while not all(own.poll() for own, _ in pipes):
        peak = max(peak, now()[0])
        time.sleep(0.02)
    held = now()
    for own, _ in pipes:
        own.send("end")
    for child in children:
        child.join()
    return held[0] - before[0], held[1] - before[1], max(peak, held[0]) - before[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", default="float32")
    given = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        maker = multiprocessing.Process(target=make, args=(scratch, given.hidden, given.layers, given.stored))
        maker.start()
        maker.join()
        size = sum(file.stat().st_size for file in Path(scratch).glob("*.safetensors"))
        print(f"{size / 1e6:.0f} MB on disk, {given.stored}; Python {sys.version.split()[0]}")
        print("| load | ranks | held | of it a rank's own | peak |\n|---|---:|---:|---:|---:|")
        other = "bfloat16" if given.stored == "float32" else "float32"
        for name, bits, dtype in (("as stored", 16, given.stored), (f"as {other}", 16, other),
                                  ("4 bit", 4, given.stored)):  # fmt: skip
            for ranks in given.ranks:
                held, own, peak = measured(scratch, ranks, bits, dtype)
                print(
                    f"| {name} | {ranks} | {held / size:.2f} × | {own / size:.2f} × | {peak / size:.2f} × |", flush=True
                )


def make(folder: str, hidden: int, layers: int, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


if __name__ == "__main__":
    main()
