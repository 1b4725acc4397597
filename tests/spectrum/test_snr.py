"""The numbers: singular values, both thresholds, and when a Gram matrix is not precise enough."""

import math

import numpy as np
import plain_reference
import pytest
import torch

from ftdist.spectrum import snr
from ftdist.spectrum.names import THRESHOLDS


def slices_of(matrix, step=50):
    """Pieces with the short side as columns, of uneven length."""
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T).detach()

    def slices(precision):
        whole = tall.double() if "float64" in (precision, str(tall.dtype).removeprefix("torch.")) else tall.float()
        return (whole[i : i + step].numpy() for i in range(0, len(whole), step))

    return slices


def planted(rows, columns, strengths, seed, noise=0.02):
    """Noise with strong directions: their singular values are `strengths` times the edge of the noise."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(strengths), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(strengths), generator=generator, dtype=torch.float64))[0]
    edge = noise * (math.sqrt(rows) + math.sqrt(columns))
    signal = (left * (torch.tensor(strengths, dtype=torch.float64) * edge)) @ right.T
    return signal + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def conditioned(rows, columns, decades, seed):
    """A matrix whose singular values fall over so many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, short, generator=generator, dtype=torch.float64))[0]
    return (left * torch.logspace(0, -decades, short, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (64, 256), (256, 64), (16, 512), (600, 520), (2, 40)])
def test_equals_the_plain_reference(rows, columns):
    weight = planted(rows, columns, [3.0, 1.7], seed=rows).bfloat16()
    measured = snr.measure(slices_of(weight), (rows, columns))
    assert measured["reference"]["snr"] == pytest.approx(plain_reference.snr_of(weight), rel=1e-5)
    assert measured["method"].startswith("gram")


def test_a_vector_counts_as_one_row():
    weight = torch.rand(64) + 0.5
    measured = snr.measure(slices_of(weight[None]), (1, 64))
    assert measured["reference"]["snr"] == plain_reference.snr_of(weight) == 1.0
    assert measured["largest"] == pytest.approx(float(weight.norm()), rel=1e-6)


def relative(found, exact):
    return abs(found - exact) / max(exact, 1e-12)


def errors(weight):
    """(method of `measure`, rows of: relative error, its bound; for each way and threshold)."""
    shape = tuple(weight.shape)
    truth = torch.linalg.svdvals(weight.double()).numpy()
    exact = snr._measured(snr.Values(truth, np.zeros_like(truth)), shape)
    slices = slices_of(weight)
    ways = {
        "gram32": snr._measured(snr.by_gram(slices, "float32", shape), shape),
        "gram64": snr._measured(snr.by_gram(slices, "float64", shape), shape),
        "svd": snr._measured(snr.by_svd(slices, shape), shape),
        "measure": snr.measure(slices, shape),
    }
    rows = {
        (way, name): (relative(found[name]["snr"], exact[name]["snr"]), found[name]["error_bound"])
        for way, found in ways.items()
        for name in THRESHOLDS
    }
    for (way, name), (wrong, bound) in rows.items():
        assert wrong <= bound + 1e-12, (way, name)
    return ways["measure"]["method"], rows


