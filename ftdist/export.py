"""A finished run → a plain Hugging Face directory, checked against what was trained. Knows the run directory alone."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import base as bases
from ftdist import card, merge, parity, rundir
from ftdist.errors import Failed, UserError
from ftdist.spectrum import reader

RECORD = "ftdist_export.json"
BESIDE = ("generation_config.json", "*.py", "preprocessor_config.json", "LICENSE*", "NOTICE*")
GiB = 2**30


def export(
    run_dir: Path,
    *,
    output: str | None,
    base: str | None,
    merge: bool,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    max_shard_size: Annotated[float, Field(gt=0)],
    parity: bool,
    tolerance: Annotated[float, Field(gt=0)] | None,
    license: str | None,
    gguf: Literal["f32", "f16", "bf16", "q8_0", "auto"] | None,
    push: str | None,
) -> Path:
    """The exported directory: there whole, after every check, or not at all."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    run = rundir.finished(run_dir)
    final = run_dir / "final"
    is_adapter = (final / "adapter_config.json").is_file()
    if is_adapter and not merge and dtype != "auto":
        raise UserError(f"export.dtype={dtype}: an adapter alone keeps its own; leave it out or set export.merge=true")
    if is_adapter and not merge and gguf:
        raise UserError(f"export.gguf={gguf}: only a whole model becomes a GGUF file; set export.merge=true")
    token = _token(push) if push else None
    converter = _converter() if gguf else None
    target = Path(output).expanduser().absolute() if output else run_dir / "model"
    if target.exists() and not (target / RECORD).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"export.output={target}: holds other files already; choose another")
    if parity:
        _memory(run["plan"]["total_parameters"])
    base_dir = bases.found(run_dir, base or run["config"]["model"]["path"], "export.base") if is_adapter else None
    source = base_dir if base_dir is not None and merge else final
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.monotonic()
        if is_adapter and not merge:
            merged: dict[str, str] = {}
            _copy_adapter(final, partial, base_dir)
        else:
            _room(source, partial, dtype)
            merged = _write_whole(source, final, partial, is_adapter, dtype, max_shard_size)
        written = time.monotonic() - started
        _tokenizer(final, partial, run["config"]["model"]["trust_remote_code"])
        record: dict[str, Any] = {
            "run": str(run_dir),
            "base": run["config"]["model"]["path"],
            "kind": "adapter" if is_adapter and not merge else "merged" if is_adapter else "whole",
            "dtypes": sorted(set(merged.values())),
            "seconds": round(written, 2),
        }
        if parity:
            rounds = dtype != "auto" or record["kind"] == "merged"
            record["parity"] = _check(run_dir, run, partial, is_adapter, merge, base_dir, tolerance, merged, rounds)
        rundir.write_json(partial / RECORD, record)
        card.write(partial, run_dir, run, record, license)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as failure:
        raise UserError(f"export.output={target}: {failure.strerror or failure}; choose another place")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if converter is not None:
        _to_gguf(converter, target, str(gguf))
    if push:
        _upload(target, push, str(token))
    return target


def _write_whole(
    source: Path, final: Path, target: Path, is_adapter: bool, dtype: str, max_shard_size: float
) -> dict[str, str]:
    """The weights and the small files beside them; the dtypes (safetensors' names) of the merged or of all tensors."""
    tensors = reader.tensors(source)
    config = reader.config(source)
    adapter = None
    if is_adapter:
        adapter = merge.Adapter(final, tensors, config)
        if adapter.untie():
            config["tie_word_embeddings"] = False
    written = merge.write_model(tensors, target, adapter, dtype, int(max_shard_size * 1e9))
    if dtype != "auto":
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
        config["dtype"] = dtype
    rundir.write_json(target / "config.json", config)
    merge.copy_beside(source, target, BESIDE)
    if adapter is None:
        return written
    return {name: code for name, code in written.items() if name in adapter.updates or name in adapter.added}


