# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What holds draw by draw, in float64."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO

from pyro_rb.infer import DReG_ELBO, STLTrace_ELBO
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate
from tests.support.guides import AUTOGUIDES, GUIDES
from tests.support.models import (
    conj,
    learned_model,
    lognormal_model,
    multivariate,
    two,
    two_model,
)

pytestmark = pytest.mark.slow

# Without score functions, and RenyiELBO is right: all plates hold model and guide sites.
RENYI_IS_RIGHT = (
    "mean_field",
    "learned_model",
    "shared_parameter",
    "no_latents",
    "hierarchical",
    "multivariate",
    "mix",
    "gamma",
    "amortized",
    "AutoNormal",
    "AutoNormalMessenger",
    "AutoHierarchicalNormalMessenger",
)
NO_SCORE_FUNCTION = RENYI_IS_RIGHT + (
    "subsample_scale_mask",
    "sequential_plate",
    "dropout",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoIAFNormal",
    "AutoNormalizingFlow_planar",
    "AutoGuideList",
    "AutoDelta",
    "AutoStructured",
    "AutoGaussian_dense",
)
# Guessing the nesting of plates would use random numbers.
PARTICLES = {
    "looped": {"num_particles": 3, "vectorize_particles": False},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=PARTICLES)
def particles(request):
    return PARTICLES[request.param]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", NO_SCORE_FUNCTION)
