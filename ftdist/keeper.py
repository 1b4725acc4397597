"""Keeps a run: when to save, how a save becomes a commit, when to stop, where to go on. One on every rank."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ftdist import checkpoint, lease, stops
from ftdist.errors import FENCED, Failed
from ftdist.judge import Judge
from ftdist.ranks import Ranks
from ftdist.rundir import forget_last_start, record
from ftdist.state import State, copied, random_state, set_random_state, write

STATE_FILE = "trainer_state.json"  # transformers' own name and format, without its log
BEGUN = ".begun"  # beside the checkpoints: they can be lost, but not unnoticed
ROOM = 1.2  # free host memory wanted for a copy, as a multiple of its bytes
DISK = 250e6  # bytes per second that a first save is thought to be written with, until one was measured
END = 60.0  # seconds of training that are worth a checkpoint before the model is written


def choose(run_dir: Path, ranks: Ranks, token: int, run_id: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest; None for a run that has not begun to train.

    The ranks share the reading. What does not verify is set aside, and said. Failed when nothing is left: a run that
    has trained never begins again silently.
    """
    if ranks.rank == 0:
        checkpoint.remove_drafts(run_dir)
    if not ranks.from_first((run_dir / checkpoint.FOLDER).is_dir()):
        if ranks.from_first((run_dir / BEGUN).exists()):
            raise Failed(
                f"{run_dir}: the run has trained and its folder checkpoints/ is gone; bring it back, or start a new "
                "run with another run_dir",
                FENCED,
            )
        return None
    steps = ranks.from_first(checkpoint.steps(run_dir))
    for step in steps:
        path = checkpoint.folder(run_dir, step)
        manifest, reason = ranks.from_first(_read(path))
        if not reason and manifest["id"] != run_id:
            reason = "of another run"
        if not reason:
            names = sorted(manifest["files"])[ranks.rank :: ranks.world]
            reason = next(filter(None, ranks.gather(_verify(path, manifest["files"], names))), "")
        if not reason:
            return path, manifest
        if ranks.rank == 0:
            with lease.guarded(run_dir, token):
                aside = checkpoint.set_aside(run_dir, step)
            record(run_dir, token, "set-aside", step, reason=reason, moved_to=str(aside.relative_to(run_dir)))
            print(f"checkpoint of step {step} is broken ({reason}); set aside in {aside}", flush=True)
        ranks.gather(None)
    raise Failed(
        f"{run_dir}: no checkpoint that can be trusted is left ({len(steps)} broken now, see checkpoints/set-aside); "
        "a run that has trained is not begun again silently: start a new one with another run_dir",
        FENCED,
    )


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return checkpoint.read_manifest(path), ""
    except checkpoint.Broken as failure:
        return {}, str(failure)
    except OSError as failure:  # of the file system, not of the checkpoint: nothing is set aside for it
        raise Failed(f"{path}: cannot be read ({failure.strerror}); start again when it can")


def _verify(path: Path, files: Mapping[str, Any], names: list[str]) -> str:
    try:
        checkpoint.verify(path, files, names)
    except checkpoint.Broken as failure:
        return str(failure)
    except OSError as failure:
        raise Failed(f"{path}: cannot be read ({failure.strerror}); start again when it can")
    return ""


