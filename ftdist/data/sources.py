"""What the user calls data → sources of files."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftdist.data.formats import FORMATS
from ftdist.errors import UserError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKERS = (".gz", ".zst")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
_HELD_OUT = re.compile(r"(^|[-_./])(validation|valid|val|dev)([-_./]|$)")
_TEST = re.compile(r"(^|[-_./])(test|eval)([-_./]|$)")

Kind = str  # "against" (only to decontaminate), "validation", "train", "replay" (general): in the order of precedence
KINDS = ("against", "validation", "train", "replay")


@dataclass(frozen=True)
class Source:
    """One thing that the user named: its files, and what was said about it."""

    name: str
    kind: Kind
    files: tuple[Path, ...]
    weight: float
    format: str
    columns: dict[str, str]


# --- which files ----------------------------------------------------------------------------------


def find(named: str, *, key: str) -> tuple[list[Path], list[Path], list[Path]]:
    """(files, held-out files, test files left aside) of a file, a folder, a glob or a hub id.

    Only in a folder or on the hub do names like `validation` and `test` decide. UserError names the key
    `key`.
    """
    if not named.strip():
        raise UserError(f"{key}={named!r}: names no data; give a file, a folder, a glob or a hub id")
    path = Path(named).expanduser()
    try:
        if path.is_file():
            _check_ending(path, key)
            return [path], [], []
        if path.is_dir():
            return _folder(path, named, key)
    except OSError as error:
        raise UserError(
            f"{key}={named}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if glob.has_magic(named):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))  # noqa: PTH207  (absolute too)
        files = [p for p in found if p.is_file()]
        if not files:
            raise UserError(f"{key}={named}: the pattern matches no file; check it with `ls {named}`")
        for file in files:
            _check_ending(file, key)
        return files, [], []
    if _HUB_ID.match(named) and not any(named.endswith(e) for e in ENDINGS + PACKERS):
        return _folder(_download(named, key), named, key)
    raise UserError(f"{key}={named}: no such file, folder, pattern or hub id; give a path that exists")


def ending(path: Path) -> str:
    """The format's ending without the packer's: chat.jsonl.zst → .jsonl."""
    name = path.name.lower()
    for packer in PACKERS:
        name = name.removesuffix(packer)
    return Path(name).suffix


def _check_ending(path: Path, key: str) -> None:
    if ending(path) not in ENDINGS:
        raise UserError(
            f"{key}={path}: unknown file type {ending(path) or '(none)'!r}; allowed: {' '.join(ENDINGS)}, "
            "each also as .gz or .zst"
        )


def _folder(path: Path, named: str, key: str) -> tuple[list[Path], list[Path], list[Path]]:
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and ending(p) in ENDINGS
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
        and p.name not in ("dataset_infos.json", "dataset_info.json", "state.json")
        and p.stem.lower() not in ("readme", "license", "requirements")
    )
    if not files:
        raise UserError(f"{key}={named}: the folder holds no data file; looked for {' '.join(ENDINGS)}")
    test = [p for p in files if _TEST.search(str(p.relative_to(path)).lower())]
    held_out = [p for p in files if p not in test and _HELD_OUT.search(str(p.relative_to(path)).lower())]
    rest = [p for p in files if p not in test and p not in held_out]
    if not rest:  # the names say nothing about a split when they say the same of every file
        return files, [], []
    return rest, held_out, test


def _download(named: str, key: str) -> Path:
    """A local copy of a hub data set, from the hub's own cache when it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = named.partition("@")
    patterns = [f"*{e}{p}" for e in ENDINGS for p in ("", *PACKERS)]
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision or None, allow_patterns=patterns))
    except (OSError, HFValidationError, ValueError) as error:
        raise UserError(
            f"{key}={named}: no such file or folder here, and the hub gave no data set of that name "
            f"({type(error).__name__}); check the name, the network, and `hf auth login` for a gated one"
        ) from None


# --- what the user names → sources ----------------------------------------------------------------


def chosen(
    path: Any,
    *,
    format: str,
    columns: dict[str, str],
    validation: str | list[str] | None,
    against: str | list[str] | None,
    replay: Any,
    cache_dir: Path,
    seed: int,
    task: str,
) -> tuple[list[Source], list[str]]:
    """(all sources, files that were left aside)."""
    sources: list[Source] = []
    aside: list[str] = []
    held_out: list[Source] = []
    named_parts = [(part, "data.path") for part in (path if isinstance(path, list) else [path])]
    if not named_parts:
        raise UserError("data.path=[]: names no data; give a file, a folder, a glob or a hub id")
    if replay is not None:
        named_parts += [(part, "data.replay") for part in (replay if isinstance(replay, list) else [replay])]
    for part, key in named_parts:
        general = key == "data.replay"
        allowed = ("path", *(() if general else ("weight",)), "format", "columns", "name")
        said: dict[str, Any] = {"path": part} if isinstance(part, str) else dict(part)
        if set(said) - set(allowed) or not isinstance(said.get("path"), str):
            raise UserError(f"{key}: {part} must be a path or have {', '.join(allowed)} and no more")
        if said.get("format", "auto") not in ("auto", *FORMATS):
            raise UserError(f"{key}: format={said['format']}: no such format; known: auto, {', '.join(FORMATS)}")
        named = said["path"]
        if named == "demo":
            named = _demo(cache_dir, seed, "sft" if general else task, "train")
        files, kept_out, tests = find(named, key=key)
        source = Source(
            str(said.get("name") or said["path"]),
            "replay" if general else "train",
            tuple(files),
            float(said.get("weight", 1.0)),
            said.get("format", "auto" if general else format),
            said.get("columns", {} if general else columns),
        )
        sources.append(source)
        if kept_out and validation is None and not general:
            held_out.append(replace(source, kind="validation", files=tuple(kept_out), weight=1.0))
        else:
            aside += map(str, kept_out)
        aside += map(str, tests)
    sources += held_out
    if validation == []:
        raise UserError("data.validation=[]: names no data; give a file, or data.validation_share=0 for none")
    for kind, named_files in (("validation", validation), ("against", against)):
        for named in [named_files] if isinstance(named_files, str) else named_files or ():
            place = _demo(cache_dir, seed, task, "validation") if named == "demo" else named
            files, more, tests = find(place, key=f"data.{kind}")
            own = columns if kind == "validation" else {}
            how = format if kind == "validation" else "auto"
            sources.append(Source(named, kind, tuple(files + more + tests), 1.0, how, own))
    names = Counter(s.name for s in sources if s.kind in ("train", "replay"))
    double = [name for name, n in names.items() if n > 1]
    if double:
        raise UserError(
            f"data.path: {double[0]} is named twice; for more weight use {{path: {double[0]}, weight: 2}}, and what is "
            "in data.path is not general data for data.replay"
        )
    return sources, aside


def _demo(cache_dir: Path, seed: int, task: str, split: str) -> str:
    """The demo's file for a task, made here."""
    from ftdist import demo

    directory = cache_dir.parent / "demo"
    if task == "dpo":
        return str(demo.preferences(directory, seed, split))
    return str(demo.dataset(directory, seed) if split == "train" else demo.held_out(directory, seed))
