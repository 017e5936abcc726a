# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from scipy.stats import t as student

from pyro_rb.diagnostics import stats
from pyro_rb.diagnostics.moments import RunningMoments


def test_running_moments_agree_with_torch():
    x = 1e3 + torch.randn(200, 3, 2, dtype=torch.double)
    moments = RunningMoments()
    increments = [moments.update(row) for row in x]
    torch.testing.assert_close(sum(increments), (x - x.mean(0)).square().sum())
    assert moments.count == 200
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.variance, x.var(0))
    torch.testing.assert_close(moments.standard_error, (x.var(0) / 200).sqrt())
    torch.testing.assert_close(moments.rms, x.square().mean(0).sqrt())


def test_merged_moments_agree_with_torch():
    x = torch.randn(50, 4, dtype=torch.double)
    total = RunningMoments()
    total.merge(RunningMoments())
    for part in x.split([1, 20, 29]):
        block = RunningMoments()
        for row in part:
            block.update(row)
        total.merge(block)
    assert total.count == 50
    torch.testing.assert_close(total.mean, x.mean(0))
    torch.testing.assert_close(total.variance, x.var(0))


def test_constant_coordinates_have_no_variance():
    moments = RunningMoments()
    for _ in range(7):
        moments.update(torch.tensor([0.1, 1e8]))
    assert moments.variance.tolist() == [0.0, 0.0]
    assert stats.total_variance(torch.full((7, 2), 0.1)) == 0.0


def test_variance_of_one_draw_is_undefined():
    moments = RunningMoments()
    moments.update(torch.ones(2))
    assert moments.variance.isnan().all()
    with pytest.raises(ValueError, match=r"need at least 2 draws, got samples of shape \(1, 2\)"):
        stats.total_variance(torch.ones(1, 2))


@pytest.mark.parametrize("failure_rate", [1e-1, 1e-4, 1e-9])
@pytest.mark.parametrize("num_samples", [20, 100, 1000])
def test_threshold_is_that_of_student_t(failure_rate, num_samples):
    expected = student(num_samples - 1).isf(failure_rate / 2 / 30)
    actual = stats.z_threshold(failure_rate, 30, num_samples)
    assert actual == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, math.nan])
def test_threshold_rejects_bad_rates(rate):
    with pytest.raises(ValueError, match="failure_rate must lie between 0 and 1"):
        stats.z_threshold(rate)


def test_false_alarms_are_as_rare_as_promised():
    alarms = 0
    for _ in range(400):
        x = torch.randn(30, 25, dtype=torch.double)
        test = stats.one_sample_test(x, torch.zeros(25))
        alarms += test.max_abs_z > test.threshold(0.1)
    assert 18 <= alarms <= 62  # 40 expected, 3.7 standard deviations


def test_detectable_bias_is_detected_as_often_as_promised():
    found = 0
    for _ in range(400):
        x = torch.randn(200, 1, dtype=torch.double)
        test = stats.one_sample_test(x, torch.zeros(1))
        threshold = test.threshold(1e-3)
        shifted = stats.one_sample_test(
            x + (threshold + 1.645) / math.sqrt(200), torch.zeros(1)
        )
        found += shifted.max_abs_z > threshold
        assert test.detectable_bias(threshold).item() == pytest.approx(
            (threshold + 1.645) / math.sqrt(200), rel=0.3
        )
    assert 0.91 < found / 400 < 0.985


def test_paired_test_sees_what_an_independent_one_cannot():
    noise = torch.randn(100, 2, dtype=torch.double)
    a, b = noise, noise + 0.01 + 1e-3 * torch.randn(100, 2, dtype=torch.double)
    assert stats.paired_test(a, b).max_abs_z > 50
    assert stats.independent_test(a, b).max_abs_z < 1
    # Welch: the standard errors add in quadrature.
    test = stats.independent_test(a, 3 * b[:50])
    expected = (a.var(0) / 100 + 9 * b[:50].var(0) / 50).sqrt()
    torch.testing.assert_close(test.standard_error, expected)
    assert test.num_samples == 50


