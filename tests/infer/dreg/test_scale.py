# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Guide sites whose log density has a factor in the log weight. Bounds by quadrature are in
``test_exact.py``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_rb.infer import DReG_ELBO
from pyro_rb.poutine.densities import find_density_scale
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate
from tests.support.iwae import BOUNDS, Bound

PARTICLES = {
    "looped": {"num_particles": 3},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=PARTICLES)
def particles(request):
    return PARTICLES[request.param]


@pytest.mark.parametrize("c", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_gradient_by_hand(entrance, c, particles):
    """On q(z1) q(z2 | z1) with scales 0.4 and 2.5, with derivatives worked out by hand."""
    case, traces = BOUNDS["tempered"]().case, []

    class Recorded(DReG_ELBO):
        def _get_traces(self, *args, **kwargs):
            traces.extend(super()._get_traces(*args, **kwargs))
            return traces

    elbo = Recorded(**particles, control_variate_scale=c)
    _, actual = evaluate(elbo, case, entrance, seed=0)
    m1, s1, a, b, s2 = (pyro.param(name).detach() for name in ("m1", "s1", "a", "b", "s2"))
    z1, z2 = (
        torch.stack([q.nodes[name]["value"].detach() for _, q in traces]).reshape(3)
        for name in ("z1", "z2")
    )
    q1, q2 = dist.Normal(m1, s1).log_prob(z1), dist.Normal(a + b * z1, s2).log_prob(z2)
    log_w = 0.7 * dist.Normal(0.0, 1.0).log_prob(z1) + 1.2 * dist.Normal(z1, 0.7).log_prob(z2)
    log_w = log_w + dist.Normal(z2, 0.5).log_prob(torch.tensor(1.3)) - 0.4 * q1 - 2.5 * q2
    r1, r2 = (z1 - m1) / s1**2, (z2 - a - b * z1) / s2**2  # d log q / d loc
    d1 = -0.7 * z1 + 1.2 * (z2 - z1) / 0.49 + 0.4 * r1 - 2.5 * b * r2
    d2 = -1.2 * (z2 - z1) / 0.49 + (1.3 - z2) / 0.25 + 2.5 * r2
    w = log_w.softmax(0)
    path1 = w * (1 - c * 0.4 * (1 - w)) * (d1 + b * d2)  # z2 moves with z1
    path2 = w * (1 - c * 2.5 * (1 - w)) * d2
    score1, score2 = (1 - c) * w * 0.4, (1 - c) * w * 2.5
    e1, e2 = r1 * s1, r2 * s2
    expected = {
        "m1": path1 - score1 * r1,
        "s1": path1 * e1 * s1 - score1 * (e1**2 - 1),
        "a": path2 - score2 * r2,
        "b": path2 * z1 - score2 * r2 * z1,
        "s2": path2 * e2 * s2 - score2 * (e2**2 - 1),
    }
    for name, terms in expected.items():
        assert_same(actual[name], -terms.sum())


def test_scale_0_is_renyi(particles):
    for name in ("tempered", "tempered_elements"):
        case = BOUNDS[name]().case
        expected = evaluate(RenyiELBO(**particles), case, seed=0)
        for entrance in ENTRANCES:
            elbo = DReG_ELBO(**particles, control_variate_scale=0.0)
            assert_same(evaluate(elbo, case, entrance, seed=0), expected)


@pytest.mark.parametrize("name", ["tempered", "tempered_elements", "subsampled_locals"])
def test_entrances_agree(name, particles):
    case = BOUNDS[name]().case
    for c in (1.0, 0.3, "adaptive"):
        first, second = (DReG_ELBO(**particles, control_variate_scale=c) for _ in range(2))
        for seed in range(6):
            expected = evaluate(first, case, "loss_and_grads", seed)
            actual = evaluate(second, case, "differentiable_loss", seed)
            assert_same(actual, expected, rtol=1e-7, atol=1e-8)


def regression():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
    noise = pyro.sample("noise", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=torch.tensor([0.5, -1.2]))


def tempered(f, scale):
    return poutine.scale(f, scale)


def autoguide(make, scale):
    guide = make(regression, init_scale=0.5)
    guide()
    return tempered(regression, scale), tempered(guide, scale)


def masked_within_an_event():
    mask = torch.tensor([True, False, True])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.7), obs=torch.tensor(1.0))

    def guide():
        fn = dist.Normal(real("loc", 0.3, 0.4, 0.5), positive("scale", 0.6, 0.7, 0.8))
        pyro.sample("z", fn.mask(mask).to_event(1))

    return model, guide


def masked_out():
    """Only the path through the other site has a score."""

    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(u, 1.0))
        pyro.sample("x", dist.Normal(z, 0.6), obs=torch.tensor(1.0))

    def guide():
        with poutine.mask(mask=False):
            u = pyro.sample("u", dist.Normal(real("u_loc", 0.3), positive("u_scale", 0.6)))
        pyro.sample("z", dist.Normal(0.5 * u + real("z_loc", 0.3), positive("z_scale", 0.6)))

    return model, guide


def chain():
    """Draws of draws, with one parameter in all of them, and plates with scales inside."""
    x, scales = torch.linspace(-1.0, 2.0, 6).reshape(3, 2), torch.tensor([2.0, 0.5])

    def sites(draw, data):
        rows, columns = pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-2)
        with poutine.scale(scale=0.3):
            z = draw("z0", torch.zeros(()))
        with rows, poutine.scale(scale=scales):
            z = draw("z1", z)
        with rows, columns, poutine.scale(scale=1.5):
            z = draw("z2", z)
            data(z)

    def model():
        sites(
            lambda name, loc: pyro.sample(name, dist.Normal(loc, 1.0)),
            lambda z: pyro.sample("x", dist.Normal(z, 0.7), obs=x),
        )

    def guide():
        def draw(name, loc):
            loc = real(f"{name}_loc", 0.2) + real("slope", 0.6) * loc
            return pyro.sample(name, dist.Normal(loc, positive("scale", 0.7)))

        sites(draw, lambda z: None)

    return model, guide


