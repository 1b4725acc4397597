"""A search: Optuna's TPE suggests, each trial is a member of the sweep, poor ones are pruned.

What has been tried lies in SWEEP/trials.journal, which several processes may write. What is suggested depends on the
seed, the trial's number and what was known at that moment: a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ftdist import checkpoint, compose, job, lease, stops
from ftdist.errors import UserError
from ftdist.sweep import checks, directory, keys, objective, rank
from ftdist.sweep.directory import Member, State

JOURNAL = "trials.journal"
PRUNED = "pruned"  # begins the reason of a stop that the search asked for


def examples(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Configurations at the ends of the space, one key at a time, so that a mistake is found before the first trial."""
    sweep = asked["sweep"]
    if sweep["pruner"] == "median" and not objective.while_training(sweep["objective"]):
        raise UserError(
            f"sweep.pruner=median: sweep.objective={sweep['objective']} is not known while a trial trains; "
            "use sweep.pruner=none, or an objective of the evaluations while training (eval_loss)"
        )
    space = keys.space(sweep["space"])
    for word in asked["words"]:
        if word.partition("=")[0].lstrip("+") in space:
            raise UserError(f"{word}: sweep.space has this key too; leave one of the two out")
    found = []
    for key, dimension in space.items():
        others = [keys.word(other, space[other].ends[0]) for other in space if other != key]
        values = [keys.word(key, value).partition("=")[2] for value in dimension.ends]
        found += compose.compose("train", [*asked["words"], *others, f"{key}={','.join(values)}", "-m"])
    for config in found:
        config["run_dir"] = None
    return found


class Search:
    """The trials of a sweep: those that were not finished, then new ones."""

    def __init__(
        self, sweep_dir: Path, owner: str | None = None, alive: Callable[[str], bool] = lambda _: False
    ) -> None:
        """owner: who takes the trials, where several do; alive: whether another owner is."""
        self.sweep_dir, self.owner, self.alive = sweep_dir, owner, alive
        self.asked = directory.read(sweep_dir)
        self.sweep = self.asked["sweep"]
        self.space = keys.space(self.sweep["space"])
        self.study = _study(sweep_dir, self.sweep)

    def take(self) -> str | None:
        """The next trial: one that was begun and has nobody, else a new one; None when there were enough."""
        with lease.locked(self.sweep_dir):
            for member in directory.members(self.sweep_dir):
                if self._has_nobody(directory.state(self.sweep_dir, member.name)):
                    directory.mark(self.sweep_dir, member.name, state=directory.RUNNING, owner=self.owner)
                    return member.name
        while True:
            with lease.locked(self.sweep_dir):
                number = len(self.study.get_trials(deepcopy=False))
                if number >= self.sweep["trials"]:
                    return None
                self.study.sampler = _sampler(self.asked["seed"], number, self.sweep["random_trials"])
                trial = self.study.ask(_distributions(self.space))
            words = [keys.word(key, _value(self.space[key], trial.params[key])) for key in self.space]
            (name,) = directory.names([words], first=trial.number)
            directory.mark(self.sweep_dir, name, state=directory.RUNNING, owner=self.owner)
            try:
                (config,) = compose.compose("train", [*self.asked["words"], *words])
                checks.completed(config, self.asked, self.sweep_dir)
                config["run_dir"] = str(self.sweep_dir / name)
                job.ready(config)
            except UserError as failure:  # a combination that the ends of the space did not show
                self.study.tell(trial.number, state=TrialState.FAIL)
                directory.add(self.sweep_dir, Member(name, words), {})
                state = directory.mark(self.sweep_dir, name, state=directory.REFUSED, reason=str(failure))
                rank.settled(self.sweep_dir, name, state)
                continue
            directory.add(self.sweep_dir, Member(name, words), config)
            return name

    def _has_nobody(self, state: State) -> bool:
        if state.state == directory.RUNNING and state.owner is not None:
            return state.owner == self.owner or not self.alive(state.owner)
        return state.state == directory.WAITING

    def look(self, name: str) -> None:
        """Tell the pruner what a trial's evaluations said, and ask the trial to stop if it is poor."""
        trial = self._trial(name)
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [
            pair for pair in objective.series(self.sweep_dir / name, self.sweep["objective"]) if pair[0] not in known
        ]
        for step, value in new:
            trial.report(value, step)
        if new and trial.should_prune() and not (self.sweep_dir / name / stops.REQUEST).exists():
            stops.request(self.sweep_dir / name, f"{PRUNED}: {self.sweep['objective']} {new[-1][1]:.6g}")

    def ended(self, name: str, state: State) -> None:
        """Tell the study what came out. What failed or was stopped stays open there, until it is gone on with."""
        run_dir = self.sweep_dir / name
        if state.state == directory.STOPPED and re.search(rf"(^|\(){PRUNED}: ", state.reason or ""):
            self.look(name)
            state = directory.mark(self.sweep_dir, name, state=directory.PRUNED, reason=None)
            if not self.sweep["keep_pruned"]:
                shutil.rmtree(run_dir / checkpoint.FOLDER, ignore_errors=True)
            self.study.tell(self._trial(name).number, state=TrialState.PRUNED)
        value = rank.settled(self.sweep_dir, name, state)
        if value is not None:
            if objective.while_training(self.sweep["objective"]):
                self.look(name)
            self.study.tell(self._trial(name).number, value)

    def _trial(self, name: str) -> optuna.trial.Trial:
        number = int(name.partition("-")[0])
        return optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)


def _study(sweep_dir: Path, sweep: dict[str, Any]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep["pruner"] == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=sweep["prune_from"], n_warmup_steps=sweep["prune_after"])
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(sweep_dir / JOURNAL))),
        study_name="sweep",
        direction=sweep["direction"],
        pruner=pruner,
        load_if_exists=True,
    )


def _sampler(seed: int, number: int, random_trials: int) -> optuna.samplers.TPESampler:
    """A sampler of each trial's own: one whose random numbers went on would begin again at every start."""
    return optuna.samplers.TPESampler(
        seed=random.Random(f"{seed} {number}").getrandbits(32), n_startup_trials=random_trials
    )


def _distributions(space: dict[str, keys.Choice | keys.Range]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, dimension in space.items():
        if isinstance(dimension, keys.Choice):  # Optuna stores plain scalars: a value stands for itself by its place
            found[key] = optuna.distributions.CategoricalDistribution([keys.word("", v)[1:] for v in dimension.values])
        elif dimension.whole:
            low, high = int(dimension.low), int(dimension.high)
            found[key] = optuna.distributions.IntDistribution(low, high, log=dimension.log)
        else:
            found[key] = optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return found


def _value(dimension: keys.Choice | keys.Range, found: Any) -> Any:
    if isinstance(dimension, keys.Range):
        return found
    return next(value for value in dimension.values if keys.word("", value)[1:] == found)
