"""Spectrum scan: time and peak memory beside a plain implementation, and what each threshold makes of known signal.

    python tests/bench/spectrum_scan.py checkpoint    shapes of Llama-3.2-1B, random bfloat16 weights, two layers
    python tests/bench/spectrum_scan.py matrix        one weight of 4096 × 14336 (an 8B model's down_proj)
    python tests/bench/spectrum_scan.py layer         the matrices of one layer of Llama-3.2-1B
    python tests/bench/spectrum_scan.py embedding     its embedding of 128256 × 2048
    python tests/bench/spectrum_scan.py calls         the library calls alone that both make for that checkpoint
    python tests/bench/spectrum_scan.py edge          planted signals: values above each threshold

`checkpoint` takes about nine minutes on two quiet cores; `--only "all cores|2 processes"` and `--only "1 core"` are
its halves.

The peer is `tests/spectrum/plain_reference.py`: the reference tool's algorithm as it stands, the whole model in
float32 and `torch.linalg.svdvals`. Every cell is a process of its own that begins with `import torch`; memory is the
largest sum of resident pages over the process and its children, looked at every 20 ms. "others" is the share of the
machine that other programs used meanwhile: seconds count only where it is small; `--patient` repeats a cell until then.
"""

import argparse
import contextlib
import json
import math
import os
import re
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


