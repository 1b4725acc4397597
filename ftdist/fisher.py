"""The diagonal empirical Fisher of a model on data: measured by all ranks, kept in shards, written and read by name.

F = Σ over samples (∂ log p(sample)/∂θ)² / supervised tokens, with log p summed over a sample's supervised tokens: the
mean over samples of the squared per-sample gradient, per token as the loss is. λ=1 then weighs the data of the Fisher
like those of the loss (Laplace's approximation; Kirkpatrick et al. 2017, equation 3).

Gradients are taken from autograd before any engine sees them, one tensor at a time: a rank holds one whole gradient at
once, squares it, adds it up over the ranks and keeps the elements that are its own.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftdist import checkpoint, state
from ftdist.errors import FENCED, Failed, UserError
from ftdist.loss import IGNORED
from ftdist.ranks import Ranks

KIND = "fisher"  # of a tensor in the files, beside the anchor's `weight`
FLOAT16 = (
    64.0  # times the loss in float16, whose smallest number is 6e-8: about what mixed precision starts training with
)
EVERY = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Place:
    """Elements [start, start + length) of a named tensor lie at [offset, offset + length) of buffer `buffer`."""

    buffer: int
    start: int
    length: int
    offset: int

    def of(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The view."""
        return buffers[self.buffer][self.offset : self.offset + self.length]


Places = Mapping[str, Sequence[Place]]


class Tally:
    """Adds up squared gradients (and, for batches, gradients) of the elements that this rank holds."""

    def __init__(
        self, buffers: Sequence[torch.Tensor], places: Places, together: bool, batched: bool, scale: float = 1.0
    ) -> None:
        """buffers: float32 zeros, which become the sums. together: each gradient is summed over the ranks as it comes,
        otherwise (every rank holds everything) all of them at the end. scale: what the loss is multiplied with."""
        self.places, self.together, self.scale = places, together, scale
        self.squares = list(buffers)
        self.sums = [torch.zeros_like(buffer) for buffer in buffers] if batched else []

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """gradient: of a batch's summed log-likelihood times `scale`, whole, on this rank. All ranks call in the same
        order."""
        values = gradient.detach().float().reshape(-1) / self.scale
        self._put(self.squares, name, values.square())
        if self.sums:
            self._put(self.sums, name, values.clone())

    def _put(self, buffers: list[torch.Tensor], name: str, values: torch.Tensor) -> None:
        if self.together:
            dist.all_reduce(values)
        for place in self.places.get(name, ()):
            part = place.of(buffers)
            part += values[place.start : place.start + place.length].to(part.device)

    def finish(self, world: int, samples: int, batch: int, tokens: int) -> None:
        """Leave F in the buffers.

        Σ of squared batch gradients is Σ g² + (B−1)·N·c in expectation over the partitions into batches of B, where c
        is the mean product of two samples' gradients; their total squared is Σ g² + (N−1)·N·c. So Σ g² follows without
        bias, whatever the mean gradient; what noise makes negative becomes 0.
        """
        if world > 1 and not self.together:
            for buffer in (*self.squares, *self.sums):
                dist.all_reduce(buffer)
        for squares, sums in zip(self.squares, self.sums, strict=False):
            squares -= (batch - 1) / (samples - batch) * (sums.square() - squares)
            squares.clamp_(min=0)
        for squares in self.squares:
            squares /= tokens


