# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Paired z-tests against Trace_ELBO on every guide, and the traps of the score identity."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import constraints

from pyro_rb import STLTrace_ELBO
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import assert_same, draw_gradients, evaluate
from tests.support.guides import GUIDES

pytestmark = pytest.mark.slow

VECTORIZED = {"num_particles": 500, "vectorize_particles": True}
# A path gradient with nothing to gain equals Trace_ELBO, see test_elbo.py. Pyro adds 1e-8 to determinants of block
# autoregressive flows, which shows where a gradient has no noise; see test_flows.py.
TAPPED = [
    name
    for name in GUIDES
    if name
    not in (
        "AutoDelta",
        "AutoGaussian_funsor",
        "AutoLaplaceApproximation",
        "AutoLaplaceApproximation_fitted",
        "AutoNormalizingFlow_block",
        "AutoStructured",
        "gamma_score_function",
        "no_latents",
        "normal_score_function",
    )
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("scale", [1.0, "adaptive"])
@pytest.mark.parametrize("name", TAPPED)
def test_unbiased_against_trace_elbo(name, scale):
    case = GUIDES[name]()
    options = VECTORIZED if case.vectorizable else {}
    num_samples = 25 if case.vectorizable and not case.subsamples else 75
    expected = draw_gradients(Trace_ELBO(**options), case, num_samples, seed=0)
    actual = draw_gradients(STLTrace_ELBO(control_variate_scale=scale, **options), case, num_samples, seed=0)
    assert_unbiased(actual, paired=expected, detect=0.25)


def check_equal_to_trace_elbo(case):
    # Replayed values carry a graph of their own from one call to the next.
    _, expected = evaluate(Trace_ELBO(retain_graph=True), case, seed=1)
    _, actual = evaluate(STLTrace_ELBO(control_variate_scale=1.0, retain_graph=True), case, seed=1)
    assert_same(actual, expected)
    assert any(grad.abs().max() > 0 for grad in expected.values())


def test_delta_with_a_parameter_in_its_density():
    # By hand what AutoStructured does. Without its score the gradient would be 1.67
    # higher: the density of a Delta is no density of a draw.
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        scale = positive("scale", 0.6)
        e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(e * scale, log_density=-scale.log()))

    check_equal_to_trace_elbo(Case(model, guide))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_replayed_values_are_no_draws(where):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def draw():
        pyro.sample("z", dist.Normal(real("loc", 0.5), 1.0))

    v = real("v", 0.7)
    trace = poutine.trace(draw).get_trace()
    trace.nodes["z"]["value"] = 2 * v
    if where == "inside":
        check_equal_to_trace_elbo(Case(model, poutine.replay(draw, trace=trace)))
        return
    case = Case(model, draw)
    with poutine.replay(trace=trace):
        check_equal_to_trace_elbo(case)
        elbo = STLTrace_ELBO(control_variate_scale=1.0)
        elbo.loss(model, draw)
    assert elbo.report()[0].reason == "its value was supplied, not drawn"


MOVING_SUPPORTS = {
    "uniform": lambda p: dist.Uniform(torch.zeros(()), p),
    "pareto": lambda p: dist.Pareto(p, 3.0 * torch.ones(())),
    "affine beta": lambda p: dist.AffineBeta(torch.tensor(1.2), torch.tensor(1.5), p, p + 1),
}


@pytest.mark.parametrize("name", MOVING_SUPPORTS)
def test_support_that_moves(name):
    # d log q / d p at a fixed draw of Uniform(0, p) is -1 / p: not zero in the mean.
    def model():
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", MOVING_SUPPORTS[name](positive("p", 1.5)))

    check_equal_to_trace_elbo(Case(model, guide))


def test_straight_through_relaxation():
    # log_prob reads the soft value from an attribute of the hard one.
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.arange(3.0), 1.0), obs=torch.tensor(1.0))

    def guide():
        logits = real("logits", 0.2, -0.3, 0.5)
        temperature = torch.tensor(0.6)
        q = dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits)
        pyro.sample("z", q)

    check_equal_to_trace_elbo(Case(model, guide))


