"""The loss without the full logits: the output head and the cross-entropy in one step, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IGNORED = -100
CHUNK_BYTES = 64 << 20  # of float32 logits held at once
ROUNDING = 0.02  # of the largest logit, in bfloat16
SMALL = 2.0**-40  # times an answer in the place of logits: capping does not change it, and to undo it is exact


@dataclass(frozen=True)
class After:
    """What an architecture does to the product of its output head: cap · tanh(factor · x / cap), or factor · x."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """In place, float32."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative, from the logits that the call has made."""
        return self.factor if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.factor)

    @property
    def scale(self) -> float:
        """What an answer in the place of logits is multiplied with, so that it survives."""
        return 1.0 if self == NOTHING else SMALL / self.factor


NOTHING = After()


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Σ over tokens of the cross-entropy of `hidden @ weight.T + bias`.

    hidden (N, H), targets (N,) without ignored ones. The gradients are made in the forward pass, chunk by chunk:
    three matrix products a chunk, none repeated, and no (N, vocabulary) tensor ever. `kind` is `nll`, or `dft`
    (each token weighted by its own detached probability, arXiv 2508.05629). The part of the sum that belongs to the
    `marked` tokens (N,) is added to the number `of_marked`. `after`: what is done to the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
        kind: str,
        marked: torch.Tensor | None = None,
        of_marked: torch.Tensor | None = None,
        after: After = NOTHING,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        vocabulary = weight.shape[0]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        matrix = weight if dtype is None else weight.to(dtype)
        rows = hidden.to(matrix.dtype)
        grad_hidden = torch.empty_like(rows) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(16, CHUNK_BYTES // (4 * vocabulary))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, rows.shape[0], size):
                part, target = rows[start : start + size], targets[start : start + size]
                logits = nn.functional.linear(part, matrix, None if bias is None else bias.to(matrix.dtype)).float()
                logits = after(logits)
                partition = logits.logsumexp(-1, keepdim=True)
                picked = logits.gather(1, target[:, None])
                losses = partition - picked
                share = (-losses).exp() if kind == "dft" else None
                if smoothing:
                    losses = (1 - smoothing) * losses + smoothing * (partition - logits.mean(-1, keepdim=True))
                losses = losses if share is None else losses * share
                total += losses.sum()
                if marked is not None and of_marked is not None:
                    of_marked += losses[marked[start : start + size]].sum()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                slope = after.slope(logits)
                grad = logits.sub_(partition).exp_()  # the softmax, in place
                if smoothing:
                    grad -= smoothing / vocabulary
                grad.scatter_add_(1, target[:, None], torch.full_like(picked, smoothing - 1))
                if share is not None:
                    grad *= share
                if after != NOTHING:
                    grad *= slope
                grad = grad.to(matrix.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, matrix, out=grad_hidden[start : start + size])
                if grad_weight is not None:
                    if grad_weight.dtype == grad.dtype:
                        grad_weight.addmm_(grad.t(), part)
                    else:
                        grad_weight += grad.t() @ part
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(ctx.dtype),
            None if grad_weight is None else grad_weight.mul_(scale),
            None if grad_bias is None else grad_bias.mul_(scale),
            *(None,) * 6,
        )


class TokenLogProbabilities(torch.autograd.Function):
    """Log-probability (N,) in float32 of each target under `hidden @ weight.T + bias`.

    hidden (N, H), targets (N,) without ignored ones. What each token's gradient is multiplied with is known in the
    backward pass alone, so a chunk's logits are made a second time there: four matrix products a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        after: After = NOTHING,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for part in _chunks(hidden, weight):
                logits = after(_logits(hidden[part], matrix, bias))
                found[part] = logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.dtype, ctx.after = dtype, after
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (wanted,) = upstream
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for part in _chunks(hidden, weight):
                logits = ctx.after(_logits(hidden[part], matrix, bias))
                grad = logits.softmax(-1).mul_(-wanted[part, None])
                grad.scatter_add_(1, targets[part, None], wanted[part, None])
                if ctx.after != NOTHING:
                    grad *= ctx.after.slope(logits)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(matrix.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.t() @ hidden[part].to(matrix.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    size = max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _logits(hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    own = None if bias is None else bias.to(matrix.dtype)
    return nn.functional.linear(hidden.to(matrix.dtype), matrix, own).float()


def _ways(config: Any) -> Iterator[After]:
    """What a text model's configuration may mean; capping is believed, since small logits do not show it."""
    cap = getattr(config, "final_logit_softcapping", None) or None
    factors = [getattr(config, name, None) for name in ("logits_scaling", "logit_scale")]
    yield After(1.0, cap)
    for factor in filter(None, factors):
        yield After(1 / factor, cap)
        yield After(float(factor), cap)


