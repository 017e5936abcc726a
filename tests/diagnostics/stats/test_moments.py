# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.moments import RunningMoments, SkewedMoments


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


def test_skewness_of_a_stream_is_that_of_all_draws():
    x = torch.randn(60, 4).exp()
    x[:, 3] = 2.0  # constant
    moments = SkewedMoments()
    for row in x:
        moments.update(row)
    torch.testing.assert_close(moments.skewness, SkewedMoments.of(x).skewness)
    torch.testing.assert_close(moments.variance, x.double().var(0))
    assert moments.skewness[3] == 0 and moments.skewness[0] > 0
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        moments.merge(RunningMoments())