def factor_in_the_guide():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("more", -0.3 * z**2)
        pyro.sample("x", dist.Normal(z, 0.6), obs=torch.tensor(1.0))

    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.3), positive("scale", 0.7)))
        pyro.factor("less", 0.1 * z * real("tilt", 0.5), has_rsample=True)

    return tempered(model, 0.4), tempered(guide, 0.4)


def gamma_and_beta():
    def model():
        with poutine.scale(scale=1.4):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 2.0))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 2.0))
        pyro.sample("x", dist.Normal(rate * share, 0.4), obs=torch.tensor(0.8))

    def guide():
        with poutine.scale(scale=1.4):
            rate = pyro.sample("rate", dist.Gamma(positive("a", 4.0), positive("b", 3.0)))
        pyro.sample("share", dist.Beta(positive("c", 3.0) + 0.3 * rate, positive("d", 2.5)))

    return model, guide


MODELS = {
    "AutoNormal_below": lambda: autoguide(AutoNormal, 0.3),
    "AutoNormal_above": lambda: autoguide(AutoNormal, 2.0),
    "AutoMultivariateNormal_below": lambda: autoguide(AutoMultivariateNormal, 0.3),
    "AutoHierarchicalNormalMessenger_above": lambda: autoguide(AutoHierarchicalNormalMessenger, 2.0),
    "masked_within_an_event": masked_within_an_event,
    "masked_out": masked_out,
    "chain": chain,
    "factor_in_the_guide": factor_in_the_guide,
    "gamma_and_beta": gamma_and_beta,
}


@pytest.mark.parametrize("name", MODELS)
def test_unbiased(name):
    """Draw by draw against plain differentiation of the bound."""
    bound = Bound(Case(*MODELS[name]()), lambda k: None, nesting=2)
    draws = []
    for c in (1.0, 0.0):
        elbo = DReG_ELBO(4, 3, vectorize_particles=True, control_variate_scale=c)
        pyro.set_rng_seed(0)
        draws.append(bound.draw_gradients(elbo, 40, 1000 if name == "gamma_and_beta" else 200))
    assert_unbiased(draws[0], paired=draws[1], detect=0.5)


def test_scale_that_is_learned_is_as_renyi(particles):
    """What multiplies the log density is no constant: there is no score to be replaced."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.0))

    def guide(grad=True):
        z1 = pyro.sample("z1", dist.Normal(real("m1", 0.3), 0.8))
        scale = positive("power", 0.7)
        with poutine.scale(scale=scale if grad else scale.detach()):
            pyro.sample("z2", dist.Normal(real("m2", 0.2) + 0.5 * z1, 0.6))

    case = Case(model, guide)
    renyi = evaluate(RenyiELBO(**particles), case, seed=0)
    for entrance in ENTRANCES:
        elbo = DReG_ELBO(**particles)
        loss, gradient = evaluate(elbo, case, entrance, seed=0)
        assert_same(loss, renyi[0])
        for name in ("m2", "power"):
            assert_same(gradient[name], renyi[1][name])
        assert not torch.allclose(gradient["m1"], renyi[1]["m1"])
        row = elbo.report()[1]
        assert row.treatment == "as RenyiELBO" and row.reason == "its scale depends on a parameter"


def scaled(fn, scale=1.0, mask=None, plate=None):
    with poutine.trace() as tp, poutine.scale(scale=scale):
        if mask is None:
            pyro.sample("z", fn)
        else:
            with poutine.mask(mask=mask):
                pyro.sample("z", fn)
    return tp.trace.nodes["z"]


YES_NO = torch.tensor([True, False])
NORMAL = dist.Normal(torch.zeros(2), 1.0)


@pytest.mark.parametrize(
    "site, expected",
    [
        (lambda: scaled(NORMAL), 1.0),
        (lambda: scaled(NORMAL, 3), 3.0),
        (lambda: scaled(NORMAL, 0.5, mask=False), 0.0),
        (lambda: scaled(NORMAL, 0.5, mask=YES_NO), [0.5, 0.0]),
        (lambda: scaled(NORMAL, torch.tensor([2.0, 3.0])), [2.0, 3.0]),
        (lambda: scaled(NORMAL.to_event(1), 0.5), 0.5),
        (lambda: scaled(NORMAL.mask(YES_NO).to_event(1), 2.0), [2.0, 0.0]),
        (lambda: scaled(NORMAL.mask(False)), 0.0),
        (lambda: scaled(dist.Normal(torch.zeros(2, 3), 1.0).to_event(1).mask(YES_NO)), [[1.0], [0.0]]),
        (lambda: scaled(dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), mask=YES_NO), [[1.0], [0.0]]),
        (lambda: scaled(NORMAL.mask(YES_NO).expand([3, 2])), [[1.0, 0.0]] * 3),
        # Each draw's density counts as often as it is broadcast to.
        (lambda: scaled(dist.Normal(0.0, 1.0), torch.tensor([2.0, 3.0])), 5.0),
        (lambda: scaled(dist.TransformedDistribution(NORMAL.mask(YES_NO), [])), None),
        (lambda: scaled(NORMAL, torch.tensor(0.5, requires_grad=True)), None),
    ],
)
def test_density_scale(site, expected):
    with pyro.validation_enabled(False):
        found = find_density_scale(site())
    if expected is None or isinstance(expected, float) and isinstance(found, float):
        assert found == expected
    else:
        torch.testing.assert_close(found, torch.tensor(expected))
