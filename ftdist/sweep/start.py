"""A sweep from its words to its table: check, plan, prepare and freeze all members, run them, rank what came out."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

from ftdist import compose, follow, job, lease, rundir, stops
from ftdist import scheduler as slurm
from ftdist.errors import FAILED, INTERRUPTED, STOPPED, Failed, UserError
from ftdist.sweep import checks, directory, keys, local, rank
from ftdist.sweep.directory import Member, State

CHANGEABLE = ("sweep.parallel", "sweep.retries", "sweep.trials")  # keys of the sweep that a resume may change
RESOURCES = ("cluster", "checkpoint", "health", "train_until")  # of its members
SHAPE = ("cluster.name", "cluster.nodes", "cluster.processes")  # but not these: the global batch is made of them


class Source(Protocol):
    """Where a sweep's members come from, and who is told what became of them."""

    def take(self) -> str | None: ...

    def look(self, name: str) -> None: ...

    def ended(self, name: str, state: State) -> None: ...


class Grid:
    """Members that were all known at the start."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self.wanted = directory.read(sweep_dir)["sweep"]["objective"]
        self.waiting = directory.unfinished(sweep_dir)

    def take(self) -> str | None:
        return self.waiting.pop(0) if self.waiting else None

    def look(self, name: str) -> None:
        pass

    def ended(self, name: str, state: State) -> None:
        rank.settled(self.sweep_dir / name, state, self.wanted)


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
        "later": [],
        "sweep": sweep,
        "seed": first["seed"],
        "directory": str(Path.cwd()),
    }
    if automatic and directory.is_sweep(sweep_dir):
        _refuse_other(sweep_dir, asked, made.words)
        go_on(sweep_dir, [])
        return
    if directory.is_sweep(sweep_dir):
        raise UserError(f"sweep_dir={sweep_dir}: holds a sweep already; go on with it: ftdist resume {sweep_dir}, or "
                        "choose another")  # fmt: skip
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
    checks.fit_on_disk(plans, sweep["trials"] if searching else None, sweep_dir, first["must_fit"])
    if in_slurm(configs):
        from ftdist.sweep import array

        array.check(configs, sweep)
        _fill(configs, plans, searching)
        if _asked(sweep_dir, sweep, configs):
            return
    else:
        checks.places(sweep, configs)
        checks.fit_together(plans, sweep["parallel"], configs)
    with rundir.claimed(sweep_dir) as token:
        checks.prepared(configs, sweep["objective"])
        members = [] if searching else [Member(*pair) for pair in zip(named, made.words, strict=True)]
        directory.write(sweep_dir, asked, members, configs if members else [])
        if in_slurm(configs):
            array.freeze(sweep_dir, [member.name for member in members])
        (sweep_dir / rundir.CLAIM).unlink()  # a sweep is never an unfinished start of a run
    try:
        count = sweep["trials"] if searching else len(members)
        what = "trials" if searching else "members"
        print(f"{count} {what} in {sweep_dir}, ranked by {sweep['objective']} ({sweep['direction']})", flush=True)
        _run(sweep_dir, configs)
    finally:
        lease.release(sweep_dir, token)


def go_on(sweep_dir: Path, words: list[str]) -> None:
    """`ftdist resume SWEEP [sweep.parallel=2 cluster.time=…]`: what is finished stays, the rest goes on."""
    asked = directory.read(sweep_dir)
    sweep, later = _changes(asked, words)
    if Path(asked["directory"]).is_dir():
        os.chdir(asked["directory"])  # relative paths of the configurations
    with lease.held(sweep_dir):
        (sweep_dir / rundir.CLAIM).unlink(missing_ok=True)  # of a start that was killed
        local.wait_for_earlier(sweep_dir)
        jobs: dict[str, Any] = {}
        owners: dict[str, str] = {}
        if (sweep_dir / "arrays").is_dir():
            from ftdist.sweep import array

            jobs, owners = array.active(sweep_dir), array.owners(sweep_dir)
        new = {word.partition("=")[0] for word in later}
        asked |= {"sweep": sweep, "later": [*(w for w in asked["later"] if w.partition("=")[0] not in new), *later]}
        if sweep["name"] == "search":
            from ftdist.sweep import search

            configs = search.examples(asked)
            for config in configs:
                checks.completed(config, asked, sweep_dir)
                job.decide(config)
            if in_slurm(configs):
                _fill(configs, [dict(job.plan(config)) for config in configs], searching=True)
            with lease.locked(sweep_dir):
                search.Search(sweep_dir).catch_up()
        left = [name for name in directory.unfinished(sweep_dir) if owners.get(name) not in jobs]
        changed = _reworded(sweep_dir, left, later)
        if sweep["name"] == "grid":
            names = [member.name for member in directory.members(sweep_dir)]
            configs = [changed.get(name) or directory.config(sweep_dir, name) for name in left or names]
        if in_slurm(configs):
            from ftdist.sweep import array

            if jobs:
                print(f"{len(jobs)} jobs of this sweep wait or run; they are left alone", flush=True)
            if (left or sweep["name"] == "search") and _asked(sweep_dir, sweep, configs):
                return
        for name, config in changed.items():
            directory.configure(sweep_dir, name, config)
        directory.change(sweep_dir, sweep=sweep, later=asked["later"])
        if in_slurm(configs):
            array.freeze(sweep_dir, [name for name in left if (sweep_dir / name).is_dir() or sweep["name"] == "grid"])
        directory.reopen(sweep_dir, left)
        print(f"going on with {sweep_dir} ({len(left)} members unfinished)", flush=True)
        _run(sweep_dir, configs)


def _changes(asked: dict[str, Any], words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The keys of `sweep` as they are from now on, and the words that are for its members."""
    sweep, later = dict(asked["sweep"]), []
    own = {word.partition("=")[0] for entry in asked["members"] for word in entry["words"]} | set(
        sweep.get("space", ())
    )
    for word in words:
        key, _, value = word.partition("=")
        group, _, name = key.partition(".")
        if key in CHANGEABLE and name in sweep:
            sweep[name] = int(value) if value.isdigit() else value
        elif group in RESOURCES and key not in SHAPE and (name or key == "train_until") and "=" in word:
            if key in own:
                raise UserError(f"{word}: the members of this sweep differ in it; it cannot change")
            later.append(word)
        else:
            fitting = [k for k in CHANGEABLE if k.partition(".")[2] in sweep]
            raise UserError(f"{word}: cannot change in a sweep that has begun; what can: {', '.join(fitting)}, and of "
                            "its members cluster.KEY (but nodes and processes), checkpoint.KEY, health.KEY, "
                            "train_until")  # fmt: skip
    keys.check(sweep)
    return sweep, later