@pytest.mark.parametrize("decades", [0.5, 2, 4, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_bound_holds_over_condition_numbers(decades, dtype):
    _, rows = errors(conditioned(120, 150, decades, seed=1).to(dtype))
    for name in THRESHOLDS:
        assert rows["measure", name][0] <= snr.TOLERANCE


# The bulk of the squares is 1: at 1e8 they lie below the last bit of the largest, 1e16, whatever library multiplies.
@pytest.mark.parametrize(("strength", "methods"), [(1e1, ("gram64",)), (1e8, ("svd",))])
def test_svd_takes_over_where_squaring_loses_the_noise(strength, methods):
    used, rows = errors(planted(120, 150, [strength], seed=2).float())
    assert used in methods
    for name in THRESHOLDS:
        assert rows["measure", name][0] <= snr.TOLERANCE
        if "svd" in methods:  # the Gram matrix alone would not do, and says so
            assert rows["gram64", name][0] > 1e-5


def test_a_wrong_product_is_seen(monkeypatch):
    """A library whose float32 products are worse than they should be (TF32, a faulty kernel): float64 takes over."""
    weight = planted(200, 600, [3.0], seed=4).float()

    class Rough(np.ndarray):
        def __matmul__(self, other):
            product = np.asarray(self) @ np.asarray(other)
            return product.astype(np.float16).astype(np.float32) if product.dtype == np.float32 else product

    exact = slices_of(weight)

    def rough(precision):
        for piece in exact(precision):
            yield piece.view(Rough)

    assert snr.measure(exact, (200, 600))["method"] == "gram32"
    found = snr.measure(rough, (200, 600))
    assert found["method"] == "gram64"
    assert found["reference"]["snr"] == pytest.approx(plain_reference.snr_of(weight), rel=1e-5)


def test_large_weights_do_not_overflow():
    weight = planted(40, 90, [3.0], seed=5).float()
    large = snr.measure(slices_of(weight * 2.0**75), (40, 90))
    assert large["method"] == "gram64"
    assert large["reference"]["snr"] * 2.0**75 == pytest.approx(plain_reference.snr_of(weight), rel=1e-5)


def test_deficient_rank():
    weight = planted(60, 80, [2.0], seed=3)
    weight[10:30] = 0
    _, rows = errors(weight)
    for name in THRESHOLDS:
        assert rows["measure", name][0] <= snr.TOLERANCE


@pytest.mark.parametrize("rows", [40, 300, 700])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_values_are_as_close_as_claimed(rows, shift, precision):
    weight = (planted(rows, 900, [5.0], seed=rows) + shift).float()
    found = snr.by_gram(slices_of(weight, 128), precision, (rows, 900))
    exact = torch.linalg.svdvals(weight.double()).numpy()
    assert (np.abs(found.values - exact) <= found.each + 1e-12).all()
    for part in (exact > np.median(exact), exact <= np.median(exact)):
        assert np.abs(found.values - exact)[part].sum() <= found.error_of_sum(part) + 1e-9


def test_zeros_are_infinite_as_in_the_reference():
    measured = snr.measure(slices_of(torch.zeros(20, 30)), (20, 30))
    assert measured["reference"]["snr"] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(20, 30), (1, 30)])
def test_refuses_weights_that_are_not_finite(bad, shape):
    weight = torch.rand(shape)
    weight[0, 7] = bad
    with pytest.raises(snr.NotFinite):
        snr.measure(slices_of(weight), shape)


@pytest.mark.parametrize("beta", [0.05, 0.2, 0.3, 0.5, 0.8, 1.0])
def test_median_of_noise_is_the_published_one(beta):
    # Gavish and Donoho, equations 11 and 5: coefficient for known noise / √median ≈ this cubic, within 0.02
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    published = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert known / math.sqrt(snr.median_of_noise(beta)) == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (150, 600), (64, 1024)])
def test_true_edge_finds_what_was_planted_where_the_reference_does_not(rows, columns):
    weight = planted(rows, columns, [3.0, 2.5, 2.0, 1.6], seed=7)
    measured = snr.measure(slices_of(weight), (rows, columns))
    assert 4 <= measured["marchenko_pastur"]["signal_values"] <= 6
    assert measured["reference"]["signal_values"] > rows // 6


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (150, 600), (64, 1024)])
def test_true_edge_calls_pure_noise_noise(rows, columns):
    weight = planted(rows, columns, [], seed=8)
    measured = snr.measure(slices_of(weight), (rows, columns))
    assert measured["marchenko_pastur"]["signal_values"] <= 2
    assert measured["reference"]["signal_values"] > rows // 6