def gradients_of_weights(model: Any, tally: Tally) -> Any:
    """How to add the gradients of a loss to the tally: those of the trained weights."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def take(name: str, gradient: torch.Tensor) -> torch.Tensor:
        tally.add(name, gradient)
        return gradient.new_zeros(()).expand(gradient.shape)  # autograd keeps this instead of the whole gradient

    def backward(forward: Any) -> torch.Tensor:
        hooks = [p.register_hook(partial(take, name)) for name, p in named.items()]
        try:
            loss: torch.Tensor = forward()
            # not backward(): the engines' own hooks sit behind the accumulation of gradients and do not run
            torch.autograd.grad(loss * tally.scale, list(named.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return loss

    return backward


def gradients_of_modules(modules: Mapping[str, Any], tally: Tally) -> Any:
    """The same for the weights of frozen linear modules, quantised or sharded: (gradient of the output)ᵀ · input."""

    def backward(forward: Any) -> torch.Tensor:
        taken: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def keep(name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:  # nothing below it is trained
                output = output.detach().requires_grad_()
            taken.append((name, inputs[0].detach(), output))
            return output

        hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
        try:
            loss: torch.Tensor = forward()
        finally:
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(loss * tally.scale, [output for *_, output in taken])
        for (name, inputs, _), gradient in zip(taken, gradients, strict=True):
            tally.add(name, gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float())
        return loss

    return backward


def chosen(count: int, samples: int, batch: int, seed: int) -> list[int]:
    """Which of `count` rows are measured: whole batches of them, in an order of their own."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: min(samples, count) // batch * batch]


def measure(trainer: Any, rows: Any, backward: Any, tally: Tally, samples: int, batch: int) -> tuple[int, int]:
    """Measure on rows of a prepared data set, the ranks in turns; (samples, supervised tokens). UserError for too few.

    Dropout is off. Every rank makes the same number of passes; what is left of the last turn counts nothing.
    """
    ranks: Ranks = trainer.keeper.ranks
    wanted = chosen(len(rows), samples, batch, trainer.args.seed)
    batches = [wanted[i : i + batch] for i in range(0, len(wanted), batch)]
    if not batches or (batch > 1 and len(batches) < 2):
        raise UserError(f"forgetting.data: {len(rows)} rows, too few for forgetting.batch={batch}; give more, or 1")
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    tokens, began, said = 0, time.monotonic(), time.monotonic()
    for turn in range(math.ceil(len(batches) / ranks.world)):
        number = turn * ranks.world + ranks.rank
        made = trainer.text_collator([rows[i] for i in batches[number if number < len(batches) else 0]])
        if number >= len(batches):
            made["targets"].fill_(IGNORED)
        made = trainer._prepare_inputs(made)
        if not trainer.examined:
            trainer._examine(trainer.model_wrapped, made)
        model.eval()
        with torch.enable_grad(), trainer.head.plain(), trainer.compute_loss_context_manager():
            loss = backward(partial(trainer._summed_loss, model, made))
        if not math.isfinite(float(loss)):
            raise Failed(f"forgetting.data: the loss of rows {batches[number]} is not finite", FENCED)
        tokens += int((made["targets"] != IGNORED).sum())
        trainer.keeper.progress(0)
        if ranks.rank == 0 and time.monotonic() - said > EVERY:
            said = time.monotonic()
            done = min((turn + 1) * ranks.world, len(batches)) * batch
            left = (said - began) / done * (len(wanted) - done)
            print(f"Fisher: {done:,} of {len(wanted):,} samples, {left:.0f} s left", flush=True)
    trainer.examined = False  # again with the rows that are trained on, which may show more
    tokens = sum(ranks.gather(tokens))
    if not tokens:
        raise UserError("forgetting.data: no token of the chosen rows is supervised; see data.mask")
    tally.finish(ranks.world, len(wanted), batch, tokens)
    if hasattr(trainer.model_wrapped, "empty_partition_cache"):
        trainer.model_wrapped.empty_partition_cache()  # ZeRO-3 may have left weights of the last pass gathered
    finite = all(bool(torch.isfinite(values).all()) for values in tally.squares)
    if not all(ranks.gather(finite)):
        raise Failed("the Fisher is not finite: gradients overflow in this precision; use train.bf16=true", FENCED)
    return len(wanted), tokens


# Files: those of a checkpoint (`state.py`), each rank its elements, in a folder with a manifest