def _copy_adapter(final: Path, target: Path, base_dir: Path | None) -> None:
    merge.copy_beside(final, target, ("adapter_config.json", "adapter_model*.safetensors"))
    merge.copy_beside(final.parent, target, (bases.FILE,))  # so that another base is noticed there too
    settings = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    rundir.write_json(target / "adapter_config.json", settings | {"base_model_name_or_path": str(base_dir)})


def _tokenizer(final: Path, target: Path, trust_remote_code: bool) -> None:
    """Everything of the tokenizer; and a whole model's generation stops where the template's turns end."""
    weights = ("adapter_", "model", "config.json", "generation_config.json", "README.md", "training_args")
    for file in sorted(final.iterdir()):
        if file.is_file() and not file.name.startswith(weights):
            shutil.copyfile(file, target / file.name)
    if (target / "adapter_config.json").is_file():  # its base has the generation config
        return
    from transformers import AutoTokenizer

    from ftdist.evaluate.generate import turn_ends

    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)
    settings = target / "generation_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
    else:
        config = reader.config(target)
        named = ("bos_token_id", "eos_token_id", "pad_token_id")
        values = {key: config[key] for key in named if config.get(key) is not None}
    ends = values.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = [*known, *sorted(turn_ends(tokenizer) - set(known))]
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    rundir.write_json(settings, values)


def _check(
    run_dir: Path,
    run: dict[str, Any],
    directory: Path,
    is_adapter: bool,
    merged: bool,
    base_dir: Path | None,
    tolerance: float | None,
    dtypes: dict[str, str],
    rounds: bool,
) -> dict[str, Any]:
    """Parity in numbers; Failed when any comparison is over its tolerance. rounds: the files may hold other numbers."""
    import torch
    from safetensors.torch import load_file

    from ftdist.evaluate.load import Loader

    trained = run_dir / parity.FILE
    loader = Loader(run_dir, run["config"], run["plan"], base_dir or run_dir / "final")
    recorded = load_file(trained) if trained.is_file() else None
    ids = recorded["input_ids"] if recorded else loader.probe(parity.TOKENS)
    found: dict[str, Any] = {"tokens": ids.shape[1]}
    limits: dict[str, float] = {}

    def compare(name: str, reference: torch.Tensor, other: torch.Tensor, limit: float) -> None:
        found[name] = parity.difference(reference, other)
        limits[name] = limit

    quantised = loader.recipe.quantization is not None
    precision = run["plan"]["precision"]
    engine = recorded["logits"] if recorded else None
    as_trained = None
    if engine is not None or quantised:
        model, _ = loader.load("tuned", quantised=quantised, dtype=precision)
        as_trained = parity.logits_of(model, ids)
        del model
        gc.collect()
        if engine is not None:
            compare("engine_to_saved", engine, as_trained, tolerance or parity.TOLERANCE[precision])
    model, _ = loader.load("tuned", quantised=False, dtype="float32")
    reference = parity.logits_of(model, ids)
    rounded = None
    if is_adapter and merged:
        with model.disable_adapter():
            found["base_to_trained_kl"] = parity.difference(reference, parity.logits_of(model, ids))["kl_mean"]
        tied = [reader.config(folder).get("tie_word_embeddings") for folder in (directory, loader.base_dir)]
        if tied[0] == tied[1]:  # PEFT merges a tied head into the embedding too, which is another model
            rounded = parity.logits_of(loader.rounded_merge(model, dtypes), ids)
    del model
    gc.collect()
    exported, answer = parity.reloaded(directory, ids, run["config"]["model"]["trust_remote_code"])
    codes = set(dtypes.values()) if rounds else set()
    loosest = "bfloat16" if "BF16" in codes else "float16" if "F16" in codes else "float32"
    compare("trained_to_exported", reference, exported, tolerance or parity.TOLERANCE[loosest])
    if rounded is not None:
        same = parity.TOLERANCE["float32"] if loosest == "float32" else parity.SAME_MERGE
        compare("peft_merge_to_ours", rounded, exported, same)
    if quantised and as_trained is not None:
        found["quantised_to_exported"] = parity.difference(as_trained, exported)
    found["answer"] = answer
    for name, limit in limits.items():
        if parity.fails(found[name], limit):
            values = found[name]
            raise Failed(
                f"export: parity failed ({name}: logits differ by {values['max_difference']:.4g}, "
                f"{values['max_difference_in_deviations']:.3g} standard deviations of at most {limit:g}; mean KL "
                f"{values['kl_mean']:.3g} of at most {limit**2:.3g}); nothing was exported"
                + ("; export.dtype=float32 rounds less" if loosest != "float32" else "")
            )
    return found


