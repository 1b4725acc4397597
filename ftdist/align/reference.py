"""What the policy is compared with: the adapter switched off, log-probabilities computed once, a frozen copy, or
nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftdist import lease, rundir
from ftdist.errors import FENCED, Failed
from ftdist.loss import IGNORED, Head

if TYPE_CHECKING:
    from ftdist.align.trainer import PreferenceTrainer

FILE = "reference.safetensors"  # in the run directory: the columns of its prepared rows
SPLITS = ("train", "validation")


class Reference:
    """One of `cached`, `adapter_off`, `copy`, `none` (`kind`), on every rank.

    key: of the content that the cached columns depend on; load: makes the frozen other model (where there is one);
    is_start: the reference is the model that training starts from.
    """

    def __init__(
        self, kind: str, key: str, run_dir: Path, token: int, load: Callable[[], Any] | None, is_start: bool
    ) -> None:
        self.kind, self.key, self.run_dir, self.token = kind, key, run_dir, token
        self.load, self.is_start = load, is_start
        self.copy: Any = None
        self.head: Head | None = None

    def ready(self, trainer: PreferenceTrainer) -> None:
        """Before the first step, when the engine is there. Every rank calls."""
        if self.kind == "copy":
            self._keep_copy(trainer)
        elif self.kind == "cached":
            self._columns(trainer)

    @torch.no_grad()
    def live(self, trainer: PreferenceTrainer, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """log p (2·B,) of the batch's sequences by the reference, without gradients."""
        if self.kind == "cached":  # columns come with the batch, unless it has nothing but fillers
            assert not (batch["targets"] != IGNORED).any()
        if self.kind in ("none", "cached"):
            return torch.zeros(len(batch["targets"]), device=batch["targets"].device)
        if self.copy is not None:
            assert self.head is not None
            self.head.found_out(trainer.head)
            return self._of_copy(trainer, batch)
        adapted: Any = trainer.model
        with evaluating(model, adapted), adapted.disable_adapter():
            return trainer.log_probabilities(model, batch)

    def _keep_copy(self, trainer: PreferenceTrainer) -> None:
        assert self.load is not None
        model = self.load()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.head = Head(model, 0.0, "nll")
        # Whether logits are changed after the head is known of the trained model's architecture alone.
        self.head.usable = self.head.usable and trainer.head.usable and self.is_start
        self.copy = self._sharded(model) if trainer.sharded else model.to(trainer.args.device)
        self.copy.eval()

    def _of_copy(self, trainer: PreferenceTrainer, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """log p (2·B,) by the frozen model. accelerate gives its autocast to the trained model's forward alone."""
        with trainer.accelerator.autocast():
            return trainer.log_probabilities(self.copy, batch, self.head)

    @staticmethod
    def _sharded(model: Any) -> Any:
        """ZeRO-3 gathers a frozen model's weights as it does the trained one's; there is nothing else to shard."""
        import deepspeed
        from transformers.integrations.deepspeed import deepspeed_config

        settings = dict(deepspeed_config())
        for name in ("optimizer", "scheduler"):
            settings.pop(name, None)
        zero = settings["zero_optimization"]
        settings["zero_optimization"] = {k: v for k, v in zero.items() if k != "offload_optimizer"}
        return deepspeed.initialize(model=model, config=settings)[0]

    # Columns that are computed once

    def _columns(self, trainer: PreferenceTrainer) -> None:
        """Read them from the run, or from what another run has left in the cache, else compute them."""
        ranks, own = trainer.keeper.ranks, self.run_dir / FILE
        shared = rundir.cache_root() / "reference" / f"{self.key}.safetensors"
        if ranks.rank == 0 and not own.is_file() and shared.is_file() and _whole(shared, self.key):
            self._publish(shared)
        known = ranks.from_first(own.is_file())
        if not known:
            resumed = trainer.keeper.resumed
            if self.load is None and resumed is not None and not resumed[1]["initial"]:
                raise Failed(
                    f"{own} is gone: the model is not any more what it was computed with; bring the file back, or "
                    "start a new run",
                    FENCED,
                )
            found = self._computed(trainer)
            if ranks.rank == 0:
                _write(shared, self.key, found)
                self._publish(shared)
            ranks.gather(None)
        if not _whole(own, self.key):
            raise Failed(f"{own} is damaged, or of another run; remove it if the run has not begun to train", FENCED)
        from safetensors.numpy import load_file

        columns = load_file(own)
        trainer.train_dataset.reference = columns["train"]
        trainer.eval_dataset.reference = columns["validation"]

    def _publish(self, file: Path) -> None:
        partial = self.run_dir / f".{FILE}.{self.token}"
        shutil.copyfile(file, partial)
        with lease.guarded(self.run_dir, self.token):
            partial.replace(self.run_dir / FILE)

    @torch.no_grad()
    def _computed(self, trainer: PreferenceTrainer) -> dict[str, np.ndarray]:
        """Both splits' columns (rows, 2); each rank computes its share."""
        if self.load is not None:
            self._keep_copy(trainer)
        ranks, size = trainer.keeper.ranks, trainer.args.per_device_eval_batch_size
        found = {}
        with evaluating(trainer.model_wrapped, trainer.model):
            for split, rows in zip(SPLITS, (trainer.train_dataset, trainer.eval_dataset), strict=True):
                mine: list[np.ndarray] = []
                for start in range(0, len(rows), size * ranks.world):
                    trainer.keeper.progress(0)
                    numbers = range(start + ranks.rank, min(start + size * ranks.world, len(rows)), ranks.world)
                    # a rank without rows computes one for nothing: sharded forwards need every rank
                    made: Any = trainer.data_collator([dict(rows[i]) for i in numbers or [0]])
                    batch = trainer._prepare_inputs(made)
                    with trainer.compute_loss_context_manager():
                        if not trainer.examined:  # is the head's loss this architecture's?
                            trainer._examine(trainer.model_wrapped, batch)
                        if self.head is not None:
                            self.head.found_out(trainer.head)
                            values = self._of_copy(trainer, batch)
                        else:
                            values = trainer.log_probabilities(trainer.model_wrapped, batch)
                    pairs = values.reshape(2, -1).T.float().cpu().numpy()
                    mine.append(pairs[: len(numbers)])
                shares = ranks.gather(np.concatenate(mine) if mine else np.zeros((0, 2), np.float32))
                whole = np.zeros((len(rows), 2), np.float32)
                for rank, share in enumerate(shares):
                    whole[rank :: ranks.world] = share
                found[split] = whole
        if self.load is not None:
            self.copy = self.head = None
        return found


@contextlib.contextmanager
def evaluating(model: Any, inner: Any) -> Iterator[None]:
    """Without dropout while open. inner: the model inside the engine, whose wrapper does not follow its own eval()."""
    training = inner.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _write(file: Path, key: str, columns: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(columns, partial, metadata={"key": key, "sha256": _digest(columns)})
    partial.replace(file)


def _whole(file: Path, key: str) -> bool:
    """Whether the file is what was written for this key, every bit of it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            said = opened.metadata() or {}
            columns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError):
        return False
    return said.get("key") == key and said.get("sha256") == _digest(columns)


def _digest(columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {columns[name].shape}".encode() + columns[name].tobytes())
    return digest.hexdigest()
