# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pytest
import torch

from pyro_rb.ops.gaussian import GaussianDraw, find_family

TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.5, 0.1, 0.6]])
FACTOR = torch.tensor([[0.3, 0.1], [0.2, -0.4], [0.0, 0.5]])
GAUSSIANS = {
    "normal": lambda: dist.Normal(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])),
    "event": lambda: dist.Normal(torch.zeros(2, 3), torch.ones(3)).to_event(1),
    "broadcast": lambda: dist.Normal(torch.zeros(3), 0.5).expand([2, 3]).to_event(2),
    "tril": lambda: dist.MultivariateNormal(torch.ones(3), scale_tril=TRIL),
    "tril_batch": lambda: dist.MultivariateNormal(torch.ones(3), scale_tril=TRIL).expand([2]),
    "covariance": lambda: dist.MultivariateNormal(torch.ones(3), TRIL @ TRIL.mT).expand([2]).to_event(1),
    "low_rank": lambda: dist.LowRankMultivariateNormal(torch.ones(3), FACTOR, torch.ones(3)),
    "low_rank_batch": lambda: dist.LowRankMultivariateNormal(torch.ones(4, 3), FACTOR, torch.ones(3)),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_draw_is_that_of_rsample(name):
    fn = GAUSSIANS[name]()
    torch.manual_seed(0)
    expected = fn.rsample()
    torch.manual_seed(0)
    draw = GaussianDraw(fn)
    torch.testing.assert_close(draw.value, expected)
    assert draw.shape == expected.shape
    torch.testing.assert_close(draw.variance, fn.variance)
    torch.testing.assert_close(draw.entropy(len(fn.batch_shape)), fn.entropy())


class Other(dist.Normal):
    def log_prob(self, value):
        return 2 * super().log_prob(value)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.0, 1.0).has_rsample_(False),
        dist.Normal(torch.zeros(2), 1.0).has_rsample_(False).to_event(1),
        dist.Normal(0.0, 1.0).mask(True),
        dist.LogNormal(0.0, 1.0),
        dist.StudentT(3.0),
        dist.Delta(torch.zeros(())),
        dist.OMTMultivariateNormal(torch.zeros(3), TRIL),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), []),
        Other(0.0, 1.0),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_others_are_not_gaussian(fn):
    assert find_family(fn) is None
