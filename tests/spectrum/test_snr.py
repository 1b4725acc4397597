"""The numbers: singular values, both thresholds, and when a Gram matrix is not precise enough."""

import math

import plain_reference
import pytest
import torch

from ftdist.spectrum import snr


def slices_of(matrix, step=50):
    """Float64 pieces with the short side as columns, of uneven length."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return lambda: (tall[i : i + step].double() for i in range(0, len(tall), step))


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
    assert measured["method"] == "gram"


def test_a_vector_counts_as_one_row():
    weight = torch.rand(64) + 0.5
    measured = snr.measure(lambda: iter([weight[:, None].double()]), (1, 64))
    assert measured["reference"]["snr"] == plain_reference.snr_of(weight) == 1.0
    assert measured["largest"] == pytest.approx(float(weight.norm()), rel=1e-6)


def errors(weight):
    """threshold -> (relative error of the Gram matrix's SNR, its bound, relative error of what `measure` says)."""
    shape = tuple(weight.shape)
    exact = snr._measured(torch.linalg.svdvals(weight), 0.0, shape)
    by_gram = snr._measured(*snr._by_gram(slices_of(weight), min(shape), max(shape)), shape)
    measured = snr.measure(slices_of(weight), shape)
    return measured["method"], {
        name: (
            abs(by_gram[name]["snr"] - exact[name]["snr"]) / max(exact[name]["snr"], 1e-12),
            by_gram[name]["error_bound"],
            abs(measured[name]["snr"] - exact[name]["snr"]) / max(exact[name]["snr"], 1e-12),
        )
        for name in snr.THRESHOLDS
    }


@pytest.mark.parametrize("decades", [0.5, 2, 4, 6, 9])
def test_the_error_bound_holds_over_condition_numbers(decades):
    _, found = errors(conditioned(120, 150, decades, seed=1))
    for wrong, bound, of_measure in found.values():
        assert wrong <= bound
        assert of_measure <= snr.TOLERANCE


@pytest.mark.parametrize(("strength", "method"), [(1e2, "gram"), (1e5, "svd"), (1e7, "svd")])
def test_svd_takes_over_where_squaring_loses_the_noise(strength, method):
    used, found = errors(planted(120, 150, [strength], seed=2))
    assert used == method
    for wrong, bound, of_measure in found.values():
        assert wrong <= bound
        assert of_measure <= snr.TOLERANCE
    if strength == 1e7:  # the Gram matrix alone would not do
        assert max(wrong for wrong, _, _ in found.values()) > 1e-5


def test_deficient_rank():
    weight = planted(60, 80, [2.0], seed=3)
    weight[10:30] = 0
    _, found = errors(weight)
    for wrong, bound, of_measure in found.values():
        assert wrong <= bound
        assert of_measure <= snr.TOLERANCE


@pytest.mark.parametrize("rows", [40, 300, 700])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_eigenvalues_are_as_close_as_claimed(rows, shift):
    weight = planted(rows, 900, [5.0], seed=rows) + shift
    values, delta = snr._by_gram(slices_of(weight, 128), rows, 900)
    exact = torch.linalg.svdvals(weight)
    assert float((values**2 - exact**2).abs().max()) <= delta


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
