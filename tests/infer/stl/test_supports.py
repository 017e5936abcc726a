# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Exact gradients for guides of many families: where the score has mean zero, and where it has not."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_rb import DReG_ELBO, STLTrace_ELBO
from tests.support.common import assert_unbiased

NUM = 20_000  # replicates of the parameters, and so of the gradient, in one call
TARGET = 3.0, 2.0


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def draw_gradients(make, elbo):
    """``[NUM, 2]``: one gradient by p and q a replicate."""
    p, q = (torch.full((NUM,), value, requires_grad=True) for value in (1.5, 0.8))

    def sample(fn):
        with pyro.plate("replicates", NUM):
            pyro.sample("z", fn)

    def model():
        # A wider support than the guide's, so that no draw meets an end.
        sample(dist.Normal(*TARGET))

    loss = elbo.differentiable_loss(model, lambda: sample(make(p, q)))
    return torch.stack(torch.autograd.grad(loss, (p, q)), dim=-1)


def exact_gradient(make):
    """In closed form, or by quadrature over the quantiles, in logarithmic steps to both ends."""
    p, q = (torch.tensor(value, requires_grad=True) for value in (1.5, 0.8))
    fn = make(p, q)
    fn = getattr(fn, "component1", fn)
    try:
        square = fn.variance + (fn.mean - TARGET[0]).square()
        loss = square / (2 * TARGET[1] ** 2) - fn.entropy()
    except NotImplementedError:
        t = torch.linspace(-30.0, 30.0, 20_001)
        u = t.sigmoid()
        z = fn.icdf(u)
        log_ratio = fn.log_prob(z) - dist.Normal(*TARGET).log_prob(z)
        loss = (log_ratio * u * (1 - u)).sum() * (t[1] - t[0])
    return torch.stack(torch.autograd.grad(loss, (p, q)))


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


def affine(loc, scale):
    return T.AffineTransform(loc, scale)


TAPPED = {
    "beta": lambda p, q: dist.Beta(p, q),
    "gamma": lambda p, q: dist.Gamma(p / 4, q),
    "gumbel": lambda p, q: dist.Gumbel(p, q),
    "kumaraswamy": lambda p, q: dist.Kumaraswamy(p, q),
    "laplace": lambda p, q: dist.Laplace(p, q),
    "log normal": lambda p, q: dist.LogNormal(p / 5, q / 2),
    "logit normal": lambda p, q: transformed(dist.Normal(p, q), T.SigmoidTransform()),
    "logit normal, moved": lambda p, q: transformed(dist.Normal(0.0, 1.0), T.SigmoidTransform(), affine(p, q)),
    "normal": lambda p, q: dist.Normal(p, q),
    "scaled exponential": lambda p, q: transformed(dist.Exponential(p), affine(0.0, q)),
    "scaled half normal": lambda p, q: transformed(dist.HalfNormal(p), affine(1.0, q)),
    "softplus of logistic": lambda p, q: transformed(dist.Logistic(0.0, 1.0), affine(p, q), T.SoftplusTransform()),
    "weibull": lambda p, q: dist.Weibull(p, 2 * q),
}
NOT_TAPPED = {
    "exp of laplace, shifted": lambda p, q: transformed(dist.Laplace(0.0, q / 8), T.ExpTransform(), affine(p, 1.0)),
    "half normal, shifted": lambda p, q: transformed(dist.HalfNormal(q), affine(p, 1.0)),
    "logistic, stretched": lambda p, q: transformed(dist.Logistic(0.0, 1.0), T.SigmoidTransform(), affine(q, p)),
    "masked mixture": lambda p, q: dist.MaskedMixture(torch.tensor(True), dist.Normal(p, q), dist.Uniform(-q, p)),
    "pareto": lambda p, q: dist.Pareto(q, 4 * p),
    "power of an interval": lambda p, q: transformed(dist.Uniform(1.0, 2.0), T.PowerTransform(p), affine(0.0, q)),
    "uniform": lambda p, q: dist.Uniform(-q, p),
}