def _reworded(sweep_dir: Path, names: list[str], words: list[str]) -> dict[str, dict[str, Any]]:
    """The configurations of these members with what a resume says; nothing is written. UserError for what cannot be."""
    from ftdist import resume

    found = {}
    for name in names if words else ():
        if directory.is_configured(sweep_dir, name):
            found[name] = directory.config(sweep_dir, name)
            resume.reword(found[name], words)
            job.check(found[name])
            if found[name]["cluster"]["name"] == "slurm":
                job.settle(found[name]["cluster"], found[name]["hardware"]["name"])
    return found


def _fill(configs: list[dict[str, Any]], plans: list[dict[str, Any]], searching: bool) -> None:
    """Memory and time that SLURM is asked for, from the plans: the same for all, so that they are one array.

    searching: a worker runs one trial after another, so that no plan knows its time.
    """
    if searching:
        plans = [{"asks": {"memory": plan["asks"]["memory"]}} for plan in plans]
    for config in configs:
        config["cluster"] = slurm.filled(config["cluster"], plans)


def _asked(sweep_dir: Path, sweep: dict[str, Any], configs: list[dict[str, Any]]) -> bool:
    """Ask SLURM whether the arrays could start, as far as that is wanted; whether nothing else is."""
    from ftdist.sweep import array

    only = configs[0]["cluster"]["test_only"]
    if only or configs[0]["cluster"]["check"]:
        said = array.would_start(sweep_dir, sweep, [config["cluster"] for config in configs])
        if only:
            print("\n".join(said), flush=True)
    return bool(only)