class Keeper(TrainerCallback):
    """Saves, stops and resumes the trainer that it is given; the order of calls is the same on every rank."""

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        token: int,
        facts: Mapping[str, Any],
        state_bytes: int,
        limit: stops.Limit,
        progress: Callable[[int], None],
        judge: Judge | None = None,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        keep_last: int,
        keep_best: int,
        keep_every: int | None,
        background: bool,
        max_failed_saves: int,
    ) -> None:
        """facts: what every manifest says of the run; state_bytes: about how many a checkpoint takes, over all ranks;
        progress: told whenever the ranks have agreed on something; judge: says which evaluated step is the best.
        """
        self.run_dir, self.ranks, self.token, self.facts, self.limit = run_dir, ranks, token, dict(facts), limit
        self.progress = progress
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.background, self.max_failed_saves = background, max_failed_saves
        self.main = ranks.rank == 0
        self.trainer: Any = None
        self.resumed: tuple[Path, dict[str, Any]] | None = None
        self.stopping: str | None = None  # why
        self.evaluation_pending = False  # an evaluation was due at this step and has not been made
        self.judge = judge
        self.evaluated: tuple[int, float | None, float | None] | None = None  # step, loss and score of the last one
        self.due_at_epoch_end = False
        self.failed_saves = 0
        self.committed: int | None = None
        self.draft: _Draft | None = None
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0  # of the longest save until now, from its beginning to its commit
        self.first_save = state_bytes / DISK
        self.pause = 0.0  # of the last one
        self.step_seconds = 0.0
        self.step_began = time.monotonic()

    # What the trainer asks

    def resume(self, path: Path, manifest: dict[str, Any]) -> None:
        """Go on from here when the trainer is ready for it."""
        self.resumed = path, manifest
        self.committed = manifest["step"]
        self.evaluation_pending = manifest["evaluation_pending"]
        if self.judge is not None and manifest["judge"] is not None:
            self.judge.load(manifest["judge"])

    def restore(self) -> None:
        """Weights, optimizer and schedule as they were. The model is wrapped and the optimizer exists."""
        assert self.resumed is not None
        path, manifest = self.resumed
        if not manifest["initial"]:
            trainer = self.trainer
            State(trainer.model, trainer.optimizer, self.ranks.rank, self.ranks.world).restore(path)
            own = _own_file(path, 0)
            _schedule(trainer).load_state_dict(own["schedule"])
            engine = trainer.model_wrapped if hasattr(trainer.model_wrapped, "global_steps") else None
            if engine is not None:
                engine.global_steps = manifest["step"]
            if getattr(trainer.accelerator, "scaler", None) is not None and own["scaler"]:
                trainer.accelerator.scaler.load_state_dict(own["scaler"])

    def restore_random_state(self) -> None:
        """This rank's random numbers go on; a rank that did not exist then keeps its fresh ones."""
        assert self.resumed is not None
        path, manifest = self.resumed
        if not manifest["initial"] and self.ranks.rank < manifest["world_size"]:
            set_random_state(path, self.ranks.rank, _own_file(path, self.ranks.rank)["random"])

    def asked_to_stop(self) -> bool:
        """Agreed by all ranks. Called between the batches of an evaluation."""
        self.progress(self.trainer.state.global_step)
        stop, writing, _ = self._agree(self.trainer.state.global_step)
        if self.draft is not None and not writing:
            self._finish()
        return bool(stop)

    # What happens at a step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self._swaps():
            self.every_steps = self.every_minutes = None
        if self.resumed is None or self.resumed[1]["initial"]:
            if self.resumed is None:
                self._commit_initial()
        else:
            path, manifest = self.resumed
            trainer.tokens = manifest["tokens"] if self.main else 0
            if self.ranks.world == manifest["world_size"]:
                own = _own_file(path, self.ranks.rank)
                trainer._tr_loss.fill_(own["loss_since_log"])
            else:
                total = sum(_own_file(path, r)["loss_since_log"] for r in range(manifest["world_size"]))
                trainer._tr_loss.fill_(total / manifest["world_size"])
            trainer._globalstep_last_logged = manifest["last_logged"]
            if trainer.parts is not None and self.main:  # sums over all ranks, whoever has them
                parts = [_own_file(path, r)["parts_since_log"] for r in range(manifest["world_size"])]
                trainer.parts += torch.tensor(parts, dtype=trainer.parts.dtype, device=trainer.parts.device).sum(0)
            trainer.health.norms.extend(_own_file(path, 0)["norms"])
            known = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["stateful_callbacks"]
            for callback in self._stateful():
                vars(callback).update(known.get(type(callback).__name__, {}).get("attributes", {}))
        stops.training_begins()
        self.ranks.gather(None)  # from here on every rank notes a signal and goes on to the end of its step
        if self.main:
            (self.run_dir / stops.RUNNING).touch()
        self.step_began = self.saved_at = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.progress(step)
        now = time.monotonic()
        self.step_seconds, self.step_began = now - self.step_began, now
        stop, writing, due = self._agree(step)
        if self.draft is not None and not writing:
            self._finish()
        boundary = step % self.trainer.steps_per_epoch == 0 or step >= state.max_steps
        if stop:
            by_epoch = boundary and args.eval_strategy == "epoch" and args.eval_delay <= state.epoch
            self._stop(step, control, by_epoch or control.should_evaluate)
        elif due:
            if boundary:
                self.due_at_epoch_end = True  # after the evaluation that comes first there
            else:
                control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            control.should_evaluate = control.should_save = False
        elif self.due_at_epoch_end:
            self.due_at_epoch_end = False
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.judge is not None and "loss" in logs:
            self.judge.trained(self.ranks.from_first(logs))  # times differ between ranks

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.judge is None:
            return
        step = state.global_step
        before = self.judge.state()
        verdict = self.judge.evaluated(step, self.ranks.from_first(metrics))  # the same numbers on every rank
        self.evaluated = step, metrics.get("eval_loss"), verdict.score
        if self.committed == step and not self.stopping:  # a resumed run makes up for an evaluation
            self._say_of_committed(step, before)
        elif verdict.best and (self.keep_best or self.judge.restore_best):
            control.should_save = True
        if verdict.stop is not None:
            control.should_training_stop = True
        if not self.main:
            return
        if verdict.why_not is not None:
            print(f"step {step}: does not count as a best step: {verdict.why_not}", flush=True)
        if verdict.overfitting is not None:
            text = (
                f"overfitting since step {verdict.overfitting}: the held-out loss rises while the training loss falls"
            )
            record(self.run_dir, self.token, "overfitting", step, since=verdict.overfitting, text=text)
            print(f"warning: step {step}: {text}", flush=True)
        if verdict.stop is not None:
            record(self.run_dir, self.token, "early-stop", step, reason=verdict.stop)
            print(f"step {step}: training ends: {verdict.stop}", flush=True)

    def _say_of_committed(self, step: int, judge: dict[str, Any]) -> None:
        """Write the evaluation of a step into its checkpoint, for whoever chooses the best; nothing else of it changes.

        A start that finds it makes the evaluation again, since what came of it (a schedule's state) is not in there.
        """
        assert self.evaluated is not None
        if self.main:
            path = checkpoint.folder(self.run_dir, step)
            manifest, problem = _read(path)
            if not problem and not manifest["initial"]:
                manifest |= {"eval_loss": self.evaluated[1], "score": self.evaluated[2], "judge": judge}
                try:
                    with lease.guarded(self.run_dir, self.token):
                        checkpoint.amend(path, manifest)
                except OSError as failure:
                    print(
                        f"warning: the evaluation of step {step} was not noted in its checkpoint ({failure})",
                        flush=True,
                    )

    def restore_best(self) -> int:
        """The weights of the best step that was kept, in the place of the last one's; that step. Every rank must call.

        Read by name and range, a parameter at a time, each rank what it holds.
        """
        assert self.judge is not None
        last = self.trainer.state.global_step
        for step, manifest in self.ranks.from_first(self._scored() if self.main else None):
            path = checkpoint.folder(self.run_dir, step)
            names = sorted(manifest["files"])[self.ranks.rank :: self.ranks.world]
            reason = next(filter(None, self.ranks.gather(_verify(path, manifest["files"], names))), "")
            if reason:
                if self.main:
                    print(
                        f"warning: the checkpoint of step {step} is broken ({reason}); the next best is taken",
                        flush=True,
                    )
                continue
            if step != last:
                state = State(self.trainer.model, self.trainer.optimizer, self.ranks.rank, self.ranks.world)
                state.restore(path, weights_only=True)
            if self.main:
                self._say_final(step, last)
            return step
        if self.main:
            text = f"no checkpoint of a step that counts; final/ holds the last step, {last}"
            record(self.run_dir, self.token, "best-missing", last, text=text)
            print(f"warning: stopping.restore_best: {text}", flush=True)
        return last

    def _scored(self) -> list[tuple[int, dict[str, Any]]]:
        """Committed steps that count, the best first."""
        found = []
        for step in checkpoint.steps(self.run_dir):
            manifest, problem = _read(checkpoint.folder(self.run_dir, step))
            if not problem and manifest["score"] is not None:
                found.append((step, manifest))
        return sorted(found, key=lambda pair: (pair[1]["score"], pair[0]))

    def _say_final(self, step: int, last: int) -> None:
        assert self.judge is not None
        text = f"final/ holds step {step}{'' if step == last else f', not the last one, {last}'}: {self.judge.metric}, "
        text += self.judge.said_of_best()
        if step != self.judge.memory.best_step:
            text += " but has no checkpoint"
        record(self.run_dir, self.token, "best-restored", step, text=text)
        print(text, flush=True)

    def wants_base(self) -> bool:
        """Whether nothing has been trained and the base has not been measured."""
        return self.trainer.state.global_step == 0 and self.judge is not None and not self.judge.memory.base

    def base_measured(self, metrics: Mapping[str, float]) -> None:
        """The base's losses on the general sets, a name each."""
        assert self.judge is not None
        self.judge.memory.base = {name: metrics[name] for name in self.trainer.retention}

    def gave_up_base(self, control: Any) -> None:
        """That measurement was given up because of a stop: the next start makes it."""
        self._stop(0, control, False)
        control.should_save = False  # step 0 is there

    def ended_early(self) -> bool:
        """Whether the judge has ended training, in this start or in the one before."""
        return self.judge is not None and self.judge.memory.stop is not None

    def interrupted_evaluation(self, control: Any) -> None:
        """An evaluation was given up because of a stop: the next start makes it."""
        self._stop(self.trainer.state.global_step, control, True)

    def _stop(self, step: int, control: Any, evaluation_pending: bool) -> None:
        reasons = self.ranks.gather(self._reason(step))
        self.stopping = next(filter(None, reasons), "another rank asked for it")
        self.evaluation_pending = evaluation_pending
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _agree(self, step: int) -> list[int]:
        """Whether to stop, whether some rank still writes, whether a save is due: the same answer on all ranks."""
        due = False
        if self.main:
            lease.check(self.run_dir, self.token)
            seconds = time.monotonic() - self.saved_at
            due = self.every_minutes is not None and seconds >= 60 * self.every_minutes
            due = due or (step >= self.trainer.state.max_steps and seconds >= END)
        if self.every_steps is not None and step % self.every_steps == 0:
            due = True
        writing = self.draft is not None and not self.draft.written
        return self.ranks.maximum(int(self._reason(step) is not None), int(writing), int(due))

    def _reason(self, step: int) -> str | None:
        if reason := stops.noted():
            return reason
        if not self.main:
            return None
        finished = step >= self.trainer.state.max_steps  # no step is left that a limit could forbid
        reserve = self.step_seconds + (self.save_seconds or self.first_save)
        return stops.requested(self.run_dir) or (None if finished else self.limit.reached(step, reserve))

    # Saving

    def save(self) -> None:
        """Start to save the step that has just been finished; at a stop, and without `background`, also finish it."""
        self._finish()
        trainer, step = self.trainer, self.trainer.state.global_step
        began = time.monotonic()
        if self._swaps():
            self._failed(step, "engine=zero3_nvme has its states on its own disk")
        elif self.committed != step:
            state = State(trainer.model, trainer.optimizer, self.ranks.rank, self.ranks.world)
            tensors, index = state.held()
            random_tensors, random_plain = random_state()
            needed = sum(tensor.nbytes for tensor in tensors.values())
            tight = psutil.virtual_memory().available < ROOM * needed
            behind = self.background and not self.stopping and not self.ranks.maximum(int(tight))[0]
            if self.background and not behind and not self.stopping and self.main:
                print(f"step {step}: no host memory for a copy of {needed:,} bytes; training waits for the save")
            scaler = getattr(trainer.accelerator, "scaler", None)
            own = {
                "state": index,
                "random": random_plain,
                "norms": list(trainer.health.norms),
                "loss_since_log": float(trainer._tr_loss),
                "parts_since_log": trainer.parts.tolist() if trainer.parts is not None else None,
                "schedule": _schedule(trainer).state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            self._start(step, (copied(tensors) if behind else tensors) | random_tensors, own)
            self.pause = time.monotonic() - began
            if not behind:
                self._finish()
                self.pause = time.monotonic() - began
        self.saved_at = time.monotonic()
        if self.stopping and self.committed != step:
            raise Failed(
                f"stopped ({self.stopping}) and could not save step {step}; "
                f"the newest checkpoint is that of step {self.committed}"
            )

    def close(self) -> None:
        """Finish what is still being written."""
        self._finish()

    def ended(self) -> None:
        """What was trained has its place: a stop has nothing to save any more."""
        if self.main:
            (self.run_dir / stops.RUNNING).unlink(missing_ok=True)

    def _start(self, step: int, tensors: dict[str, Any], own: dict[str, Any]) -> None:
        """Make room, agree that there is enough, and write from a thread."""
        sizes = self.ranks.gather(sum(tensor.nbytes for tensor in tensors.values()))
        draft = checkpoint.drafts(self.run_dir, step, self.token)
        problem = ""
        if self.main:
            try:
                lacking = checkpoint.lacking_bytes(self.run_dir / checkpoint.FOLDER, sum(sizes))
                if lacking:
                    problem = f"the disk lacks {lacking:,} of {sum(sizes):,} bytes"
                else:
                    shutil.rmtree(draft, ignore_errors=True)
                    draft.mkdir(mode=0o700)
            except OSError as failure:
                problem = str(failure)
        problem = self.ranks.from_first(problem)
        if problem:
            self._failed(step, problem)
            return
        texts = {STATE_FILE: self._trainer_state()} if self.main else {}
        manifest = {
            "step": step,
            "world_size": self.ranks.world,
            "tokens": sum(self.ranks.gather(self.trainer.tokens)),
            "samples": self._samples(step),
            "initial": False,
            "last_logged": self.trainer._globalstep_last_logged,
            "evaluation_pending": self.evaluation_pending,
            **self._judged(step),
        }
        self.draft = _Draft(draft, self.ranks.rank, tensors, own, texts, manifest)

    def _finish(self) -> None:
        """Wait for this rank's files, gather what was written, commit."""
        if self.draft is None:
            return
        draft, self.draft = self.draft, None
        while not draft.written:
            draft.wait(1.0)
            self.progress(self.trainer.state.global_step)
        results = self.ranks.gather((draft.files, draft.problem))
        step = draft.manifest["step"]
        problem = next((p for _, p in results if p), "")
        if not problem and self.main:
            files = {name: entry for part, _ in results for name, entry in part.items()}
            problem = self._commit(draft.path, {**draft.manifest, "files": files})
        problem = self.ranks.from_first(problem)
        if problem:
            if self.main:
                shutil.rmtree(draft.path, ignore_errors=True)
            self._failed(step, problem)
            return
        self.committed, self.failed_saves = step, 0
        self.save_seconds = max(self.save_seconds, time.monotonic() - draft.began)
        if self.main:
            size = sum(entry["bytes"] for part, _ in results for entry in part.values())
            record(self.run_dir, self.token, "checkpoint", step, bytes=size, pause=self.pause, write=draft.seconds)
            try:
                self._rotate()
            except OSError as failure:
                print(f"warning: an older checkpoint could not be removed ({failure})", flush=True)

    def _commit(self, draft: Path, manifest: dict[str, Any]) -> str:
        """Rank 0: the files become a checkpoint, unless somebody else has the run. The problem, if there is one."""
        try:
            with contextlib.suppress(FileNotFoundError):  # nothing was logged yet
                _sync_file(self.run_dir / "metrics.jsonl")
            checkpoint.sync(draft)
            with lease.guarded(self.run_dir, self.token):
                checkpoint.commit(draft, checkpoint.folder(self.run_dir, manifest["step"]), self._whole(manifest))
        except OSError as failure:
            return str(failure)
        return ""

    def _commit_initial(self) -> None:
        """Step 0: the mark that training has begun. Base and seed make its state again, so it holds no tensors.

        The folder of checkpoints appears with it in one rename: there is no moment with a folder and no checkpoint.
        """
        problem = ""
        if self.main:
            parent = self.run_dir / f".{checkpoint.FOLDER}.{self.token}"
            shutil.rmtree(parent, ignore_errors=True)
            draft = parent / ".draft"
            try:
                draft.mkdir(mode=0o700, parents=True)
                (draft / STATE_FILE).write_text(self._trainer_state(), encoding="utf-8")
                manifest = {
                    "step": 0,
                    "world_size": self.ranks.world,
                    "tokens": 0,
                    "samples": 0,
                    "initial": True,
                    "last_logged": 0,
                    "evaluation_pending": False,
                    **self._judged(0),
                    "files": {STATE_FILE: checkpoint.fingerprint(draft / STATE_FILE)},
                }
                checkpoint.commit(draft, parent / checkpoint.folder(parent, 0).name, self._whole(manifest))
                with lease.guarded(self.run_dir, self.token):
                    parent.rename(self.run_dir / checkpoint.FOLDER)
                checkpoint.sync(self.run_dir)
                (self.run_dir / BEGUN).touch()
                checkpoint.sync(self.run_dir)
            except OSError as failure:
                problem = str(failure)
        problem = self.ranks.from_first(problem)
        if problem:
            raise Failed(f"cannot save in {self.run_dir}: {problem}")
        self.committed = 0

    def _judged(self, step: int) -> dict[str, Any]:
        """What the evaluation of this step was worth, and what the judge remembers."""
        loss, score = self.evaluated[1:] if self.evaluated and self.evaluated[0] == step else (None, None)
        return {"eval_loss": loss, "score": score, "judge": None if self.judge is None else self.judge.state()}

    def _samples(self, step: int) -> int:
        """Rows seen after a step, fillers not counted."""
        epochs, steps = divmod(step, self.trainer.steps_per_epoch)
        rows = len(self.trainer.train_dataset)
        return epochs * rows + min(rows, steps * int(self.facts["sequences_per_step"]))

    def _whole(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return {**self.facts, "token": self.token, "time": time.time(), **manifest}

    def _rotate(self) -> None:
        scores = {}
        for step in checkpoint.steps(self.run_dir):
            manifest, problem = _read(checkpoint.folder(self.run_dir, step))
            if not problem:
                scores[step] = manifest["score"]
        best = max(self.keep_best, int(self.judge is not None and self.judge.restore_best))
        for step in checkpoint.surplus(scores, self.keep_last, best, self.keep_every):
            with lease.guarded(self.run_dir, self.token):
                checkpoint.remove(self.run_dir, step)

    def _failed(self, step: int, problem: str) -> None:
        """A save that did not become a checkpoint: go on without it, a few times."""
        self.failed_saves += 1
        text = f"step {step} was not saved ({problem}); the newest checkpoint is that of step {self.committed}"
        if self.main:
            record(self.run_dir, self.token, "save-failed", step, reason=problem, newest=self.committed)
            print(f"warning: {text}", flush=True)
        if self.failed_saves > self.max_failed_saves and not self.stopping:
            raise Failed(f"{text}; {self.failed_saves} saves in a row have failed (checkpoint.max_failed_saves)")

    def _trainer_state(self) -> str:
        """transformers' state without its log, which metrics.jsonl has, and with the callbacks' own states."""
        trainer = self.trainer
        callbacks: dict[str, Any] = {type(c).__name__: c.state() for c in self._stateful()}
        return json.dumps({**asdict(trainer.state), "log_history": [], "stateful_callbacks": callbacks})

    def _swaps(self) -> bool:
        """Whether the optimizer's state lies on a disk of the engine's own."""
        return bool(getattr(self.trainer.optimizer.optimizer, "swap_optimizer", False))

    def _stateful(self) -> list[Any]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, ExportableState)]


