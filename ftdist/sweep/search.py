"""A search: Optuna's TPE suggests, each trial is a member of the sweep, poor ones are pruned.

What has been tried lies in SWEEP/trials.journal, which several processes may write. What is suggested depends on the
seed, the trial's number and what was known at that moment: a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
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
LOOK = 1.0  # seconds between two looks for a trial whose owner is gone
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
    for word in (*asked["words"], *asked["later"]):
        if word.partition("=")[0].lstrip("+") in space:
            raise UserError(f"{word}: sweep.space has this key too; leave one of the two out")
    found = []
    for key, dimension in space.items():
        others = [keys.word(other, space[other].ends[0]) for other in space if other != key]
        values = [keys.word(key, value).partition("=")[2] for value in dimension.ends]
        found += compose.compose(
            "train", [*asked["words"], *asked["later"], *others, f"{key}={','.join(values)}", "-m"]
        )
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
        """The next trial: one that was begun and has nobody, else a new one; None when there were enough.

        It waits for one whose owner is gone, but not for so long that its processes are known to be.
        """
        while True:
            with lease.locked(self.sweep_dir):
                self.catch_up()
                member, dying = self._open()
                member = member or self._new()
                if member is not None:
                    directory.mark(self.sweep_dir, member.name, state=directory.RUNNING, owner=self.owner)
            if member is not None and self._configured(member):
                return member.name
            if member is None and (not dying or stops.requested(self.sweep_dir)):
                return None
            if member is None:
                time.sleep(LOOK)

    def _open(self) -> tuple[Member | None, bool]:
        """A trial that was begun and has nobody; whether there is one that will have nobody soon."""
        dying = False
        for member in directory.members(self.sweep_dir):
            state = directory.state(self.sweep_dir, member.name)
            if state.state == directory.WAITING:
                return member, False
            if state.state != directory.RUNNING or state.owner is None or self.owner is None:
                continue
            if state.owner == self.owner:  # of an earlier start of this job
                return member, False
            if not self.alive(state.owner):
                if lease.living(self.sweep_dir / member.name) is None:
                    return member, False
                dying = True
        return None, dying

    def _new(self) -> Member | None:
        """A trial that was not there before; None when there are enough."""
        trials = self.study.get_trials()
        if len(trials) >= self.sweep["trials"]:
            return None
        # Asked of a copy: the storage gets a trial whole or not at all, however this process ends.
        copy = optuna.create_study(
            direction=self.sweep["direction"],
            sampler=_sampler(self.asked["seed"], len(trials), self.sweep["random_trials"]),
        )
        copy.add_trials(trials)
        distributions = _distributions(self.space)
        params = copy.ask(distributions).params
        self.study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        )
        return self._added(len(trials), params)

    def _added(self, number: int, params: dict[str, Any]) -> Member:
        words = [keys.word(key, _value(self.space[key], params[key])) for key in self.space]
        (name,) = directory.names([words], first=number)
        directory.add(self.sweep_dir, member := Member(name, words))
        return member

    def catch_up(self) -> None:
        """Do what a process was to do that was killed: list a trial that it took, tell the study what came out.

        For whoever has the sweep's lock.
        """
        names = {_number(member.name): member.name for member in directory.members(self.sweep_dir)}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number not in names:
                self._added(trial.number, trial.params)
            elif not trial.state.is_finished():
                self._told(names[trial.number], directory.state(self.sweep_dir, names[trial.number]))

    def _configured(self, member: Member) -> bool:
        """Write down how a trial is to run, where nobody has; whether it can."""
        if directory.is_configured(self.sweep_dir, member.name):
            return True
        try:
            (config,) = compose.compose("train", [*self.asked["words"], *self.asked["later"], *member.words])
            checks.completed(config, self.asked, self.sweep_dir)
            config["run_dir"] = str(self.sweep_dir / member.name)
            job.ready(config)
        except UserError as failure:  # a combination that the ends of the space did not show
            state = directory.mark(self.sweep_dir, member.name, state=directory.REFUSED, reason=str(failure))
            self.ended(member.name, state)
            return False
        directory.configure(self.sweep_dir, member.name, config)
        return True

    def look(self, name: str) -> None:
        """Tell the pruner what a trial's evaluations said, and ask the trial to stop if it is poor."""
        series = self._report(name)
        if series and self._trial(name).should_prune() and not (self.sweep_dir / name / stops.REQUEST).exists():
            stops.request(self.sweep_dir / name, f"{PRUNED}: {self.sweep['objective']} {series[-1][1]:.6g}")

    def _report(self, name: str) -> list[tuple[int, float]]:
        """Tell the study of the evaluations that it has not known until now; (step, value) of all."""
        trial = self._trial(name)
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        series = objective.series(self.sweep_dir / name, self.sweep["objective"])
        for step, value in series:
            if step not in known:
                trial.report(value, step)
        return series

    def ended(self, name: str, state: State) -> None:
        """Tell the study what came out. What failed or was stopped stays open there, until it is gone on with."""
        with lease.locked(self.sweep_dir):
            state = self._told(name, state)
        rank.settled(self.sweep_dir / name, state, self.sweep["objective"])

    def _told(self, name: str, state: State) -> State:
        """The study knows what came out of a trial; its state by now. For whoever has the sweep's lock."""
        if state.state == directory.STOPPED and re.search(rf"(^|\(){PRUNED}: ", state.reason or ""):
            state = directory.mark(self.sweep_dir, name, state=directory.PRUNED, reason=None)
        wanted = self.sweep["objective"]
        state = rank.judged(self.sweep_dir / name, state, wanted)
        if state.state not in directory.DONE:
            return state
        number = _number(name)
        if self.study.get_trials(deepcopy=False)[number].state.is_finished():
            return state
        if state.state == directory.REFUSED:
            self.study.tell(number, state=TrialState.FAIL)
            return state
        if objective.while_training(wanted):
            self._report(name)
        if state.state == directory.PRUNED:
            if not self.sweep["keep_pruned"]:
                shutil.rmtree(self.sweep_dir / name / checkpoint.FOLDER, ignore_errors=True)
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, rank.value(self.sweep_dir / name, state, wanted))
        return state

    def _trial(self, name: str) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[_number(name)]._trial_id)


def _number(name: str) -> int:
    """A trial's number, with which its name begins."""
    return int(name.partition("-")[0])


class _Lock:
    """The journal's: one that the kernel lets go of when its holder is killed. Optuna's own stands for 30 s more."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self.held: AbstractContextManager[None] | None = None

    def acquire(self) -> bool:
        held = directory.locked(self.sweep_dir)
        held.__enter__()
        self.held = held
        return True

    def release(self) -> None:
        assert self.held is not None
        held, self.held = self.held, None
        held.__exit__(None, None, None)


def _study(sweep_dir: Path, sweep: dict[str, Any]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep["pruner"] == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=sweep["prune_from"], n_warmup_steps=sweep["prune_after"])
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(sweep_dir / JOURNAL), _Lock(sweep_dir))),  # type: ignore[arg-type]  # its base is private
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
