"""The signal-to-noise ratio of a matrix from all of its singular values.

With singular values S of an n × m weight: snr = ΣS[S > threshold] / ΣS[S ≤ threshold] / S[0].

`reference` is the threshold of the Spectrum tool (arXiv 2406.06623): σ·(1 + √β), β = min(n, m)/max(n, m) and
σ = IQR(S)/1.349. It lacks the factor √max(n, m) of the Marchenko–Pastur law, so it is no edge of noise.
`marchenko_pastur` is that edge: τ·(√n + √m), with the noise level τ from the median of S as in Gavish and
Donoho, "The optimal hard threshold for singular values is 4/√3" (2014), section III-E.

Singular values come from the eigenvalues, in float64, of the Gram matrix of the short side. Three ways, the
cheapest first; each says how far its SNR can be off, and the next one is taken where that is more than `TOLERANCE`
or a value could lie on the other side of the threshold:

gram32  products of float32 pieces, added up in float64; the diagonal in float64 throughout. Products of bfloat16 and
        float16 weights are exact in float32, what is lost is lost in the sums within a piece. How much is not assumed
        but seen: the error E of the Gram matrix is applied to random vectors, E·X = G·X − Wᵀ(W·X).
        Left out for matrices that are nearly square: their smallest values would ask for more than float32 has.
gram64  the same in float64. Both square the condition number: the eigenvalues alone are off by up to
        δ = 4·ε·√(n+m)·S[0]² (a float64 SVD shows about a quarter of that).
svd     a QR decomposition in slices and an SVD of the triangle, in float64, which square nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ftdist.spectrum.names import THRESHOLDS, Threshold

TOLERANCE = 3e-6  # relative, of the SNR
_EPSILON = 2.0**-52
_PROBES = 16  # random vectors that an error of the Gram matrix is seen by
_CHI2 = 3.94  # χ² with 16 degrees of freedom is below it once in a thousand
_ROWS = 128  # of a piece that are in float64 at once for the probes: they stay in the cache

Precision = Literal["float32", "float64"]
# Pieces (any length × short side) of a matrix, anew each time; numpy arrays, or torch tensors on a GPU. They hold the
# stored values exactly: in the precision that is asked for, or in float64 where the weights are stored so.
Slices = Callable[[Precision], Iterator[Any]]


class NotFinite(ValueError):
    """A weight is NaN or infinite."""


@dataclass(frozen=True)
class Values:
    """Singular values, highest first, and how far off they can be: each, and the sum of any of them."""

    values: np.ndarray
    each: np.ndarray
    spectral: float = 0.0  # norms of the error of the Gram matrix
    frobenius: float = 0.0

    @staticmethod
    def of_gram(squares: np.ndarray, spectral: float, frobenius: float) -> Values:
        """From eigenvalues. |s − t| = |s² − t²|/(s + t), and never more than √|s² − t²|."""
        values = np.sqrt(squares)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = spectral / (values + np.sqrt((squares - spectral).clip(min=0)))
        return Values(values, np.fmin(each, math.sqrt(spectral)), spectral, frobenius)

    def error_of_sum(self, part: np.ndarray) -> float:
        """Hoffman and Wielandt: the errors of all eigenvalues together, squared, are at most ‖E‖²_F."""
        alone = float(self.each[part].sum())
        if not self.spectral:
            return alone
        large = part & (self.values**2 > self.spectral)
        together = self.frobenius / self.spectral * float(np.linalg.norm(self.each[large]))
        return min(alone, together + float(self.each[part & ~large].sum()))


def measure(slices: Slices, shape: tuple[int, int]) -> dict[str, Any]:
    """Both SNRs of a matrix, the method, the largest singular value and a bound on the relative error."""
    if min(shape) == 1:
        return _single(math.sqrt(sum(float((piece * piece).sum()) for piece in slices("float64"))))
    precisions: tuple[Precision, ...] = ("float32", "float64") if max(shape) >= 2 * min(shape) else ("float64",)
    for precision in precisions:
        found = by_gram(slices, precision, shape)
        measured = _measured(found, shape) if found else {}
        if found and max(measured[name]["error_bound"] for name in THRESHOLDS) <= TOLERANCE:
            return measured | {"method": f"gram{precision[-2:]}"}
    if not found:
        raise NotFinite
    return _measured(by_svd(slices, shape), shape) | {"method": "svd"}


def _single(length: float) -> dict[str, Any]:
    """A 1 × d weight has one singular value: all signal, no noise, which the reference tool counts as 1."""
    if not math.isfinite(length):
        raise NotFinite
    entry = {
        "snr": 1.0 if length else math.inf,
        "threshold": 0.0,
        "signal_values": int(length > 0),
        "error_bound": 0.0,
    }
    return dict.fromkeys(THRESHOLDS, entry) | {"method": "norm", "largest": length}


def by_gram(slices: Slices, precision: Precision, shape: tuple[int, int]) -> Values | None:
    """Singular values by way of the Gram matrix; None where it is not finite."""
    short = min(shape)
    gram = probes = image = squares = None
    xp: Any = None
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in slices(precision):
            if gram is None:
                xp, like = _library(piece)
                gram = xp.zeros((short, short), dtype=xp.float64, **like)
                probes = xp.asarray(np.random.default_rng(0).standard_normal((short, _PROBES)), **like)
                image, squares = xp.zeros_like(probes), xp.zeros_like(probes[:, 0])
            gram += piece.T @ piece
            for first in range(0, len(piece) if precision == "float32" else 0, _ROWS):
                part = xp.asarray(piece[first : first + _ROWS], dtype=xp.float64)
                image += part.T @ (part @ probes)
                squares += xp.einsum("ij,ij->j", part, part)
            del piece
        assert gram is not None
        if precision == "float32":
            gram[range(short), range(short)] = squares  # sums without signs lose most, and all to one side
        if not bool(xp.isfinite(gram).all()):
            return None
        seen = _host(gram @ probes - image) if precision == "float32" else np.zeros((1, 1))
    found = _host(xp.linalg.eigvalsh(gram))[::-1].clip(min=0)
    solver = 4 * _EPSILON * math.sqrt(sum(shape)) * float(found[0])
    # u·E·X of a singular pair (u, v) is ‖E‖₂·(v·X), a normal vector of _PROBES numbers; the same for ‖E‖_F at worst.
    spectral = float(np.linalg.norm(seen, 2)) / math.sqrt(_CHI2) + solver
    frobenius = float(np.linalg.norm(seen)) / math.sqrt(_CHI2) + solver * math.sqrt(short)
    return Values.of_gram(found, min(spectral, frobenius), frobenius)


def by_svd(slices: Slices, shape: tuple[int, int]) -> Values:
    """Singular values without squaring anything."""
    triangle = None
    xp: Any = None
    for piece in slices("float64"):
        xp, _ = _library(piece)
        stacked = piece if triangle is None else xp.concatenate([triangle, piece])
        triangle = xp.linalg.qr(stacked, mode="r")
        triangle = triangle if xp is np else triangle[1]
    assert triangle is not None
    values = _host(xp.linalg.svdvals(triangle))
    return Values(values, np.full_like(values, 4 * _EPSILON * math.sqrt(sum(shape)) * values[0]))


def _library(piece: Any) -> tuple[Any, dict[str, Any]]:
    """The module of an array, and the keywords that put another one beside it."""
    if isinstance(piece, np.ndarray):
        return np, {}
    import torch

    return torch, {"device": piece.device}


def _host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _measured(found: Values, shape: tuple[int, int]) -> dict[str, Any]:
    measured: dict[str, Any] = {name: _ratio(found, shape, name) for name in THRESHOLDS}
    return measured | {"largest": float(found.values[0])}


def _ratio(found: Values, shape: tuple[int, int], threshold: Threshold) -> dict[str, Any]:
    """SNR at a threshold and a bound on its relative error."""
    values = found.values
    place, off = (reference_threshold if threshold == "reference" else edge)(values, found.each, shape)
    is_signal = values > place
    signal, noise = float(values[is_signal].sum()), float(values[~is_signal].sum())
    largest = float(values[0])
    if largest == 0.0 or (noise == 0.0 and not bool(is_signal.all())):
        snr = math.inf
    else:
        snr = signal / (noise if noise else 1.0) / largest  # today's reference tool: no noise at all counts as 1
    # A value within rounding of the threshold may be on either side; exact zeros are noise on every account.
    moved = float(values[np.abs(values - place) <= found.each + off].sum())
    bound = float(found.each[0]) / largest if largest else 0.0
    for part, total in ((is_signal, signal), (~is_signal, noise)):
        if total:
            bound += (found.error_of_sum(part) + moved) / total
        elif bool(part.any()):
            bound = math.inf if found.each.any() else 0.0
    return {"snr": snr, "threshold": place, "signal_values": int(is_signal.sum()), "error_bound": bound}


def reference_threshold(values: np.ndarray, errors: np.ndarray, shape: tuple[int, int]) -> tuple[float, float]:
    """The reference tool's threshold and how far it can be off."""
    low, high = _quantile(values, 0.25), _quantile(values, 0.75)
    factor = (1 + math.sqrt(min(shape) / max(shape))) / 1.349
    return (high - low) * factor, (_quantile(errors, 0.25) + _quantile(errors, 0.75)) * factor