class _Draft:
    """One rank's part of a checkpoint, written and hashed by a thread."""

    def __init__(
        self,
        path: Path,
        rank: int,
        tensors: dict[str, Any],
        own: dict[str, Any],
        texts: dict[str, str],
        manifest: dict[str, Any],
    ) -> None:
        self.path, self.manifest = path, manifest
        self.files: dict[str, dict[str, Any]] = {}
        self.problem = ""
        self.began = time.monotonic()
        self.seconds = 0.0
        self.thread = threading.Thread(target=self._write, args=(rank, tensors, own, texts), name="save")
        self.thread.start()

    def _write(self, rank: int, tensors: dict[str, Any], own: dict[str, Any], texts: dict[str, str]) -> None:
        try:
            written = write(self.path, rank, tensors, own)
            for name, text in texts.items():
                (self.path / name).write_text(text, encoding="utf-8")
                written.append(self.path / name)
            self.files = {file.name: checkpoint.fingerprint(file) for file in written}
        except Exception as failure:  # whatever it was: what is not written must not be committed
            self.problem = f"rank {rank}: {type(failure).__name__}: {str(failure).strip() or 'no reason given'}"
        self.seconds = time.monotonic() - self.began

    @property
    def written(self) -> bool:
        return not self.thread.is_alive()

    def wait(self, seconds: float) -> None:
        self.thread.join(seconds)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _schedule(trainer: Any) -> Any:
    """The learning-rate scheduler itself, out of whatever wraps it."""
    scheduler = trainer.lr_scheduler
    return getattr(scheduler, "scheduler", scheduler)


def _own_file(path: Path, rank: int) -> dict[str, Any]:
    own: dict[str, Any] = json.loads(
        ((path / checkpoint.rank_stem(rank)).with_suffix(".json")).read_text(encoding="utf-8")
    )
    return own


def token_of(run_dir: Path, ranks: Ranks) -> int:
    """The lease that this start writes under: its launcher's, or one of its own. Rank 0 keeps it alive."""
    token = 0
    if ranks.rank == 0:
        given = os.environ.get(lease.VARIABLE)
        if given:
            token = int(given)
            lease.check(run_dir, token)
            lease.keep_alive(run_dir, token)
        else:
            token = lease.take(run_dir).token
            forget_last_start(run_dir)
    return int(ranks.from_first(token))