def test_batch_norm_flow():
    # Its log_prob uses statistics of the batch, and so is no density.
    transform = dist.transforms.batchnorm(2)

    def model():
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.module("flow", transform)
        base = dist.Normal(torch.zeros(2), 1.0).expand([5, 2]).to_event(1)
        with pyro.plate("data", 5):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    case = Case(model, guide)
    state = {name: buffer.clone() for name, buffer in transform.state_dict().items()}
    _, expected = evaluate(Trace_ELBO(), case, seed=1)
    moved = transform.moving_mean.clone()
    transform.load_state_dict(state)
    _, actual = evaluate(STLTrace_ELBO(control_variate_scale=1.0), case, seed=1)
    assert_same(actual, expected)
    assert torch.equal(transform.moving_mean, moved)


def test_factor_in_the_guide():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        loc = real("loc", 0.5)
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("f", -0.3 * (z - loc).square() + loc, has_rsample=True)

    case = Case(model, guide)
    options = dict(VECTORIZED, max_plate_nesting=0)
    expected = draw_gradients(Trace_ELBO(**options), case, 50, seed=0)
    actual = draw_gradients(STLTrace_ELBO(control_variate_scale=1.0, **options), case, 50, seed=0)
    assert_unbiased(actual, paired=expected, detect=0.15)


@pytest.mark.parametrize("mask", [True, False, torch.tensor([True, False, True, True])])
def test_masked_distributions(mask):
    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).mask(mask))

    def guide():
        loc, scale = real("loc", 0.1, 0.2, 0.3, 0.4), positive("scale", 0.5, 1.0, 1.5, 2.0)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(loc, scale).mask(mask))

    case = Case(model, guide)
    options = dict(VECTORIZED, max_plate_nesting=1)
    expected = draw_gradients(Trace_ELBO(**options), case, 50, seed=0)
    actual = draw_gradients(STLTrace_ELBO(control_variate_scale=1.0, **options), case, 50, seed=0)
    detect = None if mask is False else 0.3
    assert_unbiased(actual, paired=expected, detect=detect)


def test_scale_that_depends_on_an_upstream_draw():
    def both(z_loc, z_scale, y_loc):
        z = pyro.sample("z", dist.Normal(z_loc, z_scale))
        with poutine.scale(scale=1.0 + z.detach().square()):
            pyro.sample("y", dist.Normal(y_loc, 1.0))

    case = Case(
        lambda: both(torch.zeros(()), 1.0, 0.5),
        lambda: both(real("loc", 0.3), positive("scale", 1.2), real("y_loc", -0.4)),
    )
    options = dict(VECTORIZED, max_plate_nesting=0)
    expected = draw_gradients(Trace_ELBO(**options), case, 50, seed=0)
    actual = draw_gradients(STLTrace_ELBO(control_variate_scale=1.0, **options), case, 50, seed=0)
    assert_unbiased(actual, paired=expected, detect=0.3)


def test_plain_module_has_no_gradient_in_loss_and_grads():
    # As in Trace_ELBO: without a param site it calls no backward.
    case = GUIDES["plain_module"]()
    _, grads = evaluate(STLTrace_ELBO(control_variate_scale=1.0), case, "loss_and_grads")
    assert set(grads.values()) == {None}
    _, grads = evaluate(STLTrace_ELBO(control_variate_scale=1.0), case, "differentiable_loss")
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_torch_func():
    def loss(elbo, loc):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

        def guide():
            pyro.sample("z", dist.Normal(loc, 1.5))

        pyro.set_rng_seed(3)
        return elbo.differentiable_loss(model, guide)

    for scale in (1.0, 0.4, "adaptive"):
        loc = torch.tensor(0.3, requires_grad=True)
        (expected,) = torch.autograd.grad(loss(STLTrace_ELBO(control_variate_scale=scale), loc), loc)
        actual = torch.func.grad(lambda p: loss(STLTrace_ELBO(control_variate_scale=scale), p))(loc.detach())
        assert_same(actual, expected)


def test_constrained_parameters_of_simplex_guides():
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Multinomial(7, p), obs=torch.tensor([4.0, 2.0, 1.0]))

    def guide():
        start = torch.tensor([2.0, 1.5, 1.2])
        concentration = pyro.param("a", start, constraint=constraints.positive)
        pyro.sample("p", dist.Dirichlet(concentration))

    case = Case(model, guide)
    options = dict(VECTORIZED, max_plate_nesting=0)
    expected = draw_gradients(Trace_ELBO(**options), case, 50, seed=0)
    actual = draw_gradients(STLTrace_ELBO(control_variate_scale=1.0, **options), case, 50, seed=0)
    assert_unbiased(actual, paired=expected)
