"""Checkpoints as files: commit, verify, choose, retain. Knows neither models nor engines.

A checkpoint is RUN/checkpoints/step-N/. It counts when its manifest is there and everything that the manifest lists
has the size and the SHA-256 that it says. A draft has another name until it is complete and on the disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
ASIDE = "set-aside"  # what a start found broken: kept, never read again
NAME = re.compile(r"step-(\d+)")
SPARE = 1.02  # free space wanted for a checkpoint, as a multiple of its bytes


def settings(
    *,
    every_steps: Annotated[int, Field(ge=1)] | None,
    every_minutes: Annotated[float, Field(gt=0)] | None,
    keep_last: Annotated[int, Field(ge=1)],
    keep_best: Annotated[int, Field(ge=0)],
    keep_every: Annotated[int, Field(ge=1)] | None,
    background: bool,
    max_failed_saves: Annotated[int, Field(ge=0)],
) -> None:
    """The keys of `checkpoint`, which ftdist.keeper.Keeper reads."""


class Broken(Exception):
    """A checkpoint that cannot be trusted, and why."""


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / FOLDER / f"step-{step:08d}"


def rank_stem(rank: int) -> str:
    """What the names of a rank's two files begin with."""
    return f"rank-{rank:05d}"


def drafts(run_dir: Path, step: int, token: int) -> Path:
    """Where it is written. The token is the writer's lease: two writers never share a directory."""
    return run_dir / FOLDER / f".step-{step:08d}.{token}.draft"


def steps(run_dir: Path) -> list[int]:
    """Steps that have a directory with a final name, newest first; whether they are whole is another question."""
    parent = run_dir / FOLDER
    if not parent.is_dir():
        return []
    found = (NAME.fullmatch(child.name) for child in parent.iterdir() if child.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and checksum of a file, after its bytes are on the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return {"bytes": handle.tell(), "sha256": digest}


def commit(draft: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Give a complete draft its manifest and its name, each on the disk before the next."""
    text = json.dumps({**manifest, "manifest_sha256": _checksum(manifest)}, indent=2)
    with (draft / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync(draft)
    draft.rename(final)
    sync(final.parent)


def amend(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Another manifest for the same files, in one rename."""
    partial = checkpoint / f".{MANIFEST}"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**manifest, "manifest_sha256": _checksum(manifest)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checkpoint / MANIFEST)
    sync(checkpoint)


def sync(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, if it is whole and every file that it lists is there with its size; else Broken."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise Broken("no manifest")
    try:
        manifest = json.loads(text)
        said = manifest.pop("manifest_sha256")
    except (ValueError, KeyError, AttributeError):
        raise Broken("unreadable manifest")
    if said != _checksum(manifest):
        raise Broken("the manifest does not have its own checksum")
    for rank in range(0 if manifest["initial"] else manifest["world_size"]):
        if not {f"{rank_stem(rank)}.json", f"{rank_stem(rank)}.safetensors"} <= set(manifest["files"]):
            raise Broken(f"the files of rank {rank} are not in the manifest")
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        if Path(name).name != name or not file.is_file():
            raise Broken(f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise Broken(f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written")
    return dict(manifest)


def verify(checkpoint: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Broken, unless the named files have the bytes that were written. Other errors of reading pass through."""
    for name in names:
        try:
            with (checkpoint / name).open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except FileNotFoundError:
            raise Broken(f"{name} is missing")
        if digest != files[name]["sha256"]:
            raise Broken(f"{name} does not have the bytes that were written")


def set_aside(run_dir: Path, step: int) -> Path:
    """Move a broken checkpoint out of the way, keeping it."""
    source = folder(run_dir, step)
    parent = run_dir / FOLDER / ASIDE
    parent.mkdir(exist_ok=True)
    target = next(t for n in itertools.count(1) if not (t := parent / f"{source.name}.{n}").exists())
    source.rename(target)
    return target


def remove_drafts(run_dir: Path) -> None:
    """What interrupted saves and interrupted removals left behind."""
    parent = run_dir / FOLDER
    left = [child for child in (parent.iterdir() if parent.is_dir() else ()) if child.name.startswith(".")]
    for child in (*left, *run_dir.glob(f".{FOLDER}.*")):
        shutil.rmtree(child, ignore_errors=True)


def surplus(scores: Mapping[int, float | None], keep_last: int, keep_best: int, keep_every: int | None) -> list[int]:
    """Which of the committed steps may be removed, oldest first. scores: the lower the better, None without one."""
    newest = sorted(scores, reverse=True)[:keep_last]
    measured = {step: score for step, score in scores.items() if score is not None}
    best = sorted(measured, key=lambda step: (measured[step], step))[:keep_best]
    lasting = [step for step in scores if keep_every and step % keep_every == 0 and step > 0]
    return sorted(set(scores).difference(newest, best, lasting))


def remove(run_dir: Path, step: int) -> None:
    """Remove a checkpoint; killed in between, it is already no checkpoint any more."""
    source = folder(run_dir, step)
    hidden = source.with_name(f".{source.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    source.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def lacking_bytes(directory: Path, needed: int) -> int:
    """How many bytes the disk lacks for a checkpoint of `needed` bytes; 0 when it fits."""
    return max(0, int(needed * SPARE) - shutil.disk_usage(directory).free)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
