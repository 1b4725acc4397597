"""Elastic weight consolidation inside a rank: the penalty λ/2·ΣF(θ−θ*)² and its gradient, on the rank's own elements.

Its gradient λF(θ−θ*) is added to what torch's optimizer is about to use: after the loss's gradient was averaged over
ranks, unscaled and clipped, and so the same in every engine. Nothing of the weights is gathered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftdist import checkpoint, fisher, forgetting, rundir
from ftdist.errors import FENCED, Failed, UserError
from ftdist.ranks import Ranks
from ftdist.state import WEIGHT, State, engines

CHUNK = 1 << 22  # elements of a tensor that are worked on at once


class Weights:
    """The trained weights themselves, as this rank's optimizer holds them: F and θ* lie beside its states."""

    def __init__(self, model: Any, held: State) -> None:
        self.held, self.model = held, model
        self.shapes: Mapping[str, Sequence[int]] = held.shapes
        self.replicated = held.replicated
        self.numbers = {id(key): number for number, key in enumerate(held.keys)}
        self.places = _places(held)
        self.fisher = [torch.zeros(key.numel(), dtype=torch.float32, device=key.device) for key in held.keys]
        self.anchors = [key.detach().float().reshape(-1).clone() for key in held.keys]

    def backward(self, tally: fisher.Tally) -> Any:
        """How gradients come into the tally."""
        return fisher.gradients_of_weights(self.model, tally)

    def kinds(self) -> dict[str, list[torch.Tensor]]:
        """What is kept in files."""
        return {fisher.KIND: self.fisher, WEIGHT: self.anchors}

    def begin(self, strength: float) -> Any:  # noqa: ARG002  (the forms' common shape)
        """Of a step, before any weight moves; what it adds to the penalty."""
        return 0.0

    def pull(self, tensor: torch.Tensor, strength: float, scale: float) -> Any:
        """Add the penalty's gradient to the tensor's, times `scale`; what this tensor adds to the penalty."""
        number = self.numbers[id(tensor)]
        assert tensor.grad is not None
        weights, gradient = tensor.detach().view(-1), tensor.grad.view(-1)
        anchor, importance = self.anchors[number], self.fisher[number]
        total = torch.zeros((), dtype=torch.float64, device=weights.device)
        for start in range(0, len(weights), CHUNK):
            part = slice(start, start + CHUNK)
            moved = weights[part].float() - anchor[part]
            force = moved * importance[part]
            total += torch.dot(force, moved)
            gradient[part] += strength * scale * force
        return strength / 2 * total  # a tensor: nobody waits for the device before it is logged

    def over_ranks(self, penalty: float, ranks: Ranks) -> float:
        """The whole penalty from this rank's part."""
        return penalty if self.replicated else sum(ranks.gather(penalty))


@dataclass(frozen=True)
class Adapter:
    """A linear module with LoRA: the weight's name, those of A (r, in) and B (out, r), s, and this rank's rows."""

    weight: str
    a: str
    b: str
    scale: float
    rows: slice
    columns: int