def _memory(parameters: int) -> None:
    import psutil

    need, free = 4 * parameters, psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"export.parity=true: the comparison is in float32 and needs {need / GiB:.1f} GiB of memory, "
            f"{free / GiB:.1f} are free; run it on a larger machine or set export.parity=false"
        )


def _room(source: Path, target: Path, dtype: str) -> None:
    """UserError when the disk will not hold what is written."""
    wide = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype)
    need = sum(t.elements * (wide or merge.WIDTHS.get(t.dtype, 8)) for t in reader.tensors(source).values())
    free = shutil.disk_usage(target).free
    if need > free:
        raise UserError(
            f"export.output={target.parent}: {need / GiB:.1f} GiB needed, {free / GiB:.1f} free; choose another"
        )


def _token(push: str) -> str:
    if push.count("/") != 1 or not all(push.split("/")):
        raise UserError(f"export.push={push}: not a hub id; OWNER/NAME")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError(f"export.push={push}: no token; set HF_TOKEN in the environment (a token that may write)")
    return token


def _upload(directory: Path, repository: str, token: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as failure:  # one of many classes of the hub's client and of what it stands on
        reason = " ".join(str(failure).split())[:200].replace(token, "…")
        raise Failed(f"export.push={repository}: the upload failed ({reason}); {directory} is whole")


def _converter() -> Path:
    """llama.cpp's own script: in the folder $LLAMA_CPP, or on the PATH."""
    name = "convert_hf_to_gguf.py"
    places = [Path(os.environ["LLAMA_CPP"], name)] if os.environ.get("LLAMA_CPP") else []
    on_path = shutil.which(name)
    places += [Path(on_path)] if on_path else []
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"export.gguf: no {name}; install llama.cpp and set LLAMA_CPP to its folder")


def _to_gguf(converter: Path, directory: Path, kind: str) -> None:
    file = directory / f"model-{kind}.gguf"
    partial = directory / f".{file.name}"
    done = subprocess.run(
        [sys.executable, str(converter), str(directory), "--outfile", str(partial), "--outtype", kind],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not partial.is_file():
        partial.unlink(missing_ok=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"export.gguf={kind}: llama.cpp's converter failed ({last}); {directory} is whole without it")
    partial.rename(file)


def summary(directory: Path) -> list[str]:
    """What was exported and how near it is, for people."""
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    lines = [f"exported: {record['kind']}, written in {record['seconds']:.1f} s"]
    names = {
        "engine_to_saved": "the training engine's logits → saved run",
        "trained_to_exported": "saved run → exported files",
        "peft_merge_to_ours": "PEFT's merge, rounded alike → exported files",
        "quantised_to_exported": "4-bit model as trained → exported files (the base's quantisation, not checked)",
    }
    for key, meaning in names.items():
        if key in record.get("parity", {}):
            v = record["parity"][key]
            lines.append(
                f"parity: {meaning}: max difference {v['max_difference']:.3g}, mean KL {v['kl_mean']:.3g}, "
                f"same best token {v['same_best_token']:.0%}"
            )
    found = record.get("parity", {})
    if "base_to_trained_kl" in found:
        moved, lost = found["base_to_trained_kl"], found["trained_to_exported"]["kl_mean"]
        if lost > 0.25 * moved:
            lines.append(
                f"warning: rounding moves the model by a KL of {lost:.2g}, training moved it by {moved:.2g}; "
                "export.dtype=float32 keeps what was learned"
            )
    if "parity" not in record:
        lines.append("parity: not checked (export.parity=false)")
    return lines