def test_one_particle_is_stl(name, scale, entrance):
    case = GUIDES[name]()
    for vectorize in (False, True):
        elbo = DReG_ELBO(1, 1, vectorize_particles=vectorize, control_variate_scale=scale)
        expected = evaluate(STLTrace_ELBO(control_variate_scale=scale), case, entrance, seed=0)
        assert_same(evaluate(elbo, case, entrance, seed=0), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", RENYI_IS_RIGHT)
def test_scale_0_is_renyi(name, particles):
    case = GUIDES[name]()
    expected = evaluate(RenyiELBO(**particles), case, seed=0)
    for entrance in ENTRANCES:
        elbo = DReG_ELBO(**particles, control_variate_scale=0.0)
        assert_same(evaluate(elbo, case, entrance, seed=0), expected)


@pytest.mark.parametrize("name", RENYI_IS_RIGHT)
def test_same_bound_as_renyi(name, particles):
    case = GUIDES[name]()
    renyi, dreg = RenyiELBO(**particles), DReG_ELBO(**particles)
    expected = evaluate(renyi, case, seed=0)[0]
    for entrance in ENTRANCES:
        assert evaluate(dreg, case, entrance, seed=0)[0] == pytest.approx(expected, rel=1e-6)
    pyro.set_rng_seed(0)
    assert dreg.loss(case.model, case.guide, *case.args) == pytest.approx(expected, rel=1e-6)


def test_model_parameters_have_the_gradient_of_renyi(particles):
    case = learned_model()
    _, expected = evaluate(RenyiELBO(**particles), case, seed=0)
    _, actual = evaluate(DReG_ELBO(**particles), case, seed=0)
    for name in ("prior", "noise"):
        assert_same(actual[name], expected[name])
    assert not torch.allclose(actual["loc"], expected["loc"])


@pytest.mark.parametrize("scale", [1.0, 0.3, "adaptive"])
@pytest.mark.parametrize("name", [name for name in NO_SCORE_FUNCTION if name in AUTOGUIDES])
def test_entrances_agree(name, scale, particles):
    case = GUIDES[name]()
    first, second = (DReG_ELBO(**particles, control_variate_scale=scale) for _ in range(2))
    for seed in range(6 if scale == "adaptive" else 2):
        expected = evaluate(first, case, "loss_and_grads", seed)
        actual = evaluate(second, case, "differentiable_loss", seed)
        assert_same(actual, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["hierarchical", "mix", "multivariate", "AutoNormal"])
def test_gradient_is_linear_in_the_scale(name, particles):
    case = GUIDES[name]()
    at_0, at_1, between, beyond = (
        evaluate(DReG_ELBO(**particles, control_variate_scale=c), case, seed=0)[1]
        for c in (0.0, 1.0, 0.3, -2.0)
    )
    for p in at_0:
        assert_same(between[p], 0.7 * at_0[p] + 0.3 * at_1[p], rtol=1e-6, atol=1e-8)
        assert_same(beyond[p], 3.0 * at_0[p] - 2.0 * at_1[p], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_gradient_by_hand(entrance, particles):
    """Equation 6 of the paper on q(z1) q(z2 | z1), with derivatives worked out by hand."""
    case, traces = two(), []

    class Recorded(DReG_ELBO):
        def _get_traces(self, *args, **kwargs):
            traces.extend(super()._get_traces(*args, **kwargs))
            return traces

    _, actual = evaluate(Recorded(**particles), case, entrance, seed=0)
    m1, s1, a, b, s2 = (pyro.param(name).detach() for name in ("m1", "s1", "a", "b", "s2"))
    z1, z2 = (
        torch.stack([q.nodes[name]["value"].detach() for _, q in traces]).reshape(3)
        for name in ("z1", "z2")
    )
    log_w = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(z1, 0.7).log_prob(z2)
    log_w = log_w + dist.Normal(z2, 0.5).log_prob(torch.tensor(1.3))
    log_w = log_w - dist.Normal(m1, s1).log_prob(z1) - dist.Normal(a + b * z1, s2).log_prob(z2)
    residual = (z2 - a - b * z1) / s2**2  # -d log q(z2 | z1) / dz2
    d1 = -z1 + (z2 - z1) / 0.49 + (z1 - m1) / s1**2 - b * residual
    d2 = -(z2 - z1) / 0.49 + (1.3 - z2) / 0.25 + residual
    total1 = d1 + b * d2  # z2 = a + b z1 + s2 e2 moves with z1
    e1, e2 = (z1 - m1) / s1, residual * s2
    w2 = log_w.softmax(0) ** 2
    expected = {"m1": total1, "s1": total1 * e1 * s1, "a": d2, "b": d2 * z1, "s2": d2 * e2 * s2}
    for name, terms in expected.items():
        assert_same(actual[name], -(w2 * terms).sum())


@pytest.mark.parametrize("scale", [1.0, "adaptive"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: conj(shift=0.0, width=1.0),
        lambda: two(exact=True),
        lambda: multivariate(exact=True),
    ],
    ids=["mean_field", "hierarchical", "full_rank"],
)
def test_zero_at_the_optimum(make, scale, particles):
    case, elbo = make(), DReG_ELBO(**particles, control_variate_scale=scale)
    for seed in range(60 if scale == "adaptive" else 5):
        _, gradient = evaluate(elbo, case, seed=seed)
    assert all(g.abs().max() < 1e-12 for g in gradient.values())
    _, noisy = evaluate(RenyiELBO(**particles), case, seed=0)
    assert any(g.abs().max() > 0.01 for g in noisy.values())


@pytest.mark.parametrize("name", ["AutoStructured", "AutoDelta"])
def test_nothing_to_tap_changes_nothing(name, particles):
    case, elbo = GUIDES[name](), DReG_ELBO(**particles)
    expected = evaluate(DReG_ELBO(**particles, control_variate_scale=0.0), case, seed=0)
    for entrance in ENTRANCES:
        assert_same(evaluate(elbo, case, entrance, seed=0), expected)
    assert {row.treatment for row in elbo.report()} == {"as RenyiELBO"}


def test_particles_of_a_loop_are_those_of_a_plate():
    """The same draws, once as three runs and once as one: the same loss and gradient."""
    noise = torch.randn(3, 2)
    case, results = two(), []

    class Fixed(dist.Normal):
        index = 0

        def rsample(self, sample_shape=torch.Size()):
            eps = noise[:, Fixed.index % 2] if vectorize else noise[Fixed.index // 2, Fixed.index % 2]
            Fixed.index += 1
            return self.loc + self.scale * eps

    def guide():
        m1, s1, a, b, s2 = (pyro.param(name) for name in ("m1", "s1", "a", "b", "s2"))
        z1 = pyro.sample("z1", Fixed(m1, s1))
        pyro.sample("z2", Fixed(a + b * z1, s2))

    case.guide = guide
    for vectorize in (False, True):
        Fixed.index = 0
        elbo = DReG_ELBO(3, 0, vectorize_particles=vectorize, control_variate_scale=0.4)
        results.append(evaluate(elbo, case))
    assert_same(*results)


def test_lognormal_coordinate_does_not_matter(particles):
    """Zero at the optimum through a constrained latent, too."""
    x = torch.tensor([0.5, -1.2])

    def guide(x):
        loc, scale = pyro.param("loc", 0.8 * x), pyro.param("scale", torch.tensor(0.2**0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("tau", dist.LogNormal(loc, scale))

    guide(x)
    with poutine.trace(param_only=True) as capture:
        DReG_ELBO(**particles).loss_and_grads(lognormal_model, guide, x)
    for site in capture.trace.nodes.values():
        assert site["value"].unconstrained().grad.abs().max() < 1e-12


def test_two_model_is_what_it_was():
    """``two_model`` has no plate: the particle plate is the only one."""
    elbo = DReG_ELBO(4, vectorize_particles=True)
    elbo.loss(two_model, two().guide)
    assert elbo.max_plate_nesting == 1
