"""Hydra → plain dicts. Composed once, in one process; nothing behind this file knows Hydra."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from ftdist import schema, trainkeys
from ftdist.errors import UserError

# Mappings that take keys which their YAML does not show; the names under `train` are known.
OPEN = (r"(?:train\.(\w+)(?:\.\w+)*|engine\.zero\.\w+|cluster\.(?:sbatch|environment)\.\w+|"
        r"data\.(?:columns|template_keywords)(?:\.\w+)?)=")  # fmt: skip
HYDRAS = r"hydra\.(sweeper\.\w+|searchpath)="  # keys of Hydra itself that do something here


@dataclass(frozen=True)
class Composed:
    """What a command line makes. words: each member's own overrides, those that make it differ from the others."""

    sweep: dict[str, Any]  # the group `sweep`
    sweep_dir: str | None
    several: bool  # `-m` was given
    configs: list[dict[str, Any]]
    words: list[list[str]]


def compose(verb: str, argv: list[str]) -> list[dict[str, Any]]:
    """The configurations that `argv` (Hydra overrides and flags) make: one, several with `-m`, none with `--cfg`.

    With `-m` the runs are named inside `sweep_dir`. UserError says in one line what the user got wrong.
    """
    made = several(verb, argv)
    if verb == "train" and made.sweep.get("name") == "search":
        raise UserError("sweep=search: one run is wanted here; `ftdist train` searches")
    return made.configs


