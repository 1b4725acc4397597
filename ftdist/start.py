"""Where training starts if `model.path` names a finished run: its whole model, its adapter merged, or the same adapter
going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ftdist import base as bases
from ftdist import rundir
from ftdist.errors import UserError

FOLDER = "start"  # in a run directory: the adapter that went on, as it was
WEIGHTS = "adapter_model.safetensors"
MAY_DIFFER = ("dropout",)  # of a strategy's keys, between the run that made an adapter and the one that goes on with it


def is_run(path: str) -> bool:
    """Whether `path` is a run directory and no model's."""
    return (Path(path).expanduser() / "config.yaml").is_file()


def is_adapter(run: Path) -> bool:
    """Whether a finished run left an adapter."""
    return (run / "final" / "adapter_config.json").is_file()


def shapes_directory(path: str) -> Path:
    """The directory with the shapes of what a run left: its base's, where it left an adapter."""
    run = Path(path).expanduser().absolute()
    config = _finished(run)["config"]
    if not is_adapter(run):
        return run / "final"
    if not Path(config["model"]["path"]).is_dir():
        raise UserError(
            f"model.path={path}: the base of its adapter, {config['model']['path']}, is gone; ftdist export {path} "
            f"export.base=DIR, then model.path={path}/model"
        )
    return Path(config["model"]["path"])


def tokenizer_directory(path: str) -> Path:
    """The tokenizer that a run was trained with, template included."""
    return Path(path).expanduser().absolute() / "final"


def check(model: dict[str, Any], strategy: dict[str, Any]) -> None:
    """UserError for a start that cannot be: of the keys of `model`, and of a strategy that is not the adapter's."""
    path = model["path"]
    if not is_run(path):
        if model["adapter"] == "continue":
            raise UserError(f"model.adapter=continue: model.path={path} is no run of ftdist; give the run's directory")
        return
    run = Path(path).expanduser().absolute()
    before = _finished(run)["config"]["strategy"]
    if model["adapter"] != "continue":
        return
    if not is_adapter(run):
        raise UserError(
            f"model.adapter=continue: {path} has no adapter (strategy={before['name']}), its whole model is trained "
            "further; use model.adapter=merge"
        )
    for key in [*before, *(key for key in strategy if key not in before)]:
        if key not in MAY_DIFFER and before.get(key) != strategy.get(key):
            name = "strategy" if key == "name" else f"strategy.{key}"
            raise UserError(
                f"{name}={strategy.get(key)}: the adapter of {path} was made with {before.get(key)}; use that to go on "
                "with it, or model.adapter=merge for a new one"
            )


def settle(model: dict[str, Any], run_dir: Path) -> None:
    """Replace a run in `model.path` by a model directory; an adapter that goes on is copied into the new run."""
    path = model["path"]
    if not is_run(path):
        return
    run = Path(path).expanduser().absolute()
    if is_adapter(run) and model["adapter"] == "continue":
        base = bases.found(run, str(shapes_directory(path)), "export.base")
        shutil.copytree(run / "final", run_dir / FOLDER)
        model["path"] = str(base)
    else:
        model["path"] = str(whole(path))


def whole(path: str) -> Path:
    """A whole model from a run: what it left, or its adapter merged as `ftdist export` does."""
    run = Path(path).expanduser().absolute()
    config = _finished(run)["config"]
    if not is_adapter(run):
        return run / "final"
    from ftdist.export import RECORD, export

    target = run / "model"
    if (target / RECORD).is_file():
        kind = json.loads((target / RECORD).read_text(encoding="utf-8"))["kind"]
        if kind != "merged":
            raise UserError(
                f"model.path={path}: {target} holds the adapter alone; ftdist export {path} export.output=DIR, then "
                "model.path=DIR"
            )
        return target
    print(f"merging the adapter of {run} into its base, in {target}", flush=True)
    keys = {"output": None, "base": None, "merge": True, "gguf": None, "push": None}
    return export(run, **{**config["export"], **keys})


def adapter(run_dir: Path) -> Path | None:
    """The adapter that this run went on with, if it did."""
    return run_dir / FOLDER if (run_dir / FOLDER).is_dir() else None


def same_tokenizer(path: str, other: str, key: str, trust_remote_code: bool) -> None:
    """UserError, naming `key`, if the model in `other` reads other token ids than the one in `path`."""
    from transformers import AutoTokenizer

    ours, theirs = (
        AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).get_vocab() for name in (path, other)
    )
    if ours != theirs:
        unlike = min(set(ours.items()) ^ set(theirs.items()))[0]
        raise UserError(
            f"{key}={other}: its tokenizer is not that of {path} ({unlike!r} is {ours.get(unlike)} here, "
            f"{theirs.get(unlike)} there): it would judge other texts; use a model with the same one"
        )


def _finished(run: Path) -> dict[str, Any]:
    try:
        return rundir.finished(run)
    except UserError as failure:
        raise UserError(f"model.path={failure}")
