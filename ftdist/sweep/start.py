"""A sweep from its words to its table: check, plan, prepare and freeze all members, run them, rank what came out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from ftdist import compose, lease, rundir, stops
from ftdist.errors import FAILED, INTERRUPTED, STOPPED, Failed, UserError
from ftdist.sweep import checks, directory, keys, local, rank
from ftdist.sweep.directory import Member, State

CHANGEABLE = ("sweep.parallel", "sweep.retries", "sweep.trials")


class Source(Protocol):
    """Where a sweep's members come from, and who is told what became of them."""

    def take(self) -> str | None: ...

    def look(self, name: str) -> None: ...

    def ended(self, name: str, state: State) -> None: ...


class Grid:
    """Members that were all known at the start."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self.waiting = unfinished(sweep_dir)

    def take(self) -> str | None:
        return self.waiting.pop(0) if self.waiting else None

    def look(self, name: str) -> None:
        pass

    def ended(self, name: str, state: State) -> None:
        rank.settled(self.sweep_dir, name, state)


def start(made: compose.Composed, argv: list[str]) -> None:
    """Everything that `ftdist train -m …` or `sweep=search` does. Failed if a member has failed or was stopped."""
    sweep, first = made.sweep, made.configs[0]
    searching = sweep["name"] == "search"
    if searching and made.several:
        raise UserError("sweep=search: -m makes a grid of the values given; leave one of the two out")
    if searching and first["run_dir"] is not None:
        raise UserError(f"run_dir={first['run_dir']}: the folder of a search's runs is sweep_dir=DIR")
    automatic = first["resume"] == "auto"
    if automatic and made.sweep_dir is None:
        raise UserError("resume=auto: go on with which sweep? set sweep_dir=DIR")
    folder = made.sweep_dir or directory.fresh_name(first["model"]["path"])
    if not searching:
        folder = str(Path(first["run_dir"]).parent)
    sweep_dir = Path(folder).expanduser().absolute()
    asked = {
        "name": sweep_dir.name,
        "words": _common(argv, made.words),
        "sweep": sweep,
        "seed": first["seed"],
        "directory": str(Path.cwd()),
    }
    if automatic and directory.is_sweep(sweep_dir):
        _refuse_other(sweep_dir, asked, made.words)
        go_on(sweep_dir, [])
        return
    if automatic:
        rundir.clear_unfinished(sweep_dir)
    configs = made.configs
    if searching:
        from ftdist.sweep import search

        configs = search.examples(asked)
    for config in configs:
        checks.completed(config, asked, sweep_dir)
    plans = checks.planned(configs)
    named = directory.names(made.words)
    checks.say_plans(plans, [f"example {i}" for i in range(len(configs))] if searching else named)
    checks.places(sweep, configs)
    checks.fit_together(plans, sweep["parallel"], configs)
    with rundir.claimed(sweep_dir) as token:
        checks.prepared(configs, sweep["objective"])
        members = [] if searching else [Member(*pair) for pair in zip(named, made.words, strict=True)]
        directory.write(sweep_dir, asked, members, configs if members else [])
        (sweep_dir / rundir.CLAIM).unlink()  # a sweep is never an unfinished start of a run
    try:
        count = sweep["trials"] if searching else len(members)
        what = "trials" if searching else "members"
        print(f"{count} {what} in {sweep_dir}, ranked by {sweep['objective']} ({sweep['direction']})", flush=True)
        _run(sweep_dir, configs)
    finally:
        lease.release(sweep_dir, token)


def go_on(sweep_dir: Path, words: list[str]) -> None:
    """`ftdist resume SWEEP [sweep.parallel=2]`: what is finished stays, what was stopped or has failed goes on."""
    asked = directory.read(sweep_dir)
    sweep = dict(asked["sweep"])
    for word in words:
        key, _, value = word.partition("=")
        if key not in CHANGEABLE or key.partition(".")[2] not in sweep:
            fitting = [k for k in CHANGEABLE if k.partition(".")[2] in sweep]
            raise UserError(f"{word}: cannot change in a sweep that has begun; what can: {', '.join(fitting)}")
        sweep[key.partition(".")[2]] = int(value) if value.isdigit() else value
    keys.check(sweep)
    if Path(asked["directory"]).is_dir():
        os.chdir(asked["directory"])  # relative paths of the configurations
    with lease.held(sweep_dir):
        if sweep != asked["sweep"]:
            directory.change(sweep_dir, sweep)
        left = unfinished(sweep_dir)
        for name in left:
            directory.mark(sweep_dir, name, retries=0)
        print(f"going on with {sweep_dir} ({len(left)} members unfinished)", flush=True)
        if sweep["name"] == "search":
            from ftdist.sweep import search

            configs = search.examples(asked)
            for config in configs:
                checks.completed(config, {**asked, "sweep": sweep}, sweep_dir)
        else:
            configs = [directory.config(sweep_dir, name) for name in left]
        _run(sweep_dir, configs)


def unfinished(sweep_dir: Path) -> list[str]:
    """Members that a start has still to run, in order."""
    done = (directory.FINISHED, directory.PRUNED)
    return [m.name for m in directory.members(sweep_dir) if directory.state(sweep_dir, m.name).state not in done]


def _run(sweep_dir: Path, configs: list[dict[str, Any]]) -> None:
    """Run what is to be run, then the table. configs: what the members are like.

    Failed says with which status it ends.
    """
    sweep = directory.read(sweep_dir)["sweep"]
    if sweep["name"] == "search":
        from ftdist.sweep import search

        source: Source = search.Search(sweep_dir)
    else:
        source = Grid(sweep_dir)
    limit = stops.Limit(configs[0]["train_until"] if configs else None)
    why = local.run(
        sweep_dir, source.take, source.look, source.ended, checks.places(sweep, configs), sweep["retries"], limit
    )
    rows = rank.results(sweep_dir)
    print(rank.table(rows, sweep["objective"]), flush=True)
    print(f"sweep: {sweep_dir}", flush=True)
    failed = [row for row in rows if row["state"] == directory.FAILED]
    stopped = [row for row in rows if row["state"] in (directory.STOPPED, directory.WAITING)]
    again = f"go on with: ftdist resume {sweep_dir}"
    if why is not None or stopped:
        reason = f" ({why})" if why else ""
        status = INTERRUPTED if why == "Ctrl-C" else STOPPED
        raise Failed(f"stopped{reason}: {len(stopped)} of {len(rows)} members are unfinished; {again}", status)
    if failed:
        raise Failed(f"{len(failed)} of {len(rows)} members failed; {again}", FAILED)


def _common(argv: list[str], members: list[list[str]]) -> list[str]:
    """The words that all members share: no `-m`, nothing of the sweep's own, no lists of values."""
    own = {word.partition("=")[0] for words in members for word in words}
    return [
        word
        for word in argv
        if word not in ("-m", "--multirun")
        and (name := word.partition("=")[0].lstrip("+")) not in own
        and name.partition(".")[0] not in ("sweep", "sweep_dir", "resume")
    ]


def _refuse_other(sweep_dir: Path, asked: dict[str, Any], words: list[list[str]]) -> None:
    """resume=auto goes on with the sweep that was asked for, not with another one in its folder."""
    before = directory.read(sweep_dir)
    fixed = {k: v for k, v in asked["sweep"].items() if f"sweep.{k}" not in CHANGEABLE}
    earlier = {k: v for k, v in before["sweep"].items() if f"sweep.{k}" not in CHANGEABLE}
    grid = [entry["words"] for entry in before["members"]] if before["sweep"]["name"] == "grid" else words
    if before["words"] != asked["words"] or earlier != fixed or grid != words:
        raise UserError(
            f"sweep_dir={sweep_dir}: holds another sweep ({' '.join(before['words'])}); use its words to go on, or "
            "another sweep_dir"
        )