def edge(values: np.ndarray, errors: np.ndarray, shape: tuple[int, int]) -> tuple[float, float]:
    """The largest singular value of noise alone (Marchenko–Pastur), and how far it can be off."""
    ratio = min(shape) / max(shape)
    factor = (1 + math.sqrt(ratio)) / math.sqrt(median_of_noise(ratio))
    return _quantile(values, 0.5) * factor, _quantile(errors, 0.5) * factor


def _quantile(values: np.ndarray, at: float) -> float:
    return float(np.quantile(values, at))


@functools.lru_cache(maxsize=1024)
def median_of_noise(ratio: float) -> float:
    """Median eigenvalue of noise·noiseᵀ/(long side): the Marchenko–Pastur law at variance 1, β = `ratio`.

    With x = 1 + β + 2√β·cos t the density times dx is 2 sin²t / (π x) dt, smooth even where β = 1.
    """
    points = 20_000
    total, area = 0.0, []
    for i in range(points):
        t = math.pi * (i + 0.5) / points
        x = 1 + ratio + 2 * math.sqrt(ratio) * math.cos(t)
        total += 2 * math.sin(t) ** 2 / (math.pi * x) * (math.pi / points)
        area.append(total)
    low, high = 0, points - 1
    while low < high:  # t runs from the largest eigenvalue to the smallest
        middle = (low + high) // 2
        low, high = (middle + 1, high) if area[middle] < total / 2 else (low, middle)
    before = area[low - 1] if low else 0.0
    share = (total / 2 - before) / (area[low] - before)
    t = math.pi * (low + share) / points
    return 1 + ratio + 2 * math.sqrt(ratio) * math.cos(t)
