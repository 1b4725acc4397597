"""The key of a prepared data set: a hash of everything that decides what is in it. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftdist.errors import UserError

# what a tokenizer is made of; weights and images in the same folder are not
_TOKENIZER_ENDINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_NOT_TOKENIZER = ("generation_config.json", "trainer_state.json", "all_results.json", "train_results.json")
# a file changed within the clock's grain of its hashing could change again unseen: such a hash is not
# remembered
_GRAIN_NS = 2_000_000_000


class FileHashes:
    """SHA-256 of files, remembered between runs by (path, size, mtime, inode)."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._changed = False
        try:
            self._known: dict[str, Any] = json.loads(memo.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        path = path.resolve()
        before = path.stat()
        identity = [before.st_size, before.st_mtime_ns, before.st_ino]
        known = self._known.get(str(path))
        if known and known[:3] == identity:
            return str(known[3])
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"data.path={path}: the file changed while it was read; start again when it is whole")
        if time.time_ns() - before.st_mtime_ns > _GRAIN_NS:
            self._known[str(path)] = [*identity, digest.hexdigest()]
            self._changed = True
        return digest.hexdigest()

    def save(self) -> None:
        if not self._changed:
            return
        self._memo.parent.mkdir(parents=True, exist_ok=True)
        beside = self._memo.with_name(f"{self._memo.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
        newest = dict(list(self._known.items())[-10_000:])
        beside.write_text(json.dumps(newest))
        beside.rename(self._memo)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide how text becomes tokens."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file()
        and p.suffix in _TOKENIZER_ENDINGS
        and not p.name.endswith(".index.json")
        and p.name not in _NOT_TOKENIZER
        and len(p.relative_to(folder).parts) <= 2
        and not p.relative_to(folder).parts[0].startswith((".", "checkpoint"))
    )


def key(options: dict[str, Any], files: Iterable[tuple[str, str]]) -> str:
    """The key (40 hex digits) of options, (role, sha256) of files, our code and the libraries that decide
    tokens."""
    digest = hashlib.sha256()
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for role, sha in files:
        digest.update(f"\n{role} {sha}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    for library in ("tokenizers", "transformers"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:40]


# --- atomic publication ---------------------------------------------------------------------------


def workplace(final: Path) -> Path:
    """A fresh folder beside `final` to build it in; what dead processes of this machine left there is
    removed."""
    import shutil

    final.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().replace("~", "-")
    for old in final.parent.glob(f".making~{host}~*"):
        owner = old.name.split("~")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    made = final.parent / f".making~{host}~{os.getpid()}~{uuid.uuid4().hex[:8]}"
    made.mkdir()
    return made


def publish(made: Path, final: Path) -> None:
    """Gives `made` its name at once. When another run was first, its result stays and ours goes."""
    import shutil

    for path in [*made.rglob("*"), made]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        made.rename(final)
    except OSError:
        if not (final / "data_report.json").is_file():
            raise
        shutil.rmtree(made, ignore_errors=True)
        return
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
