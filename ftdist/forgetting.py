"""Elastic weight consolidation as a configuration has it: its keys, what they refuse, where a Fisher lies.

Imports no torch: `ftdist plan` reads this. `ewc.py` holds the penalty, `fisher.py` measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import base as bases
from ftdist import checkpoint, start
from ftdist.data.prepare import Part
from ftdist.errors import UserError
from ftdist.export import RECORD
from ftdist.plan.states import Penalty
from ftdist.schema import nearest
from ftdist.spectrum import reader

TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their layers are transformers' Conv1D
FOLDER = "fisher"  # in the run directory, and in the cache


def none(*, name: Literal["none"]) -> None:
    """No penalty."""


def settings(
    *,
    name: Literal["ewc"],
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)],
    data: str | list[str | Part] | None,
    samples: Annotated[int, Field(ge=1)],
    batch: Annotated[int, Field(ge=1)],
    fisher: str | None,
    earlier: str | None,
    decay: Annotated[float, Field(ge=0, le=1)],
    adapters: Literal["drift", "plain"],
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """The keys of `forgetting=ewc`."""


def function(name: Any) -> Callable[..., None]:
    """The function whose signature is the schema of this choice."""
    known: dict[str, Callable[..., None]] = {"none": none, "ewc": settings}
    if name not in known:
        raise UserError(f"forgetting.name={name}: no such choice; {nearest(str(name), list(known))}")
    return known[name]


def is_on(keys: Mapping[str, Any]) -> bool:
    """Whether a penalty is added to anything."""
    return keys["name"] == "ewc" and keys["strength"] > 0


def refuse(keys: Mapping[str, Any], engine: str, peft: Mapping[str, Any] | None, model_type: str, look: bool) -> None:
    """UserError for keys that do not go together, or not with this engine, these adapters or this architecture.

    look: at the files that are named, which a run that goes on needs no more.
    """
    if keys["data"] is None and keys["fisher"] is None:
        raise UserError(
            "forgetting.data: missing; set forgetting.data=FILE, general data that are not to be forgotten, or "
            "forgetting.fisher=RUN"
        )
    if keys["data"] is not None and keys["fisher"] is not None:
        raise UserError("forgetting.fisher: with forgetting.data there would be two of them; set one, or put the older "
                        "one into forgetting.earlier")  # fmt: skip
    if keys["batch"] > 1 and keys["samples"] < 2 * keys["batch"]:
        raise UserError(f"forgetting.batch={keys['batch']}: needs two batches at least; use at most "
                        f"{max(keys['samples'] // 2, 1)}, or more forgetting.samples")  # fmt: skip
    if engine == "zero3_nvme":
        raise UserError("forgetting=ewc: engine=zero3_nvme keeps weights on a disk of its own, out of reach of a "
                        "penalty; use zero3 or zero3_offload")  # fmt: skip
    if peft is not None and keys["adapters"] == "drift" and peft.get("use_dora"):
        raise UserError("forgetting.adapters=drift: DoRA also rescales the merged weight; use strategy.use_dora=false "
                        "or forgetting.adapters=plain")  # fmt: skip
    if peft is not None and keys["adapters"] == "drift" and model_type in TRANSPOSED:
        raise UserError(
            f"forgetting.adapters=drift: model type {model_type} has Conv1D modules, whose weight lies transposed; use "
            "forgetting.adapters=plain"
        )
    if peft is None and keys["adapters"] == "plain":
        raise UserError("forgetting.adapters=plain: this strategy has no adapters; leave it out")
    for key in ("fisher", "earlier"):
        if look and keys[key] is not None:
            read(keys[key], f"forgetting.{key}")


def refuse_no_matrices(keys: Mapping[str, Any], others: Iterable[str]) -> None:
    """UserError for the first of `others`: what is trained and is no LoRA matrix of a linear module (drift form)."""
    for name in others if keys["adapters"] == "drift" else ():
        raise UserError(
            f"forgetting.adapters=drift: {name} would be trained and is no linear module with a LoRA; leave it out of "
            "strategy.targets, or use forgetting.adapters=plain"
        )


def said(keys: Mapping[str, Any], adapters: bool) -> str:
    """What is on, for the plan and the log."""
    if keys["strength"] == 0:
        return "forgetting=ewc with strength=0: off, nothing is measured and nothing added"
    form = "of the trained weights from their start"
    if adapters:
        drift = keys["adapters"] == "drift"
        form = "of the drift s·B·A of merged weights" if drift else "of A and B from their own start (plain)"
    return f"EWC {form}, λ={keys['strength']:g}"


def planned(keys: Mapping[str, Any], adapters: bool) -> Penalty | None:
    """What decides its memory; None where nothing is held."""
    if not is_on(keys):
        return None
    drift = adapters and keys["adapters"] == "drift"
    return Penalty(drift, keys["dtype"], keys["batch"], measured=keys["data"] is not None)


def place(path: str, key: str) -> Path:
    """The folder of a Fisher: the path itself or the one inside a run. UserError if neither is one."""
    given = Path(path).expanduser().absolute()
    for folder in (given, given / FOLDER):
        if (folder / checkpoint.MANIFEST).is_file() and any(folder.glob("*.safetensors")):
            return folder
    raise UserError(f"{key}={path}: holds no Fisher; give a run that was trained with forgetting=ewc, or its fisher/")


def read(path: str, key: str) -> dict[str, Any]:
    """The manifest of a Fisher whose files are there with their sizes. UserError otherwise."""
    folder = place(path, key)
    try:
        manifest = checkpoint.read_manifest(folder)
        kept = manifest["fisher"]
    except (checkpoint.Broken, KeyError) as failure:
        why = "is a checkpoint, not a Fisher" if isinstance(failure, KeyError) else f"is broken ({failure})"
        raise UserError(f"{key}={path}: {why}; measure it again with forgetting.data")
    assert isinstance(kept, dict)
    return manifest


def identity(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash for a model's weight files (`base.py` has theirs)."""
    digests = [[name, files[name]["sha256"]] for name in sorted(files)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def begins(run_dir: Path) -> str | None:
    """The identity of the adapter that goes on in this run, if one does."""
    going_on = start.adapter(run_dir)
    return reader.digest(going_on / start.WEIGHTS) if going_on else None


def of_adapters(
    keys: Mapping[str, Any], peft: Mapping[str, Any] | None, seed: int, going_on: str | None
) -> dict[str, Any]:
    """Whose weights A and B are, in the plain form: what makes them, and the seed of those that begin here."""
    plain = peft is not None and keys["adapters"] == "plain"
    made = json.loads(json.dumps(peft, default=str)) if plain else None
    return {"adapters": made, "seed": seed if plain and going_on is None else None}


def _refuse_other_adapters(key: str, kept: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """UserError unless a Fisher is of such adapters. Their dropout changes no weight, and is off while measuring."""
    before, now = kept["adapters"], own["adapters"]
    if (before is None) != (now is None):
        form = "of the model's own weights" if before is None else "of adapters (plain)"
        raise UserError(f"{key}: a Fisher {form}, which is not what is held here; measure with forgetting.data")
    pairs = [(name, before.get(name), now.get(name)) for name in {**before, **now}] if now is not None else []
    pairs.append(("seed", kept.get("seed"), own["seed"]))
    for name, old, new in pairs:
        if name != "lora_dropout" and old != new:
            raise UserError(
                f"{key}: its adapters had {name}={old}, these have {new}, so that A and B are other weights; use the "
                "same, or measure with forgetting.data"
            )


def refuse_another_model(path: str, model: str, model_path: str, adapter: str | None, own: Mapping[str, Any]) -> None:
    """UserError unless the Fisher at `path` was measured on the model whose identity is `model`.

    adapter: the identity of the one that goes on, if one does; own: `of_adapters`.
    """
    kept = read(path, "forgetting.fisher")["fisher"]
    if kept["model"] == model and kept["start"] != adapter:
        raise UserError(
            f"forgetting.fisher={path}: measured on this base {'without' if kept['start'] is None else 'with another'} "
            "adapter; measure it where this run starts with forgetting.data"
        )
    if kept["model"] != model:
        raise UserError(
            f"forgetting.fisher={path}: measured on another model ({kept['model_path']}, not {model_path}: other "
            "weight files); measure it on this one with forgetting.data"
        )
    _refuse_other_adapters(f"forgetting.fisher={path}", kept, own)


def ancestors(directory: str) -> Iterator[str]:
    """Identities of the models that the one in `directory` comes from, the nearest first, as far as runs tell.

    A run's `final/` and `model/` lie beside its base's hashes; an exported directory names its run.
    """
    folder, seen = Path(directory), set()
    while folder not in seen:
        seen.add(folder)
        record = folder / RECORD
        run = Path(json.loads(record.read_text(encoding="utf-8"))["run"]) if record.is_file() else folder.parent
        if not (run / bases.FILE).is_file():
            return
        base = json.loads((run / bases.FILE).read_text(encoding="utf-8"))
        yield identity(base["files"])
        folder = Path(base["path"])


def refuse_a_stranger(path: str, model: str, model_path: str, adapter: str | None, own: Mapping[str, Any]) -> None:
    """UserError unless the Fisher at `path` is of the model whose identity is `model`, or of one that it comes from.

    adapter, own: as above; an adapter that goes on may have begun with another seed.
    """
    kept = read(path, "forgetting.earlier")["fisher"]
    if kept["model"] not in (model, *ancestors(model_path)):
        raise UserError(
            f"forgetting.earlier={path}: measured on {kept['model_path']}, from whose weights {model_path} does not "
            "come, as far as runs tell; set model.path=RUN, a run that began there, or measure with forgetting.data"
        )
    _refuse_other_adapters(
        f"forgetting.earlier={path}", kept, own if adapter is None else {**own, "seed": kept.get("seed")}
    )


def facts(
    run_dir: Path,
    plan: Mapping[str, Any],
    keys: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    peft: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """What a Fisher is of: the weights, the data, and whatever else changes gradients at the start."""
    base = json.loads((run_dir / bases.FILE).read_text(encoding="utf-8"))
    return {
        "model": identity(base["files"]),
        "model_path": base["path"],
        "data": Path(plan["fisher_data"]).name if plan["fisher_data"] else None,
        "precision": plan["precision"],
        "quantization": quantization,
        **of_adapters(keys, peft, seed, begins(run_dir)),
        "start": begins(run_dir),
        "loaded": plan["loaded"],
    }
