"""The scan of whole checkpoints: same numbers and sets as the reference, shared, resumed, cached."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import plain_reference
import pytest
import torch
from architectures import LAYERS
from safetensors.torch import load_file, save_file

from ftdist.errors import UserError
from ftdist.spectrum import reader, scan, verb, work
from ftdist.spectrum.select import load_scan, select

DENSE = ["llama", "tied", "phi3", "biased"]


def run(model, output, **changes):
    keys = {"processes": 1, "device": "cpu", "threshold": "reference", "group_experts": True} | changes
    return scan.scan(model_path=str(model), output=output, **keys)


def weights_of(model):
    return load_file(model / "model.safetensors")


def module_names(selection):
    return {module for modules in selection.modules.values() for module in modules}


@pytest.mark.parametrize("kind", [*DENSE, "mixtral"])
def test_snr_and_selection_equal_the_reference(kind, checkpoint, tmp_path):
    found = load_scan(run(checkpoint(kind), tmp_path / "snr.json", group_experts=False))
    plain = plain_reference.scan_tensors(weights_of(checkpoint(kind)))
    assert {entry.module: entry.type for entry in found.entries} == {m: e["type"] for m, e in plain.items()}
    for entry in found.entries:
        assert entry.snr == pytest.approx(plain[entry.module]["snr"], rel=1e-5), entry.module
    shapes = verb.disk_shapes(checkpoint(kind))
    for percent in (10, 25, 50, 75):
        chosen = select(
            scan=found, shapes=shapes, top_percent=percent, types="all", embeddings=True, head=True, norms=True,
            trainable_budget=None,
        )  # fmt: skip
        assert module_names(chosen) == plain_reference.selected(plain, percent)
        assert len(module_names(chosen)) >= LAYERS * percent // 100 * 4


def test_experts_are_one_type_by_default(checkpoint, tmp_path):
    found = load_scan(run(checkpoint("mixtral"), tmp_path / "snr.json"))
    experts = [entry for entry in found.entries if ".experts." in entry.module]
    assert len(experts) == LAYERS * 3 * 3
    assert {entry.type for entry in experts} == {f"block_sparse_moe.experts.{part}" for part in ("w1", "w2", "w3")}


def test_stacked_experts_are_measured_one_by_one(checkpoint, tmp_path):
    path = run(checkpoint("stacked"), tmp_path / "snr.json")
    entries, weights = json.loads(path.read_text()), weights_of(checkpoint("stacked"))
    name = "model.layers.2.mlp.experts.gate_up_proj"
    plain = [plain_reference.snr_of(matrix) for matrix in weights[name]]
    assert entries[name]["experts"] == pytest.approx(plain, rel=1e-5)
    assert entries[name]["snr"] == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    assert entries[name]["type"] == "mlp.experts.gate_up_proj"
    assert not [entry for entry in entries if "bias" in entry or "sinks" in entry]


def test_published_keys_of_an_entry(checkpoint, tmp_path):
    entries = json.loads(run(checkpoint("llama"), tmp_path / "deep" / "snr.json").read_text())
    entry = entries["model.layers.0.self_attn.k_proj"]
    assert entry["shape"] == [16, 32]
    assert entry["type"] == "self_attn.k_proj"
    assert entry["dtype"] == "BF16"
    assert entry["method"] in ("gram32", "gram64")
    assert entry["threshold"] == "reference"


def test_other_layouts_of_the_same_weights_give_the_same_scan(checkpoint, tmp_path):
    expected = run(checkpoint("llama"), tmp_path / "snr.json").read_text()
    weights = weights_of(checkpoint("llama"))
    for kind in ("shards", "bin", "bin_shards"):
        write_layout(tmp_path / kind, kind, weights)
        assert run(tmp_path / kind, tmp_path / kind / "snr.json").read_text() == expected, kind


def write_layout(directory, kind, weights):
    directory.mkdir()
    names = sorted(weights)
    halves = [names[::2], names[1::2]] if "shards" in kind else [names]
    stem, suffix = ("pytorch_model", "bin") if "bin" in kind else ("model", "safetensors")
    files = [f"{stem}-{i}.{suffix}" if "shards" in kind else f"{stem}.{suffix}" for i in range(len(halves))]
    for file, half in zip(files, halves, strict=True):
        part = {name: weights[name] for name in half}
        torch.save(part, directory / file) if suffix == "bin" else save_file(part, directory / file)
    if "shards" in kind:
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measured_in(cache):
    """The tensors that were measured, in the order of the files of the workers."""
    lines = [line for file in sorted(cache.glob("spectrum/*/v2/*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line)["name"] for line in lines if line.endswith("}")]


def test_same_weights_are_measured_once_wherever_they_lie(checkpoint, tmp_path, cache):
    first = run(checkpoint("llama"), tmp_path / "a.json").read_text()
    count = len(measured_in(cache))
    assert count == len(json.loads(first))
    weights = weights_of(checkpoint("llama"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.safetensors").write_bytes((checkpoint("llama") / "model.safetensors").read_bytes())
    assert run(tmp_path / "copy", tmp_path / "b.json").read_text() == first
    assert run(tmp_path / "copy", tmp_path / "c.json", threshold="marchenko_pastur").read_text() != first
    assert len(measured_in(cache)) == count
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    assert run(tmp_path / "copy", tmp_path / "d.json").read_text() != first
    assert len(measured_in(cache)) == 2 * count


def test_a_matrix_is_read_in_pieces(tmp_path, monkeypatch):
    """Tall and wide, from safetensors and from .bin: never more than a piece, and every number once."""
    sizes = []
    inner = reader.read
    monkeypatch.setattr(work, "read", lambda *given: sizes.append((block := inner(*given)).size) or block)
    monkeypatch.setitem(work._PIECE, "cpu", 1024)
    weights = {"a.weight": torch.randn(96, 16), "b.weight": torch.randn(16, 96).bfloat16()}
    for layout in ("one", "bin"):
        write_layout(tmp_path / layout, layout, weights)
        for name, stored in reader.tensors(tmp_path / layout).items():
            sizes.clear()
            whole = np.concatenate(list(work.slices(stored, 0, "cpu", "float32")))
            weight = weights[name].float().numpy()
            assert np.array_equal(whole, weight if name == "a.weight" else weight.T)
            assert sizes == [256] * 6


def test_stored_numbers_are_kept_exactly(tmp_path):
    weights = {f"{i}.weight": torch.randn(24, 40).to(d) for i, d in
               enumerate((torch.float64, torch.float32, torch.float16, torch.bfloat16))}  # fmt: skip
    write_layout(tmp_path / "m", "one", weights)
    for name, stored in reader.tensors(tmp_path / "m").items():
        for precision in ("float32", "float64"):
            piece = np.concatenate(list(work.slices(stored, 0, "cpu", precision)))
            assert np.array_equal(piece.T, weights[name].double().numpy())
            assert piece.dtype == ("float64" if stored.dtype == "F64" else precision)


RANK = """
    import pathlib, sys
    from ftdist.spectrum.scan import scan
    scan(model_path=sys.argv[1], output=pathlib.Path(sys.argv[2]), processes=1, device="cpu",
         threshold="reference", group_experts=True)