def test_coordinates_without_variance():
    samples = torch.tensor([[1.0, 2.0]] * 5)
    exact = stats.one_sample_test(samples, torch.tensor([1.0, 2.0 + 1e-6]))
    assert exact.z.tolist() == [0.0, 0.0]
    wrong = stats.one_sample_test(samples, torch.tensor([1.0, 2.01]))
    assert wrong.z.tolist() == [0.0, -math.inf]
    assert wrong.max_abs_z == math.inf


def test_rounding_is_not_bias():
    # The same constant, computed in float32 with a systematic error in the last place.
    a = torch.full((50, 3), 0.3) + 1e-8 * torch.randn(50, 3)
    b = torch.full((50, 3), 0.3 * (1 + 1e-7))
    assert stats.paired_test(a, b).max_abs_z == 0.0
    assert stats.paired_test(a.double(), b.double()).max_abs_z > 0.0


@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((5, 2), (4, 2))])
def test_shapes_must_agree(shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="paired samples have shapes"):
        stats.paired_test(a, b)
    with pytest.raises(ValueError, match="expected has shape"):
        stats.one_sample_test(a, torch.zeros(4))
    if a.shape[1:] != b.shape[1:]:
        with pytest.raises(ValueError, match="draws have shapes"):
            stats.independent_test(a, b)


def test_empty_and_scalar_coordinates():
    assert stats.one_sample_test(torch.randn(5, 0), torch.zeros(0)).max_abs_z == 0.0
    test = stats.one_sample_test(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0))
    assert test.max_abs_z == 0.0 and test.z.shape == ()


def test_nan_is_not_hidden():
    samples = torch.tensor([[1.0, math.nan], [2.0, 1.0]])
    assert math.isnan(stats.one_sample_test(samples, torch.zeros(2)).max_abs_z)


def test_ratio_of_means_has_the_right_error():
    ratios = []
    for _ in range(300):
        b = 2 + torch.rand(40, dtype=torch.double)
        a = 3 * b + torch.randn(40, dtype=torch.double)
        ratios.append(stats.ratio_of_means(a, b))
    values, errors = torch.tensor(ratios).T
    assert values.mean().item() == pytest.approx(3, abs=0.02)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.2)


def test_ratio_of_means_at_zero():
    zero, one = torch.zeros(4), torch.ones(4)
    assert stats.ratio_of_means(zero, zero) == (1.0, 0.0)
    assert stats.ratio_of_means(one, zero)[0] == math.inf
    assert stats.ratio_of_means(zero, one) == (0.0, 0.0)


def test_median_error_is_that_of_repetition():
    pairs = [stats.median_and_error(torch.randn(101)) for _ in range(300)]
    medians, errors = torch.tensor(pairs).T
    assert errors.mean().item() == pytest.approx(medians.std().item(), rel=0.25)
    assert stats.median_and_error(torch.tensor([3.0])) == (3.0, 0.0)


def test_tail_share():
    normal = torch.randn(100_000, dtype=torch.double).square()
    assert stats.tail_share(normal) == pytest.approx(0.084, abs=0.004)
    assert stats.tail_share(torch.zeros(200)) == 0.0
    assert math.isnan(stats.tail_share(torch.ones(99)))


def test_bootstrap_spread_is_that_of_repetition():
    ratios, spreads = [], []
    for _ in range(60):
        a, b = 2 * torch.randn(150, 3), torch.randn(100, 3)
        ratios.append(stats.total_variance(a) / stats.total_variance(b))
        spreads.append(stats.bootstrap_variance_ratio(a, b, 200).std().item())
    assert sum(ratios) / 60 == pytest.approx(4, rel=0.1)
    assert sum(spreads) / 60 == pytest.approx(torch.tensor(ratios).std().item(), rel=0.35)


def test_bootstrap_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first = stats.bootstrap_variance_ratio(torch.arange(5.0), torch.arange(4.0), 10)
    again = stats.bootstrap_variance_ratio(torch.arange(5.0), torch.arange(4.0), 10)
    assert torch.equal(first, again)
    stats.random_projections(torch.arange(6.0).reshape(3, 2), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_random_projections_keep_length_one():
    eye = torch.eye(6)
    directions = stats.random_projections(eye, 4)
    assert directions.shape == (6, 4)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(4, dtype=torch.double))
    assert torch.equal(directions, stats.random_projections(eye, 4))
    assert not torch.equal(directions, stats.random_projections(eye, 4, seed=1))
