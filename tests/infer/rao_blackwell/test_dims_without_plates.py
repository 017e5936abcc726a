# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models that have dims which no plate names, with validation off, as some packages run them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO
from tests.support.cases import Case
from tests.support.elbo_contract import evaluate

ALL = [RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO, R2G2_ELBO]


@pytest.fixture(autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


def regression(with_switch):
    """Means of shape [N] for observations of shape [N, 1]: all pairs are compared."""

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Bernoulli(0.5)) if with_switch else 0.0
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("x", dist.Normal(w * torch.arange(4.0) + s, 1.0), obs=torch.arange(4.0).unsqueeze(-1))

    def guide():
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))
        if with_switch:
            pyro.sample("s", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    return Case(model, guide)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_nothing_has_weights(cls, num_steps):
    """The loss is that of Trace_ELBO, at the first step and later on; a divergence may be analytic."""
    case, elbo = regression(False), cls(max_plate_nesting=2)
    for _ in range(num_steps):
        pyro.set_rng_seed(3)
        actual = evaluate(elbo, case)
    pyro.set_rng_seed(3)
    expected = Trace_ELBO().loss(case.model, case.guide)
    tolerance = 1e-5 if cls in (STLTrace_ELBO, RaoBlackwellTopK_ELBO) else 0.1
    assert float(actual[0]) == pytest.approx(expected, rel=tolerance)
    assert [row.site for row in elbo.report()] == ["w"] and elbo.report()[0].reason


@pytest.mark.parametrize("cls", [RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO])
def test_some_site_has_several_values(cls):
    case = regression(True)
    for loss in (STLTrace_ELBO(), R2G2_ELBO(), Trace_ELBO()):  # what the message recommends
        loss.loss_and_grads(case.model, case.guide)
    message = r"Found log densities of shape \((\d, )*4, 4\) at site 'x'.*dims \[-2\].*\.to_event\(\).* STLTrace_ELBO"
    with pytest.raises(ValueError, match=message):
        cls(max_plate_nesting=2).loss_and_grads(case.model, case.guide)
    with pytest.raises(ValueError, match="Error while packing tensors at site 'x'"):
        TraceEnum_ELBO(max_plate_nesting=2).loss_and_grads(case.model, case.guide)


@pytest.mark.parametrize("cls", [RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO])
def test_the_same_shapes(cls):
    """The first remedy."""

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Bernoulli(0.5))
        with pyro.plate("data", 4, dim=-2):
            loc = (w * torch.arange(4.0)).unsqueeze(-1) + s
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.arange(4.0).unsqueeze(-1))

    cls(max_plate_nesting=2).loss_and_grads(model, regression(True).guide)
