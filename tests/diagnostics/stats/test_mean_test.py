# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from scipy.stats import t as student

from pyro_rb.diagnostics.stats.mean_test import z_threshold
from tests.support.common import compare_means


def one_sample_test(samples, expected):
    return compare_means({"x": samples}, {"x": expected}).test


def paired_test(a, b):
    return compare_means({"x": a}, paired={"x": b}).test


def independent_test(a, b):
    return compare_means({"x": a}, independent={"x": b}).test


@pytest.mark.parametrize("failure_rate", [1e-1, 1e-4, 1e-9])
@pytest.mark.parametrize("num_samples", [20, 100, 1000])
def test_threshold_is_that_of_student_t(failure_rate, num_samples):
    expected = student(num_samples - 1).isf(failure_rate / 2 / 30)
    actual = z_threshold(failure_rate, 30, num_samples)
    assert actual == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, math.nan])
def test_threshold_rejects_bad_rates(rate):
    with pytest.raises(ValueError, match="failure_rate must lie between 0 and 1"):
        z_threshold(rate)


def test_false_alarms_are_as_rare_as_promised():
    alarms = 0
    for _ in range(400):
        x = torch.randn(30, 25, dtype=torch.double)
        test = one_sample_test(x, torch.zeros(25))
        alarms += test.max_abs_z > test.threshold(0.1)
    assert 18 <= alarms <= 62  # 40 expected, 3.7 standard deviations


def test_detectable_bias_is_detected_as_often_as_promised():
    found = 0
    for _ in range(400):
        x = torch.randn(200, 1, dtype=torch.double)
        test = one_sample_test(x, torch.zeros(1))
        threshold = test.threshold(1e-3)
        shifted = one_sample_test(
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
    assert paired_test(a, b).max_abs_z > 50
    assert independent_test(a, b).max_abs_z < 1
    # Welch: the standard errors add in quadrature.
    test = independent_test(a, 3 * b[:50])
    expected = (a.var(0) / 100 + 9 * b[:50].var(0) / 50).sqrt()
    torch.testing.assert_close(test.standard_error, expected)
    assert test.num_samples == 50


def test_coordinates_without_variance():
    samples = torch.tensor([[1.0, 2.0]] * 5)
    exact = one_sample_test(samples, torch.tensor([1.0, 2.0 + 1e-6]))
    assert exact.z.tolist() == [0.0, 0.0]
    wrong = one_sample_test(samples, torch.tensor([1.0, 2.01]))
    assert wrong.z.tolist() == [0.0, -math.inf]
    assert wrong.max_abs_z == math.inf


def test_rounding_is_not_bias():
    # The same constant, computed in float32 with a systematic error in the last place.
    a = torch.full((50, 3), 0.3) + 1e-8 * torch.randn(50, 3)
    b = torch.full((50, 3), 0.3 * (1 + 1e-7))
    assert paired_test(a, b).max_abs_z == 0.0
    assert paired_test(a.double(), b.double()).max_abs_z > 0.0


@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((5, 2), (4, 2))])
def test_shapes_must_agree(shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="x: the reference has shape"):
        paired_test(a, b)
    with pytest.raises(ValueError, match="x: the reference has shape"):
        one_sample_test(a, torch.zeros(4))
    if a.shape[1:] != b.shape[1:]:
        with pytest.raises(ValueError, match="x: the reference has shape"):
            independent_test(a, b)


def test_empty_and_scalar_coordinates():
    assert one_sample_test(torch.randn(5, 0), torch.zeros(0)).max_abs_z == 0.0
    test = one_sample_test(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0))
    assert test.max_abs_z == 0.0 and test.z.shape == (1,)


def test_nan_is_not_hidden():
    samples = torch.tensor([[1.0, math.nan], [2.0, 1.0]])
    assert math.isnan(one_sample_test(samples, torch.zeros(2)).max_abs_z)