class Drift:
    """The drift D = s·(B·A − B₀·A₀) of merged weights by the base weights' Fisher, a rank having that of some rows.

    With M = λF∘D the gradients are dB = s·M·Aᵀ and dA = s·Bᵀ·M. Rows of B need no other rank; the parts of dA are
    summed over the ranks. Adapters are small: each step puts them together in full precision from the shards. Fresh
    ones have B₀ = 0.
    """

    replicated = False
    anchors: Sequence[torch.Tensor] = ()

    def __init__(self, model: Any, held: State, ranks: Ranks, device: torch.device) -> None:
        self.held, self.ranks = held, ranks
        self.modules: dict[str, Any] = {}
        self.adapters: list[Adapter] = []
        self.fisher: list[torch.Tensor] = []
        self.shapes: dict[str, list[int]] = {}
        self.places: dict[str, list[fisher.Place]] = {}
        names = set(held.shapes)
        for path, module in model.named_modules():
            if not isinstance(getattr(module, "base_layer", None), torch.nn.Linear) or not module.lora_A:
                continue
            (name,) = module.lora_A
            weight = f"{path.removeprefix('base_model.model.')}.weight"
            a, b = f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight"
            out, columns = held.shapes[b][0], held.shapes[a][1]
            rows = slice(out * ranks.rank // ranks.world, out * (ranks.rank + 1) // ranks.world)
            count = (rows.stop - rows.start) * columns
            self.places[weight] = [fisher.Place(len(self.fisher), rows.start * columns, count, 0)] if count else []
            self.shapes[weight] = [out, columns]
            self.fisher.append(torch.zeros(count, dtype=torch.float32, device=device))
            self.adapters.append(Adapter(weight, a, b, float(module.scaling[name]), rows, columns))
            self.modules[weight] = module.base_layer
            names -= {a, b}
        if names:
            raise UserError(
                f"forgetting.adapters=drift: {min(names)} is trained and is no LoRA matrix of a linear module; use "
                "forgetting.adapters=plain"
            )
        self.starts: dict[str, int] = {}
        end = 0
        for name, shape in held.shapes.items():
            self.starts[name], end = end, end + shape[0] * shape[1]
        self.made = torch.zeros(end + 1, dtype=torch.float32, device=device)  # gradients; last the penalty
        self.start = self._whole()
        self.numbers = {id(key): number for number, key in enumerate(held.keys)}

    def backward(self, tally: fisher.Tally) -> Any:
        """How gradients come into the tally."""
        return fisher.gradients_of_modules(self.modules, tally)

    def kinds(self) -> dict[str, list[torch.Tensor]]:
        """What is kept in files: a base weight needs no anchor, and adapters start from a seed or RUN/start."""
        return {fisher.KIND: self.fisher}

    def begin(self, strength: float) -> Any:
        """Make the gradients of all adapters, once a step; the penalty."""
        adapters, made = self._whole(), self.made.zero_()
        for importance, adapter in zip(self.fisher, self.adapters, strict=True):
            a, b = self._matrix(adapters, adapter.a), self._matrix(adapters, adapter.b)[adapter.rows]
            drift = adapter.scale * (
                b @ a - self._matrix(self.start, adapter.b)[adapter.rows] @ self._matrix(self.start, adapter.a)
            )
            force = strength * importance.view(drift.shape) * drift
            made[-1] += torch.dot(force.view(-1), drift.view(-1)) / 2
            self._matrix(made, adapter.b)[adapter.rows] = adapter.scale * (force @ a.T)
            self._matrix(made, adapter.a).copy_(adapter.scale * (b.T @ force))
        if self.ranks.world > 1:
            dist.all_reduce(made)
        return made[-1].clone()

    def _whole(self) -> torch.Tensor:
        """All adapters, one after another, from the shards."""
        adapters = torch.zeros_like(self.made[:-1])
        for flat, key in zip(self.held.flats, self.held.keys, strict=True):
            for segment in flat.segments:
                start = self.starts[segment.name] + segment.start
                values = key.detach().view(-1)[segment.offset : segment.offset + segment.length]
                adapters[start : start + segment.length] = values
        if not self.held.replicated:
            dist.all_reduce(adapters)
        return adapters

    def pull(self, tensor: torch.Tensor, strength: float, scale: float) -> Any:  # noqa: ARG002  (the forms' shape)
        """Add what `begin` made to the tensor's gradient, times `scale`."""
        assert tensor.grad is not None
        gradient = tensor.grad.view(-1)
        for segment in self.held.flats[self.numbers[id(tensor)]].segments:
            start = self.starts[segment.name] + segment.start
            values = self.made[start : start + segment.length]
            gradient[segment.offset : segment.offset + segment.length] += scale * values.to(gradient)
        return 0.0

    def over_ranks(self, penalty: float, ranks: Ranks) -> float:  # noqa: ARG002  (the forms' common shape)
        """`begin` has summed it."""
        return penalty

    def _matrix(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        rows, columns = self.held.shapes[name]
        return flat[self.starts[name] : self.starts[name] + rows * columns].view(rows, columns)


def _places(held: State) -> dict[str, list[fisher.Place]]:
    places: dict[str, list[fisher.Place]] = {name: [] for name in held.shapes}
    for number, flat in enumerate(held.flats):
        for segment in flat.segments:
            places[segment.name].append(fisher.Place(number, segment.start, segment.length, segment.offset))
    return places


class Consolidation:
    """The penalty of a run: measures or reads the Fisher when the engine is there, then joins every optimizer step."""

    def __init__(
        self,
        run_dir: Path,
        rows: Callable[[], Any],
        during: Callable[[], Any],
        facts: Mapping[str, Any],
        *,
        strength: float,
        samples: int,
        batch: int,
        fisher: str | None,
        earlier: str | None,
        decay: float,
        adapters: str,
        dtype: str,
    ) -> None:
        """rows: opens the prepared general data; during: a context around measuring; facts: what besides the names of
        weights decides the Fisher."""
        self.run_dir, self.rows, self.during, self.facts = run_dir, rows, during, dict(facts)
        self.strength, self.samples, self.batch = strength, samples, batch
        self.given, self.earlier, self.decay = fisher, earlier, decay
        self.drift = adapters == "drift"
        self.dtype = getattr(torch, dtype)
        self.form: Any = None
        self.step = 0  # whose penalty this is
        self.own: Any = 0.0  # this rank's part of it

    def begin(self, trainer: Any) -> None:
        """The weights are those that the run starts from, whether it goes on afterwards or not."""
        ranks: Ranks = trainer.keeper.ranks
        held = State(trainer.model, trainer.optimizer, ranks.rank, ranks.world)
        drift = self.drift and hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
        self.form = Drift(trainer.model, held, ranks, trainer.args.device) if drift else Weights(trainer.model, held)
        own = self.run_dir / forgetting.FOLDER
        resumed = trainer.keeper.resumed
        if resumed and not resumed[1]["initial"] and not own.is_dir():
            raise Failed(f"{own}: gone; it is not measured again for weights that have moved; bring it back", FENCED)
        if resumed and own.is_dir():
            self._read(own, ranks, WEIGHT, fisher.KIND)
        else:
            said = self._make(trainer, ranks)
            self._hold()
            facts = {**self.facts, **said, "strength": self.strength, "drift": drift}
            fisher.write(own, ranks, self.form.kinds(), self.form.places, self.form.shapes, self.form.replicated, facts)
        self._hold()
        self.ranks = ranks
        zero, base = engines(trainer.optimizer)
        if hasattr(zero, "backup_optimizer"):
            raise UserError("forgetting=ewc: engine.zero.offload_optimizer.ratio below 1 has a second optimizer, which "
                            "no penalty reaches; leave the ratio out")  # fmt: skip
        self.join(base, lambda: trainer.state.global_step + 1)

    def join(self, base: torch.optim.Optimizer, step: Callable[[], int]) -> None:
        """Add the penalty's gradient in every step of torch's optimizer, whatever was done to the loss's before."""
        inner = base.step

        def pulled(*args: Any, **kwargs: Any) -> Any:
            self._pull(base, step())
            return inner(*args, **kwargs)

        base.step = pulled  # type: ignore[method-assign]  # wrapped on purpose

    def _hold(self) -> None:
        self.form.fisher = [values.to(self.dtype) for values in self.form.fisher]

    def _make(self, trainer: Any, ranks: Ranks) -> dict[str, Any]:
        """F of this run, new or given, with that of earlier tasks; what the manifest says of it."""
        form = self.form
        if self.given is not None:
            folder = forgetting.place(self.given, "forgetting.fisher")
            said = self._read(folder, ranks, fisher.KIND, key=f"forgetting.fisher={self.given}")
        else:
            said = self._measured(trainer, ranks)
        if self.earlier is not None:
            new = form.fisher
            form.fisher = [torch.zeros_like(values) for values in new]
            folder = forgetting.place(self.earlier, "forgetting.earlier")
            self._read(folder, ranks, fisher.KIND, key=f"forgetting.earlier={self.earlier}")
            form.fisher = [self.decay * old + values for old, values in zip(form.fisher, new, strict=True)]
            said = {**said, "earlier": str(folder), "decay": self.decay}
        return {key: value for key, value in said.items() if key not in ("strength", "drift")}

    def _measured(self, trainer: Any, ranks: Ranks) -> dict[str, Any]:
        """From the cache if the same was measured before."""
        form = self.form
        code = hashlib.sha256(Path(fisher.__file__).read_bytes()).hexdigest()
        decides = {**self.facts, "code": code, "samples": self.samples, "batch": self.batch, "shapes": form.shapes,
                   "seed": trainer.args.seed}  # fmt: skip
        key = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:40]
        cached = rundir.cache_root() / forgetting.FOLDER / key
        if all(ranks.gather((cached / checkpoint.MANIFEST).is_file())):
            try:
                said = self._read(cached, ranks, fisher.KIND)
            except checkpoint.Broken as failure:
                if ranks.rank == 0:
                    print(f"Fisher: what was measured before is broken ({failure}); measuring again", flush=True)
            else:
                if ranks.rank == 0:
                    print(f"Fisher: measured before, {said['samples']:,} samples ({cached})", flush=True)
                return said
        scale = fisher.FLOAT16 if trainer.args.fp16 else 1.0
        tally = fisher.Tally(form.fisher, form.places, ranks.world > 1 and not form.replicated, self.batch > 1, scale)
        rows = self.rows()
        with self.during():
            samples, tokens = fisher.measure(trainer, rows, form.backward(tally), tally, self.samples, self.batch)
        said = {**self.facts, "samples": samples, "tokens": tokens, "batch": self.batch}
        if ranks.rank == 0:
            print(f"Fisher: {samples:,} samples, {tokens:,} supervised tokens", flush=True)
        kinds = {fisher.KIND: form.fisher}
        fisher.write(cached, ranks, kinds, form.places, form.shapes, form.replicated, said)
        return said

    def _read(self, folder: Path, ranks: Ranks, *kinds: str, key: str = "forgetting") -> dict[str, Any]:
        try:
            saved, said = fisher.opened(folder, ranks)
        except checkpoint.Broken as failure:
            if folder.parent == rundir.cache_root() / forgetting.FOLDER:
                raise
            raise Failed(f"{folder}: the Fisher cannot be trusted ({failure})", FENCED)
        for kind, buffers in self.form.kinds().items():
            if kind in kinds:
                fisher.fill(saved, kind, buffers, self.form.places, self.form.shapes, key)
        return said

    def _pull(self, base: torch.optim.Optimizer, step: int) -> None:
        if step != self.step:  # ZeRO steps once for each group of weights
            self.step, self.own = step, self.form.begin(self.strength)
        scaled = getattr(base, "grad_scale", None)  # a fused optimizer unscales float16 gradients itself
        scale = 1.0 if scaled is None else float(scaled)
        for group in base.param_groups:
            for tensor in group["params"]:
                if tensor.requires_grad:
                    if tensor.grad is None:  # unused in this step, as an expert can be; ZeRO has a zero there
                        tensor.grad = torch.zeros_like(tensor)
                    self.own += self.form.pull(tensor, self.strength, scale)

    def penalty(self) -> float:
        """Of the last step, before it moved the weights, over all ranks. Every rank must call."""
        return float(self.form.over_ranks(float(self.own), self.ranks))

    def tensors(self) -> list[torch.Tensor]:
        """What is held for it on this rank."""
        form = self.form
        return (
            [*form.fisher, *form.anchors, *([form.made, form.start] if isinstance(form, Drift) else [])] if form else []
        )
