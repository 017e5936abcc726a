# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.distributions import NegativeBinomial, Poisson

from pyro_rb.ops.countable import negative_binomial_window, poisson_window


def tail(distribution, window):
    """The mass beyond the window, summed from its own terms."""
    first = int(window.ceil()) + 1
    x = torch.arange(first, first + 200_000, dtype=torch.double)
    return distribution.log_prob(x).exp().sum()


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.5, 4.0, 100.0, 1e4])
def test_poisson_window(rate):
    rate = torch.tensor(rate, dtype=torch.double)
    window = poisson_window(rate)
    assert tail(Poisson(rate), window) < 1e-9
    assert window <= 13 * rate + 50


@pytest.mark.parametrize("total_count", [0.01, 0.1, 1.0, 20.0, 1000.0])
@pytest.mark.parametrize("probs", [0.01, 0.5, 0.9, 0.999])
def test_negative_binomial_window(total_count, probs):
    total_count, probs = (torch.tensor(x, dtype=torch.double) for x in (total_count, probs))
    distribution = NegativeBinomial(total_count, probs)
    window = negative_binomial_window(total_count, probs.log())
    assert tail(distribution, window) < 1e-9
    # Not wasteful either.
    assert window < 3 * distribution.mean + 25 * distribution.variance.sqrt() + 25 / (1 - probs)


def test_windows_keep_the_batch():
    rate = torch.rand(3, 2)
    assert poisson_window(rate).shape == negative_binomial_window(rate, rate.log()).shape == (3, 2)


def test_no_mass_has_a_finite_window():
    log_ratio = torch.tensor([-200.0, -1e-12])
    window = negative_binomial_window(torch.ones(2), log_ratio)
    assert window.isfinite().all() and window[0] < 2