def in_slurm(configs: list[dict[str, Any]]) -> bool:
    """Where the members run. UserError if some are jobs and others are not."""
    names = {config["cluster"]["name"] for config in configs}
    if len(names) > 1:
        raise UserError(f"cluster: the members of one sweep run in one place, these in {' and '.join(sorted(names))}")
    return names == {"slurm"}


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
    (sweep_dir / stops.REQUEST).unlink(missing_ok=True)
    why = None
    if in_slurm(configs):
        from ftdist.sweep import array

        _queue(sweep_dir, sweep, configs[0]["cluster"])
        if array.active(sweep_dir):
            if not configs[0]["cluster"]["wait"]:
                print(f"state: ftdist status {sweep_dir}    results: ftdist report {sweep_dir}    "
                      f"end it: ftdist stop {sweep_dir}\nsweep: {sweep_dir}", flush=True)  # fmt: skip
                return
            why = array.wait(sweep_dir, lambda name, state: print(f"{name}: {state.state}", flush=True))
    else:
        places, limit = checks.places(sweep, configs), stops.Limit(configs[0]["train_until"])
        why = local.run(sweep_dir, source.take, source.look, source.ended, places, sweep["retries"], limit)
    _conclude(sweep_dir, sweep, why)


def _queue(sweep_dir: Path, sweep: dict[str, Any], cluster: dict[str, Any]) -> None:
    """Submit what has no job."""
    from ftdist.sweep import array

    jobs, owners = array.active(sweep_dir), array.owners(sweep_dir)
    names = [name for name in directory.unfinished(sweep_dir) if owners.get(name) not in jobs]
    if sweep["name"] == "grid":
        array.queue(sweep_dir, names)
        return
    left = len(names) + max(0, sweep["trials"] - len(directory.members(sweep_dir)))
    if (count := min(sweep["parallel"], left) - len(jobs)) > 0:
        array.queue_workers(sweep_dir, cluster, count)


def stop(sweep_dir: Path) -> str:
    """Ask a sweep to stop: the running members save, no other starts; what was done. UserError: it is not active."""
    names = directory.unfinished(sweep_dir)
    stops.request(sweep_dir, follow.STOP)
    done = []
    for name in names:
        if (sweep_dir / name / follow.JOB).is_file():
            with contextlib.suppress(UserError):  # not active
                done.append(f"{name}: {follow.stop(sweep_dir / name)}")
    if (sweep_dir / "arrays").is_dir():
        from ftdist import scheduler as slurm
        from ftdist.sweep import array

        waiting = [number for number, one in array.active(sweep_dir).items() if one.state == "PENDING"]
        if waiting:
            slurm.cancel(waiting)
            done.append(f"{len(waiting)} waiting jobs are out of the queue")
    if lease.living(sweep_dir) is not None:
        done.append("no other member starts, the running ones save; ftdist resume goes on")
    if not done:
        (sweep_dir / stops.REQUEST).unlink()
        raise UserError(f"{sweep_dir}: not active ({len(names)} members unfinished); nothing to stop")
    return "\n".join(done)


def _conclude(sweep_dir: Path, sweep: dict[str, Any], why: str | None) -> None:
    """The table, and the status as Failed."""
    rows = rank.results(sweep_dir)
    print(rank.table(rows, sweep["objective"]), flush=True)
    print(f"sweep: {sweep_dir}", flush=True)
    failed = [row for row in rows if row["state"] == directory.FAILED]
    stopped = [row for row in rows if row["state"] not in (directory.FAILED, *directory.DONE)]
    again = f"go on with: ftdist resume {sweep_dir}"
    if why or stopped:
        reason = f" ({why})" if why else ""
        status = INTERRUPTED if why == "Ctrl-C" else STOPPED
        raise Failed(f"stopped{reason}: {len(stopped)} of {len(rows)} members are unfinished; {again}", status)
    missing = sweep["trials"] - len(rows) if sweep["name"] == "search" else 0
    if missing > 0:
        raise Failed(f"{missing} of {sweep['trials']} trials were never begun: whoever makes them has ended "
                     f"(logs/); {again}", FAILED)  # fmt: skip
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
