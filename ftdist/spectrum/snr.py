"""The signal-to-noise ratio of a matrix from all of its singular values.

With singular values S of an n × m weight: snr = ΣS[S > threshold] / ΣS[S ≤ threshold] / S[0].

`reference` is the threshold of the Spectrum tool (arXiv 2406.06623): σ·(1 + √β), β = min(n, m)/max(n, m) and
σ = IQR(S)/1.349. It lacks the factor √max(n, m) of the Marchenko–Pastur law, so it is no edge of noise.
`marchenko_pastur` is that edge: τ·(√n + √m), with the noise level τ from the median of S as in Gavish and
Donoho, "The optimal hard threshold for singular values is 4/√3" (2014), section III-E.

Singular values come from the eigenvalues of the Gram matrix of the short side in float64. That squares the
condition number: an eigenvalue is off by up to δ = 4·ε·√(n+m)·S[0]² (a float64 SVD shows about a quarter of
that), a singular value s by δ/(2s). What this does to the SNR follows from the values themselves; where it
could be more than `TOLERANCE`, or a value could lie on the other side of the threshold, the matrix is read
again and goes through a QR decomposition in slices and an SVD, which do not square anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Threshold = Literal["reference", "marchenko_pastur"]
THRESHOLDS: tuple[Threshold, ...] = ("reference", "marchenko_pastur")
TOLERANCE = 1e-6  # relative, of the SNR
_EPSILON = 2.0**-52
_PANEL = 256  # rows of the Gram matrix that are updated at once: half the work of the whole square is left out

Slices = Callable[[], Iterator["torch.Tensor"]]  # float64 pieces (any length × short side) of a matrix, anew each time


class NotFinite(ValueError):
    """A weight is NaN or infinite."""


def measure(slices: Slices, shape: tuple[int, int]) -> dict[str, Any]:
    """Both SNRs of a matrix, the method, the largest singular value and a bound on the relative error."""
    long, short = max(shape), min(shape)
    if short == 1:
        return _single(math.sqrt(sum(float((piece * piece).sum()) for piece in slices())))
    values, delta = _by_gram(slices, short, long)
    measured = _measured(values, delta, shape)
    if max(measured[name]["error_bound"] for name in THRESHOLDS) <= TOLERANCE:
        return measured | {"method": "gram"}
    return _measured(_by_svd(slices), 0.0, shape) | {"method": "svd"}


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


def _by_gram(slices: Slices, short: int, long: int) -> tuple[torch.Tensor, float]:
    import torch

    gram: torch.Tensor | None = None
    for piece in slices():
        if gram is None:
            gram = torch.zeros(short, short, dtype=torch.float64, device=piece.device)
        for start in range(0, short, _PANEL):  # the triangle below the diagonal, in panels
            end = min(start + _PANEL, short)
            gram[start:end, :end].addmm_(piece[:, start:end].T, piece[:, :end])
    assert gram is not None
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise NotFinite
    squares = torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp(min=0).cpu()
    delta = 4 * _EPSILON * math.sqrt(long + short) * float(squares[0])
    return squares.sqrt(), delta


def _by_svd(slices: Slices) -> torch.Tensor:
    import torch

    triangle: torch.Tensor | None = None
    for piece in slices():
        stacked = piece if triangle is None else torch.cat([triangle, piece])
        triangle = torch.linalg.qr(stacked, mode="r")[1]
    assert triangle is not None
    return torch.linalg.svdvals(triangle).cpu()


def _measured(values: torch.Tensor, delta: float, shape: tuple[int, int]) -> dict[str, Any]:
    measured: dict[str, Any] = {name: _ratio(values, delta, shape, name) for name in THRESHOLDS}
    return measured | {"largest": float(values[0])}


def _ratio(values: torch.Tensor, delta: float, shape: tuple[int, int], threshold: Threshold) -> dict[str, Any]:
    """SNR at a threshold and a bound on its relative error, where eigenvalues are off by up to `delta`."""
    import torch

    errors = torch.minimum(delta / (2 * values).clamp(min=1e-300), torch.full_like(values, math.sqrt(delta)))
    place, off = (reference_threshold if threshold == "reference" else edge)(values, errors, shape)
    is_signal = values > place
    signal, noise = float(values[is_signal].sum()), float(values[~is_signal].sum())
    largest = float(values[0])
    if largest == 0.0 or (noise == 0.0 and not bool(is_signal.all())):
        snr = math.inf
    else:
        snr = signal / (noise if noise else 1.0) / largest  # today's reference tool: no noise at all counts as 1
    unsure = values[(values - place).abs() <= errors + off]
    # A value within rounding of the threshold may be on either side; exact zeros are noise on every account.
    moved = float(unsure.sum()) if delta else 0.0
    bound = float(errors[0]) / largest if largest else 0.0
    for part, total in ((is_signal, signal), (~is_signal, noise)):
        if total:
            bound += (float(errors[part].sum()) + moved) / total
        elif bool(part.any()):
            bound = math.inf if delta else 0.0
    return {"snr": snr, "threshold": place, "signal_values": int(is_signal.sum()), "error_bound": bound}


def reference_threshold(values: torch.Tensor, errors: torch.Tensor, shape: tuple[int, int]) -> tuple[float, float]:
    """The reference tool's threshold and how far it can be off."""
    low, high = _quantile(values, 0.25), _quantile(values, 0.75)
    factor = (1 + math.sqrt(min(shape) / max(shape))) / 1.349
    return (high - low) * factor, (_quantile(errors, 0.25) + _quantile(errors, 0.75)) * factor


def edge(values: torch.Tensor, errors: torch.Tensor, shape: tuple[int, int]) -> tuple[float, float]:
    """The largest singular value of noise alone (Marchenko–Pastur), and how far it can be off."""
    ratio = min(shape) / max(shape)
    factor = (1 + math.sqrt(ratio)) / math.sqrt(median_of_noise(ratio))
    return _quantile(values, 0.5) * factor, _quantile(errors, 0.5) * factor


def _quantile(values: torch.Tensor, at: float) -> float:
    """As torch.quantile: linear between the two nearest."""
    ordered = values.sort().values
    position = at * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    start, end = float(ordered[below]), float(ordered[above])
    return start + (end - start) * (position - below)


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