def write_checkpoint(directory, layers):
    """Random weights in the shapes of Llama-3.2-1B with some of its sixteen layers; embedding and head are tied."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


SHAPES = {
    "matrix": {"mlp.down_proj": (4096, 14336)},  # of an 8B model
    "embedding": {"embed_tokens": (128256, 2048)},  # this and below: Llama-3.2-1B
    "layer": {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    },
}


def write_shapes(directory, kind):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {
        f"model.layers.0.{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in SHAPES[kind].items()
    }
    save_file(weights, directory / "model.safetensors")


def measured(command, environment, cores):
    """(seconds, processor seconds, peak MB, processor share of other programs) of a command with its children."""
    import psutil

    def busy():
        now = psutil.cpu_times()
        return now.user + now.nice + now.system + now.irq + now.softirq

    own, machine, start, peak = os.times(), busy(), time.monotonic(), 0
    bind = (lambda: os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))) if cores else None
    process = subprocess.Popen(command, env=os.environ | environment, preexec_fn=bind, stderr=subprocess.DEVNULL)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(p.memory_info().rss for p in [family, *family.children(recursive=True)]))
        time.sleep(0.02)
    assert process.returncode == 0, f"{command} ended with status {process.returncode}"
    seconds, after = time.monotonic() - start, os.times()
    spent = after.children_user + after.children_system - own.children_user - own.children_system
    return seconds, spent, peak / 2**20, max(0.0, busy() - machine - spent) / (seconds * os.cpu_count())


def compare(kind, repeats, device, layers, only, patient):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import spectrum_scan, pathlib; "
        write = f"write_checkpoint(folder, {layers})" if kind == "checkpoint" else f"write_shapes(folder, {kind!r})"
        code += f"folder = pathlib.Path(sys.argv[1]); spectrum_scan.{write}"
        subprocess.run([sys.executable, "-c", code, str(model)], check=True, stderr=subprocess.DEVNULL)
        plain = [sys.executable, str(PLAIN), str(model), f"{folder}/plain.json"]
        ours = [sys.executable, "-c", OURS, str(model), f"{folder}/ours.json"]
        cells = {
            "imports alone": ([sys.executable, "-c", IMPORT], None),
            "plain, 1 core": (plain, 1),
            "plain, all cores": (plain, None),
            "ours, 1 process, 1 core": ([*ours, "1", device], 1),
            "ours, 1 process, all cores": ([*ours, "1", device], None),
            "ours, 2 processes": ([*ours, "2", device], None),
        }
        if only:
            cells = {name: cell for name, cell in cells.items() if re.search(f"imports|{only}", name)}
        rows = {name: [] for name in cells}
        for _ in range(repeats):
            for name, (command, cores) in cells.items():
                for _ in range(20 if patient else 1):
                    with tempfile.TemporaryDirectory() as cache:
                        found = measured(command, {"FTDIST_CACHE": cache}, cores)
                    print(
                        f"  {name}: {found[0]:.1f} s, {found[1]:.1f} cpu s, {found[2]:.0f} MB, others {found[3]:.0%}",
                        file=sys.stderr,
                        flush=True,
                    )
                    if found[3] < 0.1:
                        break
                rows[name].append(found)
        report(rows)
        if Path(f"{folder}/plain.json").exists():
            largest_difference(*(json.loads(Path(f"{folder}/{who}.json").read_text()) for who in ("plain", "ours")))


def report(rows):
    middle = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    base = middle["imports alone"][2]
    print(f"{'':28}{'seconds (min … max)':>26}{'cpu s':>9}{'peak MB':>9}{'above imports':>15}{'others':>8}")
    for name, (seconds, spent, peak, others) in middle.items():
        spread = f"{seconds:.1f} ({min(r[0] for r in rows[name]):.1f} … {max(r[0] for r in rows[name]):.1f})"
        print(f"{name:28}{spread:>26}{spent:>9.1f}{peak:>9.0f}{peak - base:>15.0f}{others:>8.0%}")

    def ratio(slow, fast, column=0):
        return middle[slow][column] / middle[fast][column]

    for cores in ("1 core", "all cores"):
        slow, fast = f"plain, {cores}", f"ours, 1 process, {cores}"
        if slow in middle and fast in middle:
            above = (middle[fast][2] - base) / (middle[slow][2] - base)
            print(
                f"ours against plain, 1 process, {cores}: {ratio(slow, fast):.1f}x faster, {ratio(slow, fast, 1):.1f}x "
                f"fewer cpu seconds; peak memory {ratio(fast, slow, 2):.2f}, above the imports {above:.2f}"
            )
    if {"plain, all cores", "ours, 2 processes"} <= middle.keys():
        print(f"all cores to both, ours as processes: {ratio('plain, all cores', 'ours, 2 processes'):.1f}x faster")
    if {"ours, 1 process, 1 core", "ours, 2 processes"} <= middle.keys():
        print(f"two processes against one, a core each: {ratio('ours, 1 process, 1 core', 'ours, 2 processes'):.2f}x")
    print(f"n={len(rows['imports alone'])}, medians")


def largest_difference(plain, ours):
    shared = [name for name in ours if name in plain]
    worst = max(shared, key=lambda name: abs(ours[name]["snr"] / plain[name]["snr"] - 1))
    difference = abs(ours[worst]["snr"] / plain[worst]["snr"] - 1)
    print(f"largest relative difference of {len(shared)} SNRs: {difference:.1e} ({worst})")


def calls(repeats, layers):
    """Processor seconds on one core of what cannot be left out: svdvals in float32; Gram matrix and its eigenvalues.

    No reading, no conversion, no check of the products, no imports.
    """
    import numpy as np
    import torch

    torch.set_num_threads(1)
    shapes = [shape for shape in SHAPES["layer"].values() for _ in range(layers)] + list(SHAPES["embedding"].values())
    random = np.random.default_rng(0)
    middle = {}
    for shape in sorted(set(shapes)):
        weight = random.standard_normal(shape, dtype=np.float32)
        tall = weight if shape[0] >= shape[1] else weight.T
        tall = tall if max(shape) >= 2 * min(shape) else tall.astype(np.float64)
        gram = (tall.T @ tall).astype(np.float64)
        single = torch.from_numpy(weight)
        ways = {
            "svdvals": lambda single=single: torch.linalg.svdvals(single),
            "Gram matrix": lambda tall=tall: tall.T @ tall,
            "its eigenvalues": lambda gram=gram: np.linalg.eigvalsh(gram),
        }
        for name, way in ways.items():
            took = []
            for _ in range(repeats):
                start = time.process_time()
                way()
                took.append(time.process_time() - start)
            middle[shape, name] = statistics.median(took)
            print(f"{shape[0]:>7} × {shape[1]:<6} {shapes.count(shape)} of them, {name:16} "
                  f"{middle[shape, name]:.2f} ({min(took):.2f} … {max(took):.2f})", flush=True)  # fmt: skip
    sums = {name: sum(middle[shape, name] for shape in shapes) for name in ways}
    least = sums["Gram matrix"] + sums["its eigenvalues"]
    print(", ".join(f"{name}: {total:.1f} s" for name, total in sums.items()))
    print(f"svdvals against the other two: {sums['svdvals'] / least:.2f}x; n={repeats}, medians")


def edge():
    """Noise of standard deviation 0.02 and eight directions between 1.2 and 4 times its edge."""
    import torch

    from ftdist.spectrum import names, snr

    torch.manual_seed(0)
    print(f"{'shape':>14}{'planted':>9}{'reference':>13}{'marchenko_pastur':>18}")
    for rows, columns in ((512, 512), (2048, 2048), (512, 2048), (1024, 4096), (256, 8192), (4096, 1024)):
        for planted in (0, 8):
            weight = 0.02 * torch.randn(rows, columns, dtype=torch.float64)
            left = torch.linalg.qr(torch.randn(rows, max(planted, 1), dtype=torch.float64))[0][:, :planted]
            right = torch.linalg.qr(torch.randn(columns, max(planted, 1), dtype=torch.float64))[0][:, :planted]
            strengths = torch.linspace(1.2, 4, planted, dtype=torch.float64)
            weight += (left * strengths * 0.02 * (math.sqrt(rows) + math.sqrt(columns))) @ right.T
            tall = weight if rows >= columns else weight.T
            found = snr.measure(lambda tall=tall: iter([tall]), (rows, columns))
            counts = [found[name]["signal_values"] for name in names.THRESHOLDS]
            of = min(rows, columns)
            print(f"{f'{rows} × {columns}':>14}{planted:>9}{f'{counts[0]} ({counts[0] / of:.0%})':>13}{counts[1]:>18}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoint", *SHAPES, "calls", "edge"])
    parser.add_argument("-n", type=int, default=3, help="repetitions of every cell")
    parser.add_argument("--layers", type=int, default=2, help="of the checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our scan; the peer uses the CPU")
    parser.add_argument("--only", help="an expression: the cells to run, e.g. '1 core' or ours")
    parser.add_argument("--patient", action="store_true", help="repeat a cell while other programs use a tenth or more")
    given = parser.parse_args()
    if given.what == "edge":
        edge()
    elif given.what == "calls":
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = "1"
        calls(given.n, given.layers)
    else:
        compare(given.what, given.n, given.device, given.layers, given.only, given.patient)