def write(
    folder: Path,
    ranks: Ranks,
    kinds: Mapping[str, Sequence[torch.Tensor]],
    places: Places,
    shapes: Mapping[str, Sequence[int]],
    replicated: bool,
    facts: Mapping[str, Any],
) -> None:
    """Make `folder`, whole or not at all. Where every rank holds everything each writes its share.

    kinds: kind → buffers; shapes: of all named tensors; facts: `fisher` of the manifest. Failed where the disk does
    not take it.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    problem = ""
    if ranks.rank == 0:
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(mode=0o700, parents=True)
        except OSError as failure:
            problem = str(failure)
    problem = ranks.from_first(problem)
    files: dict[str, Any] = {}
    if not problem:
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, dict[str, int]] = {}
        for name, held in places.items():
            for place in held:  # a tensor lies in one piece on a rank
                shares, mine = (ranks.world, ranks.rank) if replicated else (1, 0)
                first, last = place.length * mine // shares, place.length * (mine + 1) // shares
                if first < last:
                    ranges[name] = {"start": place.start + first, "length": last - first}
                    for kind, buffers in kinds.items():
                        tensors[f"{name}{state.SEPARATOR}{kind}"] = place.of(buffers)[first:last]
        index = {"ranges": ranges, "shapes": {name: list(shape) for name, shape in shapes.items()}}
        empty = {"layout": "", "scalars": {}, "bound": [], "groups": [], "scaler": {}}
        try:
            made = state.write(draft, ranks.rank, tensors, {"state": {**empty, **index}})
            files = {file.name: checkpoint.fingerprint(file) for file in made}
        except OSError as failure:
            problem = str(failure)
    results = ranks.gather((files, problem))
    problem = next((p for _, p in results if p), "")
    if not problem and ranks.rank == 0:
        every = {name: entry for part, _ in results for name, entry in part.items()}
        manifest = {"initial": False, "world_size": ranks.world, "files": every, "fisher": dict(facts)}
        try:
            if folder.exists():  # another run was first, or a start that was killed
                shutil.rmtree(folder)
            checkpoint.commit(draft, folder, manifest)
            checkpoint.read_manifest(folder)
        except OSError as failure:
            problem = str(failure)
        except checkpoint.Broken as failure:  # the folder is each node's own
            shutil.rmtree(folder, ignore_errors=True)
            problem = f"{failure}: {folder.parent} is not shared between the nodes"
    if problem := ranks.from_first(problem):
        raise Failed(f"{folder}: the Fisher cannot be written ({problem})")


def opened(folder: Path, ranks: Ranks) -> tuple[state.Saved, dict[str, Any]]:
    """The files and the manifest's `fisher`, after every byte has been checked; the ranks share the reading. Broken."""
    manifest, reason = {}, ""
    try:
        manifest = checkpoint.read_manifest(folder)
        checkpoint.verify(folder, manifest["files"], sorted(manifest["files"])[ranks.rank :: ranks.world])
    except (checkpoint.Broken, OSError) as failure:
        reason = str(failure)
    if reason := next(filter(None, ranks.gather(reason)), ""):
        raise checkpoint.Broken(reason)
    return state.Saved(folder), manifest["fisher"]


def fill(
    saved: state.Saved, kind: str, buffers: Sequence[torch.Tensor], places: Places, shapes: Mapping[str, Sequence[int]],
    key: str,
) -> None:  # fmt: skip
    """Put the named elements into the buffers. UserError (of `key`) if the files lack some or have other shapes."""
    for name, shape in shapes.items():
        if name not in saved.shapes:
            near = "" if len(saved.shapes) != len(shapes) else "; other names: another model, or another form of EWC"
            raise UserError(f"{key}: holds nothing of {name}, which is trained{near}; it must come from a run that "
                            "trains at least these weights")  # fmt: skip
        if list(shape) != saved.shapes[name]:
            raise UserError(f"{key}: {name} has shape {saved.shapes[name]} there and {list(shape)} here; it is of "
                            "another model")  # fmt: skip
    for name, held in places.items():
        for place in held:
            saved.fill(buffers[place.buffer], state.Segment(name, place.start, place.length, place.offset), kind)
