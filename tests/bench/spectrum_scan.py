"""Spectrum scan: time and peak memory beside a plain implementation, and what each threshold makes of known signal.

    python tests/bench/spectrum_scan.py checkpoint [-n 3]   shapes of Llama-3.2-1B, two layers, random bfloat16 weights
    python tests/bench/spectrum_scan.py matrix [-n 3]       one weight of 4096 × 14336 (an 8B model's down_proj)
    python tests/bench/spectrum_scan.py edge                planted signals: values above each threshold

The peer is `tests/spectrum/plain_reference.py`: the reference tool's algorithm as it stands, the whole model in
float32 and `torch.linalg.svdvals`. Every cell is a process of its own that begins with `import torch`; memory is the
largest sum of resident pages over the process and its children, looked at every 20 ms.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / "tests" / "spectrum" / "plain_reference.py"
OURS = """
import pathlib, sys
from ftdist.spectrum.scan import scan
if __name__ == "__main__":
    scan(model_path=sys.argv[1], output=pathlib.Path(sys.argv[2]), processes=int(sys.argv[3]), device=sys.argv[4],
         threshold="reference", group_experts=True)
"""
IMPORT = "import torch, transformers; transformers.AutoModelForCausalLM"


def write_checkpoint(directory):
    """Random weights in the shapes of Llama-3.2-1B with two of its sixteen layers; embedding and head are one tensor."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def write_matrix(directory):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weight = (torch.randn(4096, 14336) * 0.02).bfloat16()
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, directory / "model.safetensors")


def measured(command, environment, cores=None):
    """(seconds, processor seconds, peak MB) of a command with its children."""
    import psutil

    start, peak = time.monotonic(), 0
    before = os.times()
    bind = (lambda: os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))) if cores else None
    process = subprocess.Popen(command, env=os.environ | environment, preexec_fn=bind, stderr=subprocess.DEVNULL)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in [family, *family.children(recursive=True)]))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.02)
    assert process.returncode == 0, f"{command} ended with status {process.returncode}"
    seconds, after = time.monotonic() - start, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, spent, peak / 2**20


def compare(kind, repeats, device):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'bench')!r}); import spectrum_scan as b, pathlib; "
        code += f"b.write_{kind}(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(model)], check=True, stderr=subprocess.DEVNULL)
        cells = {
            "imports alone": [sys.executable, "-c", IMPORT],
            "plain reference": [sys.executable, str(PLAIN), str(model), f"{folder}/plain.json"],
        }
        for processes in (1, 2):
            cells[f"ours, {processes} processes"] = [
                sys.executable, "-c", OURS, str(model), f"{folder}/ours.json", str(processes), device]  # fmt: skip
        cells["ours, 1 process on 1 core"] = cells["ours, 1 processes"]
        rows = {name: [] for name in cells}
        for _ in range(repeats):
            for name, command in cells.items():
                with tempfile.TemporaryDirectory() as cache:
                    cores = 1 if name.endswith("1 core") else None
                    rows[name].append(measured(command, {"FTDIST_CACHE": cache}, cores))
                    print(f"  {name}: {rows[name][-1][0]:.1f} s", file=sys.stderr)
        report(rows)
        largest_difference(json.loads(Path(f"{folder}/plain.json").read_text()), json.loads(Path(f"{folder}/ours.json").read_text()))


def report(rows):
    middle = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    plain, base = middle["plain reference"], middle["imports alone"][2]
    print(f"{'':28}{'seconds (min … max)':>26}{'cpu s':>9}{'peak MB':>9}{'faster':>9}{'memory':>9}{'above imports':>15}")
    for name, (seconds, spent, peak) in middle.items():
        spread = f"{seconds:.1f} ({min(r[0] for r in rows[name]):.1f} … {max(r[0] for r in rows[name]):.1f})"
        ratios = "" if name == "imports alone" else (
            f"{plain[0] / seconds:>8.1f}x{peak / plain[2]:>9.2f}{(peak - base) / (plain[2] - base):>15.2f}"
        )  # fmt: skip
        print(f"{name:28}{spread:>26}{spent:>9.1f}{peak:>9.0f}{ratios}")
    one, two = middle["ours, 1 process on 1 core"][0], middle["ours, 2 processes"][0]
    print(f"two processes against one, a core each: {one / two:.2f}x;  n={len(rows['plain reference'])}")


def largest_difference(plain, ours):
    shared = [name for name in ours if name in plain]
    worst = max(shared, key=lambda name: abs(ours[name]["snr"] / plain[name]["snr"] - 1))
    print(f"largest relative difference of {len(shared)} SNRs: {abs(ours[worst]['snr'] / plain[worst]['snr'] - 1):.1e} ({worst})")


def edge():
    """Noise of standard deviation 0.02 and eight directions between 1.2 and 4 times its edge."""
    import torch

    from ftdist.spectrum import snr

    torch.manual_seed(0)
    print(f"{'shape':>14}{'planted':>9}{'reference':>11}{'marchenko_pastur':>18}")
    for rows, columns in ((512, 512), (2048, 2048), (512, 2048), (1024, 4096), (256, 8192), (4096, 1024)):
        for planted in (0, 8):
            weight = 0.02 * torch.randn(rows, columns, dtype=torch.float64)
            left = torch.linalg.qr(torch.randn(rows, max(planted, 1), dtype=torch.float64))[0][:, :planted]
            right = torch.linalg.qr(torch.randn(columns, max(planted, 1), dtype=torch.float64))[0][:, :planted]
            strengths = torch.linspace(1.2, 4, planted, dtype=torch.float64)
            weight += (left * strengths * 0.02 * (math.sqrt(rows) + math.sqrt(columns))) @ right.T
            tall = weight if rows >= columns else weight.T
            found = snr.measure(lambda tall=tall: iter([tall]), (rows, columns))
            counts = [found[name]["signal_values"] for name in snr.THRESHOLDS]
            of = min(rows, columns)
            print(f"{f'{rows} × {columns}':>14}{planted:>9}{f'{counts[0]} ({counts[0] / of:.0%})':>11}{counts[1]:>18}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoint", "matrix", "edge"])
    parser.add_argument("-n", type=int, default=3, help="repetitions of every cell")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our scan; the peer uses the CPU")
    given = parser.parse_args()
    edge() if given.what == "edge" else compare(given.what, given.n, given.device)
