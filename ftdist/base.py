"""Which base a run started from: the hash of every weight file, so that another one is noticed later."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftdist.errors import UserError
from ftdist.spectrum import reader

FILE = "base.json"


def fingerprint(model_path: str) -> dict[str, Any]:
    """Size and SHA-256 of the weight files. A file is read once: digests are kept with its size and time stamp."""
    files = reader.shards(Path(model_path))
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(reader.digest, files))
    return {
        "path": model_path,
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": d} for f, d in zip(files, digests, strict=True)},
    }


def found(run_dir: Path, path: str, key: str) -> Path:
    """The directory `path`, if it holds the base of this run; UserError (fix: `key`) if it is gone or changed."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{run_dir}: its base {path} is gone; say where it is now: {key}=DIR")
    record = run_dir / FILE
    if not record.is_file():  # a run of an earlier version: nothing to compare with
        return directory
    known = json.loads(record.read_text(encoding="utf-8"))["files"]
    now = {file.name: file for file in reader.shards(directory)}
    for name, entry in known.items():
        file = now.get(name)
        if file is None:
            raise UserError(
                f"{run_dir}: the base {path} has changed ({name} is gone); give the right one with {key}=DIR"
            )
        if file.stat().st_size != entry["bytes"] or reader.digest(file) != entry["sha256"]:
            raise UserError(
                f"{run_dir}: the base {path} has changed since the training ({name} has another content); give the "
                f"right one with {key}=DIR"
            )
    return directory