def several(verb: str, argv: list[str]) -> Composed:
    """The same with what is a sweep's own."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from ftdist.sweep import directory, keys

    composed: list[tuple[Any, list[str] | None]] = []

    def keep(cfg: Any) -> None:
        job = HydraConfig.get()
        sweep = job.mode is not None and job.mode.name == "MULTIRUN"
        composed.append((cfg, list(job.overrides.task) if sweep else None))

    words = [*_plugin_path(), *_rewritten(argv)]
    scratch = tempfile.TemporaryDirectory()  # for Hydra's own record of a sweep, which nothing reads
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own printing
    configs: list[dict[str, Any]] = []
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]  # its own prints a page and exits
    try:
        overrides = parser.parse_intermixed_args(words).overrides
        for word in overrides:
            words.remove(word)
        sys.argv = [f"ftdist {verb}", *words, *overrides, f"hydra.sweep.dir={scratch.name}"]  # Hydra wants flags first
        hydra.main(version_base="1.3", config_path="pkg://ftdist.conf", config_name="config")(keep)()
        for cfg, _ in composed:
            config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            config.pop("experiment", None)
            configs.append(config)
    except Exception as failure:
        if not _raised_by_hydra(failure):
            raise
        raise UserError(_explained(failure, overrides))
    finally:
        sys.argv = before
        scratch.cleanup()
    many = any(own is not None for _, own in composed)
    own = directory.own_words([own or [] for _, own in composed])
    settings = [(config.pop("sweep"), config.pop("sweep_dir")) for config in configs]
    for sweep, folder in settings:
        keys.check(sweep)
        if (sweep, folder) != settings[0]:
            raise UserError("sweep: its keys have one value for all members, and take no list with -m")
    if not configs:
        return Composed({}, None, many, [], [])
    if not many and settings[0][0]["name"] == "grid":
        for word in argv:
            if re.match(r"\+*sweep(\.|_dir=)", word):
                raise UserError(f"{word}: only a sweep reads this; add -m, or sweep=search")
    if many:
        folder = Path(settings[0][1] or directory.fresh_name(configs[0]["model"]["path"]))
        for config, name in zip(configs, directory.names(own), strict=True):
            if config["run_dir"] is not None:
                raise UserError(f"run_dir={config['run_dir']}: the folder of a sweep's runs is sweep_dir=DIR")
            config["run_dir"] = str(folder / name)
    return Composed(*settings[0], many, configs, own)


def group(verb: str, name: str, argv: list[str], frozen: dict[str, Any]) -> dict[str, Any]:
    """The group `name` of a run (`frozen`), changed by `argv`: keys of it, or another choice for the whole of it.

    Keys that the run does not know, since it is of an earlier version, get their defaults.
    """
    for word in argv:
        if word.startswith("-") or not re.match(rf"{name}(\.|=)", word):
            raise UserError(f"{word}: {verb} takes a run and {name}.KEY=VALUE")
    found: dict[str, Any] = compose(verb, argv)[0][name]
    if not any(word.startswith(f"{name}=") for word in argv):
        _overlay(found, frozen, name, {word.partition("=")[0] for word in argv})
    return found


def _overlay(values: dict[str, Any], frozen: dict[str, Any], prefix: str, kept: set[str]) -> None:
    for key in values:
        path = f"{prefix}.{key}"
        if key not in frozen or path in kept:
            continue
        inner = any(word.startswith(f"{path}.") for word in kept)
        if inner and isinstance(values[key], dict) and isinstance(frozen[key], dict):
            _overlay(values[key], frozen[key], path, kept)
        else:
            values[key] = frozen[key]


def complete(words: list[str]) -> list[str]:
    """What the last of `words` (those after the verb) may become: groups, choices and keys."""
    from hydra import initialize_config_module
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("ftdist.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        line = " ".join([*_plugin_path(), *words])
        found = BashCompletion(hydra.config_loader)._query(config_name="config", line=line)
    return sorted(word for word in found if not word.startswith("hydra"))


def choices(group: str | None) -> dict[str, str]:
    """Group → its choices; or, for one group, choice → its line of meaning (the first comment of its file)."""
    roots = [Path(str(resources.files(package))) for package in ["ftdist.conf", *_plugin_packages()]]
    if group is None:
        names = sorted({d.name for root in roots for d in root.iterdir() if d.is_dir() and any(d.glob("*.yaml"))})
        return {name: ", ".join(choices(name)) for name in names}
    files = [file for root in roots for file in sorted((root / group).glob("*.yaml"))]
    if not files:
        raise UserError(f"ls {group}: no such group; {schema.nearest(group, list(choices(None)))}")
    return {file.stem: _meaning(file) for file in files}


def _meaning(file: Path) -> str:
    comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return next((line for line in comments if not line.startswith("@package")), "")


def _plugin_packages() -> list[str]:
    """Packages of installed plug-ins that hold config groups of their own (entry-point group `ftdist.conf`)."""
    return sorted(point.value for point in entry_points(group="ftdist.conf"))


def _plugin_path() -> list[str]:
    """The override that shows Hydra the groups of installed plug-ins."""
    packages = _plugin_packages()
    return [f"hydra.searchpath=[{','.join('pkg://' + name for name in packages)}]"] if packages else []


def _rewritten(argv: list[str]) -> Iterator[str]:
    """The user's words, where mappings that take more keys than they show need no `+` of Hydra's."""
    for word in argv:
        if word.startswith("~"):
            raise UserError(f"{word}: keys are set, not taken away; give {word[1:]} another value or choice")
        if re.match(r"\+*hydra\.", word) and not re.match(HYDRAS, word.lstrip("+")):
            raise UserError(f"{word}: not read here; use run_dir=… (with -m sweep_dir=…)")
        match = re.match(OPEN, word)
        if match and match[1]:
            trainkeys.check_name(match[1])
        yield f"++{word}" if match else word


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; ftdist train --help tells the flags")


def _raised_by_hydra(failure: BaseException) -> bool:
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals["__name__"]).startswith(("hydra.", "omegaconf."))


def _explained(failure: Exception, words: list[str]) -> str:
    """Hydra's and OmegaConf's errors in one line, with the nearest right name."""
    text = str(failure)
    if match := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, choice = match.groups()
        available = re.findall(r"^\t(\S+)", text.partition("Config search path")[0], re.M)
        return f"{group}={choice}: no such choice; {schema.nearest(choice, available)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key, known = match[1], _known_keys(words)
        group = key.split(".")[0]
        inside = [k for k in known if k.startswith(f"{group}.") and k != f"{group}.name"]
        near = inside if "." in key and group in known else [k for k in known if "." not in k]
        return f"{key}: no such key; {schema.nearest(key, near)}"
    if type(failure).__name__ == "MissingMandatoryValue":
        key = getattr(failure, "full_key", None)
        return f"{key}: missing; set {key}=…"
    first = next((line for line in text.splitlines() if line.strip()), type(failure).__name__)
    override = str(getattr(failure, "override", None) or "").lstrip("+")
    if override and "=" not in override:
        return f"{override}: not KEY=VALUE; data.path={override} or model.path={override}?"
    if "group override must be" in text:  # a number or null, and Hydra does not say whose
        pairs = [word.split("=", 1) for word in words if "=" in word]
        group, choice = next(((g, c) for g, c in pairs if re.fullmatch(r"null|true|false|[\d.]+", c)), ("", ""))
        known = list(choices(group if group in choices(None) else None))
        return f"{group}={choice}: no such choice; known: {', '.join(known)}"
    if match := re.match(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1].lstrip('+')}: several values; add -m to run them one after another"
    if override and type(failure).__name__ == "OverrideParseException":
        key, _, value = override.partition("=")
        return f"""{override}: not understood ({first.strip()}); put the value in quotes: '{key}="{value}"'"""
    override = override or str(getattr(failure, "full_key", None) or "")
    return f"{override}: {first.strip()}" if override else first.strip()


def _known_keys(words: list[str]) -> list[str]:
    """Every key and group of the configuration that the group choices among `words` make."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import DictConfig

    def flat(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            if isinstance(node._get_node(key), DictConfig):
                yield from flat(node._get_node(key), f"{prefix}{key}.")

    with initialize_config_module("ftdist.conf", version_base="1.3"):
        groups = set(choices(None))
        chosen = [w for w in words if w.split("=")[0] in {*groups, "hydra.searchpath"} and "," not in w]
        try:
            return list(flat(hydra_compose("config", overrides=chosen), ""))
        except Exception:  # one of them is a choice that does not exist here; the bare configuration will do
            return list(flat(hydra_compose("config"), ""))
