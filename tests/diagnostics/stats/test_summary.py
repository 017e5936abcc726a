# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_rb.diagnostics.stats import summary as stats
from tests.support.common import bootstrap_variance_ratio


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
        spreads.append(bootstrap_variance_ratio(a, b, 200).std().item())
    assert sum(ratios) / 60 == pytest.approx(4, rel=0.1)
    assert sum(spreads) / 60 == pytest.approx(torch.tensor(ratios).std().item(), rel=0.35)


def test_bootstrap_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first = bootstrap_variance_ratio(torch.arange(5.0), torch.arange(4.0), 10)
    again = bootstrap_variance_ratio(torch.arange(5.0), torch.arange(4.0), 10)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