class Head:
    """The output head of a model, able to answer with a loss instead of logits.

    The product happens inside the head's own forward, so that ZeRO-3's hooks have gathered the weight.
    """

    def __init__(self, model: Any, smoothing: float, kind: str) -> None:
        self.module = model.get_output_embeddings()
        self.smoothing, self.kind = smoothing, kind
        self.targets: torch.Tensor | None = None
        self.each = False
        self.marked: torch.Tensor | None = None
        self.of_marked: torch.Tensor | None = None
        self.after = NOTHING  # found out before the first step
        self.known = list(_ways(model.config.get_text_config()))
        # An adapter on the head, or a head that is no plain matrix, has a forward of its own.
        self.usable = type(self.module) is nn.Linear
        if self.usable:
            self.original = self.module.forward
            self.module.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return self.original(hidden)
        wanted = self.targets != IGNORED
        weight, bias = self.module.weight, self.module.bias
        if not torch.is_grad_enabled():  # the function would make gradients that nobody asks for
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        scale = self.after.scale
        if self.each:
            found = TokenLogProbabilities.apply(hidden[wanted], weight, bias, self.targets[wanted], self.after)
            return found if scale == 1 else found * scale
        marked = (None, None) if self.marked is None else (self.marked[wanted], self.of_marked)
        found = FusedLinearCrossEntropy.apply(
            hidden[wanted], weight, bias, self.targets[wanted], self.smoothing, self.kind, *marked, self.after
        )
        return found if scale == 1 else found * scale

    def answer(self, output: torch.Tensor) -> torch.Tensor:
        """What the head has answered, from what the model made of it."""
        return output if self.after == NOTHING else output / SMALL

    def understands(self, raw: torch.Tensor, logits: torch.Tensor) -> bool:
        """Find the way from the head's own product to the model's logits; whether one of those known is it."""
        for way in self.known:
            made, wanted = way(raw.float().clone()), logits.float()
            if (made - wanted).abs().max() <= ROUNDING * wanted.abs().max():
                self.after = way
                return True
        return False

    def found_out(self, other: Head) -> None:
        """What is known of the trained model's head holds for this one, of the same architecture."""
        self.usable, self.after = self.usable and other.usable, other.after

    @contextmanager
    def kept(self) -> Iterator[list[torch.Tensor]]:
        """While open the head's own products are collected, where it is usable."""
        found: list[torch.Tensor] = []
        if not self.usable:
            yield found
            return
        hook = self.module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        try:
            yield found
        finally:
            hook.remove()

    @contextmanager
    def answering(
        self,
        targets: torch.Tensor | None,
        marked: torch.Tensor | None = None,
        of_marked: torch.Tensor | None = None,
        each: bool = False,
    ) -> Iterator[None]:
        """While open the head returns the summed loss over `targets` (B, L), already shifted; None: logits.

        Of the `marked` targets (B, L), the sum is also added to `of_marked`. each: not the loss, but the
        log-probability of every target that is not ignored, in their order.
        """
        self.targets, self.marked, self.of_marked, self.each = targets, marked, of_marked, each
        try:
            yield
        finally:
            self.targets = self.marked = self.of_marked = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """While open the loss is the negative log-likelihood, whatever is trained on."""
        trained = self.smoothing, self.kind
        self.smoothing, self.kind = 0.0, "nll"
        try:
            yield
        finally:
            self.smoothing, self.kind = trained


def full_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, kind: str) -> torch.Tensor:
    """The same sum from the full logits (B, L, V), for architectures that change logits after the head."""
    wanted = targets != IGNORED
    picked, target = logits[wanted].float(), targets[wanted]
    losses = nn.functional.cross_entropy(picked, target, reduction="none", label_smoothing=smoothing)
    if kind == "dft":
        plain = nn.functional.cross_entropy(picked.detach(), target, reduction="none")
        losses = losses * (-plain).exp()
    return losses.sum()


def full_log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probability of every target that is not ignored, from the full logits (B, L, V)."""
    wanted = targets != IGNORED
    picked, target = logits[wanted].float(), targets[wanted]
    return picked.gather(1, target[:, None])[:, 0] - picked.logsumexp(-1)
