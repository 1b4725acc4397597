"""A recipe of several runs, each of which starts from the one before: `then` names the words of the next."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from ftdist import compose, job, report, rundir
from ftdist import resume as resuming
from ftdist.errors import UserError
from ftdist.evaluate import tables

OWN = r"\+*(experiment|model|data|run_dir|then)(\.\w+)*="  # words of the command line that the first run alone has
NOT_THERE = r"\+*(run_dir|resume|model(?!\.adapter=)(\.\w+)*)="  # words without a meaning in `then`
SHOWN = ("preference_accuracy", "reward_accuracy", "exact_match", "extracted_match", "loss")


def of(verb: str, config: dict[str, Any], argv: list[str]) -> list[dict[str, Any]]:
    """The configurations of all runs in order, each in a folder of its own; `config` alone where nothing follows.

    As long as the run before has not ended, each has the model of the first: enough to check and to plan it.
    """
    if not config["then"]:
        return [config]
    if config["cluster"]["name"] != "local":
        refuse(config)
    job.refuse_nameless(config)  # before the folder has a name
    shared = [word for word in argv if not re.match(OWN, word)]
    folder = Path(config["run_dir"] or rundir.fresh_name(config["model"]["path"], config["strategy"]["name"]))
    found = [config]
    while found[-1]["then"]:
        for word in found[-1]["then"]:
            if re.match(NOT_THERE, word):
                raise UserError(f"then: {word}: not read, what follows has the model, the folder and the resume of the "
                                "run before it; leave it out")  # fmt: skip
        following = compose.compose(verb, [*found[-1]["then"], *shared])
        if len(following) != 1 or any(word in ("-m", "--multirun") for word in argv):
            raise UserError("then: runs that follow one another are not swept; leave out -m")
        (made,) = following
        made["resume"] = config["resume"]
        made["model"] = copy.deepcopy(config["model"]) | {"adapter": made["model"]["adapter"]}
        found.append(made)
        if len(found) > 9:
            raise UserError("then: ten runs and no end; does a recipe name itself?")
    for number, made in enumerate(found, 1):
        made["run_dir"] = str(folder / f"{number}-{made['task']['name']}")
    return found


def refuse(config: dict[str, Any]) -> None:
    """Where a job, or somebody else's launcher, is one run."""
    if config["then"]:
        raise UserError("then: a job is one run; submit the first, then the next with model.path=RUN")


def ready(stages: list[dict[str, Any]]) -> None:
    """Check every run before the first one starts; whether an adapter can go on is known when there is one."""
    for stage in stages[1:]:
        probe = copy.deepcopy(stage)
        probe["model"]["adapter"] = "merge"
        job.ready(probe)
    job.ready(stages[0])


def run(stages: list[dict[str, Any]]) -> Path:
    """Run them one after another, or go on where they were; the directory of the last."""
    done: list[Path] = []
    for stage in stages:
        if done:
            stage["model"]["path"] = str(done[-1])
            job.ready(stage)
        run_dir = Path(stage["run_dir"]).expanduser().absolute()
        if stage["resume"] == "auto" and resuming.begun(run_dir, stage):
            resuming.resume(run_dir, stage)
        else:
            job.run(stage, run_dir)
        done.append(run_dir)
        if len(stages) > 1:
            print(f"run: {run_dir}", flush=True)
    if len(stages) > 1:
        print(table(done), flush=True)
        print(f"report: {report.write(done, done[0].parent / 'report.html')}", flush=True)
    return done[-1]


def table(runs: list[Path]) -> str:
    """Held-out metrics before the first run and after each, as far as they were measured."""
    columns: dict[str, dict[str, Any]] = {}
    for number, run_dir in enumerate(runs):
        file = run_dir / "eval" / "metrics.json"
        if file.is_file():
            metrics = json.loads(file.read_text(encoding="utf-8"))
            if number == 0:
                columns["before"] = metrics.get("base", {})
            columns[f"after {run_dir.name}"] = metrics["tuned"]
    names = [name for name in SHOWN if any(values.get(name) is not None for values in columns.values())]
    if not names:
        return "nothing was evaluated after training (eval.samples=0)"
    width = max(map(len, names))
    head = f"{'held out':<{width}}" + "".join(f"{title:>16}" for title in columns)
    lines = [
        f"{name:<{width}}" + "".join(f"{tables.number(name, values.get(name)):>16}" for values in columns.values())
        for name in names
    ]
    return "\n".join([head, *lines])
