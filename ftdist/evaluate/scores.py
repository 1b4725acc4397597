"""Metrics of answers against references, and paired bootstrap intervals for the difference of two models.

Every metric is sufficient statistics, a row of numbers for each answer, and a function from their sum to the value:
so a corpus metric like BLEU is resampled exactly as a mean is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ftdist.evaluate import rouge

NAMES = ("exact_match", "bleu", "chrf", "rouge")
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


@dataclass(frozen=True)
class Metric:
    """`statistics` (rows, k): summed over rows they give the metric by `value`; `rows`: each row's own score.

    A row that has no score is NaN in `rows` and zeros in `statistics`.
    """

    statistics: np.ndarray
    value: Callable[[np.ndarray], float]
    rows: np.ndarray
    higher_is_better: bool = True
    signature: str | None = None

    @property
    def total(self) -> float:
        return self.value(self.statistics.sum(0))


def mean(scores: Sequence[float] | np.ndarray) -> Metric:
    """The mean of the rows' scores; NaN has no weight."""
    rows = np.asarray(scores, np.float64)
    known = ~np.isnan(rows)
    return Metric(np.stack([np.where(known, rows, 0), known], 1), _ratio, rows)


def loss(sums: np.ndarray, tokens: np.ndarray) -> Metric:
    """Mean negative log-likelihood of a token, each with the same weight."""
    rows = np.divide(sums, tokens, out=np.full(len(sums), np.nan), where=tokens > 0)
    return Metric(np.stack([sums, tokens], 1).astype(np.float64), _ratio, rows, higher_is_better=False)


def of_tokens(sums: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> dict[str, Metric]:
    """loss, perplexity, and the share of tokens that are the likeliest in their place (next-token accuracy)."""
    of = loss(sums, tokens)
    rows = np.divide(hits, tokens, out=np.full(len(hits), np.nan), where=tokens > 0)
    right = Metric(np.stack([hits, tokens], 1).astype(np.float64), _ratio, rows)
    return {"loss": of, "perplexity": perplexity(of), "token_accuracy": right}


def mean_of_sets(losses: Sequence[Metric]) -> Metric:
    """The mean of several sets' losses, each set with the same weight."""
    ends = np.cumsum([0, *(len(of.rows) for of in losses)])
    statistics = np.zeros((ends[-1], 2 * len(losses)))
    for i, of in enumerate(losses):
        statistics[ends[i] : ends[i + 1], 2 * i : 2 * i + 2] = of.statistics

    def value(total: np.ndarray) -> float:
        return float(np.mean([_ratio(pair) for pair in total.reshape(-1, 2)]))

    return Metric(statistics, value, np.concatenate([of.rows for of in losses]), higher_is_better=False)


def perplexity(of: Metric) -> Metric:
    """exp of a loss."""
    return Metric(of.statistics, lambda total: math.exp(min(_ratio(total), 700)), np.exp(of.rows.clip(max=700)), False)


def preferences(chosen: np.ndarray, rejected: np.ndarray, before: np.ndarray | None) -> tuple[dict[str, Metric], Any]:
    """Metrics of pairs from the summed negative log-likelihoods (pairs,) of both answers, and the margins (pairs,).

    before: the margins of the model that this one is compared with; what has grown since is its reward.
    """
    margins = rejected - chosen
    found = {"preference_accuracy": mean((margins > 0).astype(float)), "preference_margin": mean(margins)}
    if before is not None:
        found["reward_accuracy"] = mean((margins > before).astype(float))
    return found, margins


def _ratio(total: np.ndarray) -> float:
    return float(total[0] / total[1]) if total[1] else math.nan


def of_answers(
    answers: list[str], references: list[str], names: Sequence[str], pattern: str | None, bleu_tokenize: str
) -> dict[str, Metric]:
    """The metrics `names`, and extracted_match where there is a pattern."""
    found: dict[str, Metric] = {}
    pairs = list(zip(answers, references, strict=True))
    if "exact_match" in names:
        found["exact_match"] = mean([float(a.strip() == r.strip()) for a, r in pairs])
    if pattern is not None:
        found["extracted_match"] = mean([float(same_answer(a, r, pattern)) for a, r in pairs])
    if "bleu" in names or "chrf" in names:
        found |= _of_sacrebleu(answers, references, names, bleu_tokenize)
    if "rouge" in names:
        by_row = [rouge.scores(r, a) for a, r in pairs]
        found |= {kind: mean([row[kind] for row in by_row]) for kind in rouge.KINDS}
    return found


def extracted(text: str, pattern: str) -> str | None:
    """What the last match of `pattern` holds (its first group if it has one); None without a match."""
    last = None
    for last in re.finditer(pattern, text):  # noqa: B007  (the last match is used below)
        pass
    if last is None:
        return None
    return (last[1] if last.re.groups else last[0]) or ""


def same_answer(answer: str, reference: str, pattern: str) -> bool:
    """Whether both texts hold the same answer: as numbers if they are, else as words. No answer is never right."""
    a, r = extracted(answer, pattern), extracted(reference, pattern)
    return a is not None and r is not None and _normal(a) == _normal(r)


def _normal(text: str) -> str | float:
    text = " ".join(text.split()).rstrip(".").casefold()
    try:
        return float(text.replace(",", "").replace("$", "").rstrip("%"))
    except ValueError:
        return text


def _of_sacrebleu(answers: list[str], references: list[str], names: Sequence[str], tokenize: str) -> dict[str, Metric]:
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    made: dict[str, tuple[Any, Any]] = {
        "bleu": (BLEU(tokenize=tokenize), BLEU(tokenize=tokenize, effective_order=True)),
        "chrf": (CHRF(), CHRF()),
    }
    for name, (corpus, single) in made.items():
        if name not in names:
            continue
        corpus.corpus_score(answers or [""], [references or [""]])  # the signature knows the number of references
        statistics = np.array(corpus._extract_corpus_statistics(answers, [references]), np.float64)
        rows = [single.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)]
        found[name] = Metric(
            statistics.reshape(len(answers), -1),
            partial(_corpus_score, corpus),
            np.array(rows),
            signature=str(corpus.get_signature()),
        )
    return found


def _corpus_score(metric: Any, total: np.ndarray) -> float:
    return float(metric._compute_score_from_stats([int(n) for n in total]).score)


def compared(base: Metric, tuned: Metric, resamples: int, seed: int) -> dict[str, Any]:
    """tuned − base on the same rows: the difference, its paired bootstrap interval (Koehn 2004), wins, ties, losses.

    Only rows that both have a score for count.
    """
    both = ~(np.isnan(base.rows) | np.isnan(tuned.rows))
    a, b = base.statistics[both], tuned.statistics[both]
    better = np.sign(np.round(tuned.rows[both] - base.rows[both], 12)) * (1 if tuned.higher_is_better else -1)
    found: dict[str, Any] = {
        "difference": tuned.value(b.sum(0)) - base.value(a.sum(0)) if len(a) else math.nan,
        "wins": int((better > 0).sum()),
        "ties": int((better == 0).sum()),
        "losses": int((better < 0).sum()),
    }
    if resamples and len(a) > 1:
        random = np.random.Generator(np.random.PCG64(seed))
        differences = np.empty(resamples)
        for i in range(resamples):
            weights = np.bincount(random.integers(0, len(a), len(a)), minlength=len(a))
            differences[i] = tuned.value(weights @ b) - base.value(weights @ a)
        low, high = np.nanpercentile(differences, INTERVAL)
        found |= {"low": float(low), "high": float(high), "resamples": resamples}
    return found
