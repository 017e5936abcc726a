# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Against exact gradients where Pyro's ``Trace_ELBO`` is biased: a scale with a gradient, and discrete sites that only
the guide has.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO
from pyro_rb.diagnostics.stats.bias import BiasError
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import draw_gradients

pytestmark = pytest.mark.slow

X = torch.tensor([0.5, -0.3, 1.2], dtype=torch.double)
NUM_COPIES = 400


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def logits():
    return real("logits", *([0.5, -0.2, 0.3, 0.1], [0.2, 0.4, -0.5, 0.3], [0.0, 0.3, 0.2, -0.4]))


def likelihood(k):
    return dist.Normal(0.5 * k - 1.0, 1.0)


def learned_scale():
    """Of a discrete site, in model and guide."""

    def model():
        with pyro.plate("data", 3):
            with poutine.scale(scale=positive("beta", 0.7)):
                k = pyro.sample("k", dist.Categorical(torch.ones(4)))
            pyro.sample("x", likelihood(k), obs=X)

    def guide():
        with pyro.plate("data", 3), poutine.scale(scale=positive("beta", 0.7)):
            pyro.sample("k", dist.Categorical(logits=logits()))

    def exact():
        log_q = logits().log_softmax(-1)
        log_p = likelihood(torch.arange(4.0)).log_prob(X[:, None])
        return (log_q.exp() * (positive("beta", 0.7) * (log_q + math.log(4.0)) - log_p)).sum()

    return Case(model, guide), exact


def mixture_guide():
    """Labels that only the guide has, each with a Gaussian; the model is Gaussian, so that the rest is quadrature."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=X)

    def components():
        return real("m", -0.5, 0.1, 0.6, 1.0), positive("s", 0.6, 0.9, 0.7, 1.1)

    def guide():
        m, s = components()
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(logits=logits()), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(m[k], s[k]))

    def exact():
        m, s = components()
        log_q = logits().log_softmax(-1)
        second = m.square() + s.square()
        log_p = -0.5 * second - 0.5 * (X[:, None].square() - 2 * X[:, None] * m + second) / 0.64 - math.log(0.8)
        log_p = log_p - math.log(2 * math.pi)
        entropy = 0.5 + 0.5 * math.log(2 * math.pi) + s.log()
        return (log_q.exp() * (log_q - entropy - log_p)).sum()

    return Case(model, guide), exact


LOSSES = {
    "STLTrace_ELBO": STLTrace_ELBO,
    "path gradient": lambda **kwargs: STLTrace_ELBO(control_variate_scale=1.0, **kwargs),
    "R2G2_ELBO": R2G2_ELBO,
    "all values": RaoBlackwell_ELBO,
    "two values": lambda **kwargs: RaoBlackwell_ELBO(budget=2, **kwargs),
    "reinforce+": lambda **kwargs: RaoBlackwell_ELBO(budget=2, baseline="reinforce+", **kwargs),
    "one draw": lambda **kwargs: RaoBlackwell_ELBO(budget=1, **kwargs),
    "top-k": RaoBlackwellTopK_ELBO,
}
CASES = {"scale": learned_scale, "labels": mixture_guide}


def check(name, make_loss):
    case, exact = CASES[name]()
    case.guide()
    expected = torch.autograd.grad(exact(), list(case.parameters().values()))
    options = {"num_particles": NUM_COPIES, "vectorize_particles": True, "max_plate_nesting": 1}
    samples = draw_gradients(make_loss(**options), case, 30, seed=0)
    assert_unbiased(samples, dict(zip(case.parameters(), expected)), detect=0.3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_unbiased(name, loss):
    check(name, LOSSES[loss])


@pytest.mark.parametrize("name", CASES)
def test_trace_elbo_is_not(name):
    """And the test above would see it."""
    with pytest.raises(BiasError):
        check(name, Trace_ELBO)


def test_bits():
    """An antithetic pair of a vector."""
    probs = torch.full((7,), 0.5)

    def model():
        with poutine.scale(scale=positive("beta", 0.7)):
            k = pyro.sample("k", dist.Bernoulli(probs).to_event(1))
        pyro.sample("x", dist.Normal(k.sum(-1) - 3.0, 1.0), obs=X[0])

    def guide():
        fn = dist.Bernoulli(logits=real("logits", 0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.6)).to_event(1)
        with poutine.scale(scale=positive("beta", 0.7)):
            pyro.sample("k", fn)
        return fn

    fn = guide()
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 7)
    log_q, prior = fn.log_prob(values), 7 * math.log(0.5)
    log_p = dist.Normal(values.sum(-1) - 3.0, 1.0).log_prob(X[0])
    case = Case(model, guide)
    exact = torch.autograd.grad(
        (log_q.exp() * (positive("beta", 0.7) * (log_q - prior) - log_p)).sum(), list(case.parameters().values())
    )
    options = {"num_particles": NUM_COPIES, "vectorize_particles": True, "max_plate_nesting": 0}
    samples = draw_gradients(RaoBlackwell_ELBO(**options), case, 30, seed=0)
    assert_unbiased(samples, dict(zip(case.parameters(), exact)), detect=0.3)