@pytest.mark.parametrize("name", [*TAPPED, *NOT_TAPPED])
def test_exact_gradient(name):
    make = TAPPED.get(name) or NOT_TAPPED[name]
    elbo = STLTrace_ELBO(control_variate_scale=1.0)
    with pyro.validation_enabled(False):  # a MaskedMixture of both supports has none
        samples = draw_gradients(make, elbo)
    assert ("path" in elbo.report()[0].treatment) is (name in TAPPED)
    assert_unbiased(samples, exact_gradient(make), detect=0.3)


@pytest.mark.parametrize("name", NOT_TAPPED)
@pytest.mark.parametrize("make_elbo", [STLTrace_ELBO, DReG_ELBO])
def test_untapped_as_in_pyro(name, make_elbo):
    plain = make_elbo(num_particles=1, control_variate_scale=0.0)
    elbo = make_elbo(num_particles=1, control_variate_scale=1.0)
    with pyro.validation_enabled(False):
        pyro.set_rng_seed(1)
        expected = draw_gradients(NOT_TAPPED[name], plain)
        pyro.set_rng_seed(1)
        actual = draw_gradients(NOT_TAPPED[name], elbo)
    assert torch.equal(actual, expected)


VECTORS = {
    "permute": lambda: T.Permute(torch.tensor([2, 0, 1])),
    "reshape": lambda: T.ReshapeTransform((3,), (3, 1)),
    "linear": lambda: T.LowerCholeskyAffine(torch.zeros(3), torch.eye(3)),
    "ordered": lambda: T.OrderedTransform(),
    "to the line": lambda: T.ComposeTransform([T.ExpTransform().inv, T.spline(3)]),
    "unknown": lambda: Negative(torch.zeros(3), -1.0, event_dim=1),
}


class Negative(T.AffineTransform):
    pass


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("base", [dist.Gamma, dist.Beta])
def test_transforms_of_vectors(base, name):
    # Nothing is tried on an end of the support, which is a scalar.
    transform = VECTORS[name]()

    def guide():
        a, b = (pyro.param(key, torch.full((3,), 2.0)) for key in "ab")
        pyro.sample("z", transformed(base(a, b).to_event(1), transform))

    def model():
        shape = (3, 1) if name == "reshape" else (3,)
        pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    for elbo in (Trace_ELBO(), STLTrace_ELBO(control_variate_scale=1.0)):
        assert elbo.loss_and_grads(model, guide) < torch.inf
    is_tapped = "path" in elbo.report()[0].treatment
    assert is_tapped is (name != "unknown" and not (base is dist.Beta and name == "to the line"))


def test_each_step_is_looked_at_anew():
    b = torch.ones(3, requires_grad=True)
    flow = T.batchnorm(3)
    normal, half = dist.Normal(b, 1.0), dist.HalfNormal(b)
    tapped = {
        "normal": lambda: normal,
        "flow": lambda: transformed(normal, flow.eval()),
        "frozen": lambda: transformed(half, affine(b.detach(), 1.0)),
    }
    untapped = {
        "training": lambda: transformed(normal, flow.train()),
        "shifted": lambda: transformed(half, affine(b, 1.0)),
        "mixture": lambda: dist.MaskedMixture(torch.tensor(True), normal, dist.Uniform(-b, b)),
    }
    makes = {**tapped, **untapped}
    elbo = STLTrace_ELBO(control_variate_scale=1.0)

    def sample(fn):
        with pyro.plate("rows", 5):
            pyro.sample("z", fn.expand([5, 3]).to_event(1))

    for name in [*makes, *reversed(makes)]:
        with pyro.validation_enabled(False):
            elbo.differentiable_loss(lambda: sample(dist.Normal(0.0, 1.0)), lambda: sample(makes[name]()))
        assert ("path" in elbo.report()[0].treatment) is (name in tapped), name
