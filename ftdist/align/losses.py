"""Losses of preference pairs from log-probabilities of whole answers: TRL's own formulas, a pair at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

SURE = -1e-6  # nats a token, the surest that an answer counts as
TEMPERATURE = 0.05  # of discopop (arXiv 2406.08414)


@dataclass(frozen=True)
class Pairs:
    """Pairs (B,): log-probabilities of the chosen and the rejected answers, by the reference too, and their tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log π − log π_ref of the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """The same of the rejected ones."""
        return self.rejected - self.reference_rejected

    @property
    def difference(self) -> torch.Tensor:
        """By how much more the policy has come to prefer the chosen answer than the reference does."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def difference_a_token(self) -> torch.Tensor:
        """The same of means over each answer's tokens."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


@dataclass(frozen=True)
class Objective:
    """What is minimised: weighted losses of pairs, and the negative log-likelihood of chosen tokens if it is wanted."""

    losses: Sequence[tuple[str, float]]
    beta: float
    smoothing: float = 0.0
    margin: float = 0.0

    def of_pairs(self, pairs: Pairs) -> torch.Tensor:
        """Loss (B,) of each pair, in AOT of each quantile; `sft` is not in it, whose mean is over tokens."""
        total = torch.zeros_like(pairs.chosen)
        for name, weight in self.losses:
            if name != "sft":
                total = total + weight * LOSSES[name](self, pairs)
        return total

    @property
    def sft(self) -> float:
        """Weight of the mean negative log-likelihood of a chosen token."""
        return sum(weight for name, weight in self.losses if name == "sft")

    def _smoothed(self, logits: torch.Tensor) -> torch.Tensor:
        """A label is wrong with probability `smoothing` (conservative DPO, Mitchell 2023)."""
        loss = -logsigmoid(logits)
        return loss if not self.smoothing else (1 - self.smoothing) * loss - self.smoothing * logsigmoid(-logits)


def _sigmoid(o: Objective, p: Pairs) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, equation 7)."""
    return o._smoothed(o.beta * p.difference - o.margin)


def _sigmoid_norm(o: Objective, p: Pairs) -> torch.Tensor:
    """Means over tokens in the place of sums; without a reference and with a margin it is SimPO (Meng et al. 2024)."""
    return o._smoothed(o.beta * p.difference_a_token - o.margin)


def _hinge(o: Objective, p: Pairs) -> torch.Tensor:
    """SLiC (Zhao et al. 2023)."""
    return torch.relu(1 - o.beta * p.difference)


def _ipo(o: Objective, p: Pairs) -> torch.Tensor:
    """IPO (Azar et al. 2023, equation 17) with means over tokens, as its authors' own runs had."""
    return (p.difference_a_token - 1 / (2 * o.beta)) ** 2


def _exo_pair(o: Objective, p: Pairs) -> torch.Tensor:
    """EXO (Ji et al. 2024, equation 16) for two answers."""
    logits, label = o.beta * p.difference, torch.tensor(o.smoothing)
    first = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-label))
    return first + (-logits).sigmoid() * (logsigmoid(-logits) - label.log())


def _nca_pair(o: Objective, p: Pairs) -> torch.Tensor:
    """NCA (Chen et al. 2024)."""
    chosen, rejected = o.beta * p.chosen_ratio, o.beta * p.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(o: Objective, p: Pairs) -> torch.Tensor:
    """Unbiased where labels are flipped with probability `smoothing` (Chowdhury et al. 2024)."""
    logits = o.beta * p.difference
    return ((o.smoothing - 1) * logsigmoid(logits) + o.smoothing * logsigmoid(-logits)) / (1 - 2 * o.smoothing)


def _bco_pair(o: Objective, p: Pairs) -> torch.Tensor:
    """BCO (Jung et al. 2024) without its running mean."""
    return -logsigmoid(o.beta * p.chosen_ratio) - logsigmoid(-o.beta * p.rejected_ratio)


def _sppo_hard(o: Objective, p: Pairs) -> torch.Tensor:
    """SPPO (Wu et al. 2024, equation 4.7) where the chosen answer always wins."""
    return (p.chosen_ratio - 0.5 / o.beta) ** 2 + (p.rejected_ratio + 0.5 / o.beta) ** 2


def _apo_zero(o: Objective, p: Pairs) -> torch.Tensor:
    """APO (D'Oosterlinck et al. 2024, equation 7): chosen answers are better than the model's own."""
    return 1 - (o.beta * p.chosen_ratio).sigmoid() + (o.beta * p.rejected_ratio).sigmoid()


def _apo_down(o: Objective, p: Pairs) -> torch.Tensor:
    """APO (equation 8): they are worse."""
    return (o.beta * p.chosen_ratio).sigmoid() + 1 - (o.beta * p.difference).sigmoid()


def _aot(o: Objective, p: Pairs) -> torch.Tensor:
    """AOT (Melnyk et al. 2024) for pairs: quantiles of the policy's preferences above those of the reference's."""
    policy, reference = p.chosen - p.rejected, p.reference_chosen - p.reference_rejected
    return o._smoothed(o.beta * (policy.sort().values - reference.sort().values))


def _aot_unpaired(o: Objective, p: Pairs) -> torch.Tensor:
    """AOT: quantiles of the chosen answers' gains above those of the rejected ones'."""
    return o._smoothed(o.beta * (p.chosen_ratio.sort().values - p.rejected_ratio.sort().values))


def _discopop(o: Objective, p: Pairs) -> torch.Tensor:
    """DiscoPOP (Lu et al. 2024, equation 5)."""
    logits = o.beta * p.difference
    share = (logits / TEMPERATURE).sigmoid()
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def _odds(o: Objective, p: Pairs) -> torch.Tensor:
    """ORPO's odds ratio (Hong et al. 2024, equation 7), times beta; ORPO is `sft` and this one. No reference."""
    # a certain answer has infinite odds, and NaN for a gradient
    chosen = (p.chosen / p.chosen_tokens).clamp(max=SURE)
    rejected = (p.rejected / p.rejected_tokens).clamp(max=SURE)
    odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -o.beta * logsigmoid(odds)


LOSSES: dict[str, Callable[[Objective, Pairs], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "discopop": _discopop,
    "odds": _odds,
}