"""

# In the thirteenth measurement the worker kills the scan that started it, and itself.
KILLED = """
    import os, signal, sys
    if "ftdist.spectrum.work" in sys.orig_argv:
        from ftdist.spectrum import snr
        inner, seen = snr.measure, []
        def measure(*given):
            seen.append(given)
            if len(seen) > 12:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*given)
        snr.measure = measure
"""


def test_a_killed_scan_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch, cache):
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(KILLED))
    command = [sys.executable, "-c", textwrap.dedent(RANK), str(checkpoint("llama")), str(tmp_path / "snr.json")]
    paths = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert subprocess.run(command, env=paths).returncode == -signal.SIGKILL
    assert not (tmp_path / "snr.json").exists()
    (results,) = cache.glob("spectrum/*/v2/*.jsonl")
    before = [json.loads(line)["name"] for line in results.read_text().splitlines()]
    assert len(before) == 12
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]) + lines[-1][:40])  # as if it was cut while writing
    resumed = run(checkpoint("llama"), tmp_path / "snr.json").read_text()
    assert sorted(measured_in(cache)) == sorted(weights_of(checkpoint("llama")))  # each once
    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "fresh"))
    assert run(checkpoint("llama"), tmp_path / "fresh.json").read_text() == resumed


def test_two_processes_share_the_work(checkpoint, tmp_path, cache, monkeypatch):
    shared = run(checkpoint("llama"), tmp_path / "two.json", processes=2).read_text()
    files = sorted(cache.glob("spectrum/*/v2/*.jsonl"))
    done = [{json.loads(line)["name"] for line in file.read_text().splitlines()} for file in files]
    assert len(done) == 2
    assert all(done)
    assert done[0].isdisjoint(done[1])
    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "fresh"))
    assert run(checkpoint("llama"), tmp_path / "one.json").read_text() == shared


def test_ranks_of_a_launcher_share_the_work(checkpoint, tmp_path, cache, monkeypatch):
    def environment(rank):
        return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}

    command = [sys.executable, "-c", textwrap.dedent(RANK), str(checkpoint("llama")), str(tmp_path / "snr.json")]
    ranks = [subprocess.Popen(command, env=os.environ | environment(rank)) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    done = [len(file.read_text().splitlines()) for file in cache.glob("spectrum/*/v2/*.jsonl")]
    assert len(done) == 2
    assert sum(done) == len(json.loads((tmp_path / "snr.json").read_text()))
    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "fresh"))
    assert run(checkpoint("llama"), tmp_path / "one.json").read_text() == (tmp_path / "snr.json").read_text()


def test_the_rank_that_prepares_a_run_scans_alone(checkpoint, tmp_path, monkeypatch):
    """Under `accelerate launch -m ftdist.train` rank 0 prepares and the others wait for it, not it for them."""
    from ftdist.strategies import Base, spectrum

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scan, "_STALL", 1.0)
    base = Base(verb.disk_shapes(checkpoint("llama")), "float32", "float32", measured=False)
    keys = {"parameters": None, "scan": None, "threshold": "reference", "group_experts": True, "top_percent": 50,
            "trainable_budget": None, "types": "all", "embeddings": True, "head": True, "norms": True}  # fmt: skip
    decided = spectrum.prepare(base, str(checkpoint("llama")), tmp_path, 1, **keys)
    assert len(load_scan(tmp_path / "snr.json").entries) == len(weights_of(checkpoint("llama")))
    assert decided == {"scan": str(tmp_path / "snr.json")}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script is not a task
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "4294967291"}, (0, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}, (2, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"},
         (5, 8)),
    ],
)  # fmt: skip
def test_who_launched(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert scan.launched_as() == expected


def test_progress_counts_only_the_work_of_this_attempt():
    assert scan.progress_line(3, 9, 0.6, 0.5, 20.0) == "scan: 3 of 9 weights, 60% of the work, 80 s left"
    assert scan.progress_line(3, 9, 0.5, 0.5, 20.0).endswith("time left unknown")
    assert scan.progress_line(3, 9, 0.1, 0.0, 60.0).endswith("9 min left")


def test_largest_first_and_even():
    stored = [reader.Stored(f"{i}", shape, "F32", None, 0) for i, shape in enumerate([(8, 8), (64, 64), (40, 40)] * 4)]
    shares = scan.assign(stored, 3)
    assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in stored)
    assert shares[0][0].shape == (64, 64)
    loads = [sum(map(scan.cost, share)) for share in shares]
    assert max(loads) - min(loads) <= scan.cost(stored[1])
    assert all([t.shape for t in share] == sorted((t.shape for t in share), reverse=True) for share in shares)


# Bad input: one line that says what to do


def edited(checkpoint, tmp_path, change):
    directory = tmp_path / "model"
    weights = weights_of(checkpoint("llama"))
    write_layout(directory, "one", change(weights) or weights)
    return directory


def refused(model, tmp_path, **changes):
    with pytest.raises(UserError) as caught:
        run(model, tmp_path / "snr.json", **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert not (tmp_path / "snr.json").exists()
    return message


def test_truncated_shard(checkpoint, tmp_path, cache):
    model = edited(checkpoint, tmp_path, lambda weights: None)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut short" in refused(model, tmp_path)
    file.write_bytes(file.read_bytes()[:5])
    assert "cut short" in refused(model, tmp_path)
    assert measured_in(cache) == []  # said before the work, not in the middle of it


def test_truncated_bin(checkpoint, tmp_path):
    write_layout(tmp_path / "m", "bin", weights_of(checkpoint("llama")))
    file = tmp_path / "m" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])
    assert "not a whole file of plain weights" in refused(tmp_path / "m", tmp_path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_bin_that_carries_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": Evil()}, tmp_path / "pytorch_model.bin")
    assert "not a whole file of plain weights" in refused(tmp_path, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_index_names_a_missing_file(checkpoint, tmp_path):
    write_layout(tmp_path / "m", "shards", weights_of(checkpoint("llama")))
    (tmp_path / "m" / "model-1.safetensors").unlink()
    assert "model-1.safetensors, which is not there" in refused(tmp_path / "m", tmp_path)


def test_index_names_a_tensor_that_is_not_in_its_file(checkpoint, tmp_path):
    write_layout(tmp_path / "m", "shards", weights_of(checkpoint("llama")))
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.99.x.weight"] = "model-0.safetensors"
    index.write_text(json.dumps(content))
    assert "model.layers.99.x.weight" in refused(tmp_path / "m", tmp_path)
    index.write_text("{")
    assert "not an index" in refused(tmp_path / "m", tmp_path)


def test_quantised_checkpoint(checkpoint, tmp_path):
    model = edited(checkpoint, tmp_path, lambda weights: None)
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "quantised" in refused(model, tmp_path)
    (model / "config.json").unlink()
    packed = {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8, dtype=torch.uint8)}
    save_file(weights_of(checkpoint("llama")) | packed, model / "model.safetensors")
    assert "quantised" in refused(model, tmp_path)
    save_file({"a.qweight": torch.ones(8, 8, dtype=torch.int32)}, model / "model.safetensors")
    assert "quantised" in refused(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "processes"),
    [("model.layers.1.self_attn.q_proj.weight", 1), ("model.layers.1.mlp.up_proj.weight", 2), ("model.norm.weight", 1)],
)
def test_weights_that_are_not_numbers(name, processes, checkpoint, tmp_path):
    def spoil(weights):
        weights[name].view(-1)[3] = float("nan")

    message = refused(edited(checkpoint, tmp_path, spoil), tmp_path, processes=processes)
    assert f"{name} has NaN or infinite values" in message


def test_a_rank_that_meets_nan_does_not_leave_the_others_waiting(checkpoint, tmp_path, monkeypatch):
    def spoil(weights):
        weights["lm_head.weight"][0, 0] = float("inf")  # the largest, so rank 0 measures it

    model = edited(checkpoint, tmp_path, spoil)
    monkeypatch.setattr(scan, "_STALL", 1.0)
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert "lm_head.weight has NaN or infinite values" in refused(model, tmp_path)


def test_model_without_matrices(tmp_path):
    write_layout(tmp_path / "m", "one", {"norm.weight": torch.ones(8), "conv.weight": torch.ones(8, 1, 4)})
    assert "no 2-D weights" in refused(tmp_path / "m", tmp_path)


def test_no_weights_no_directory_no_processes(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no weights there" in refused(tmp_path / "empty", tmp_path)
    assert "the hub gave no weights" in refused("someone/nothing", tmp_path)
    assert "no such directory" in refused(tmp_path / "nowhere", tmp_path)
    assert "processes=0" in refused(checkpoint("llama"), tmp_path, processes=0)
    if not torch.cuda.is_available():
        assert "no GPU" in refused(checkpoint("llama"), tmp_path, device="cuda")


def test_a_snapshot_of_the_hub_is_read_from_its_cache(checkpoint, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(checkpoint("llama") / name)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("someone/small", tmp_path / "snr.json")
    assert (tmp_path / "snr.json").read_text() == run(checkpoint("llama"), tmp_path / "b.json").read_text()
