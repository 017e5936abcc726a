# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing import rejection_gamma
from pyro.infer import SVI, RenyiELBO

from pyro_rb.infer import DReG_ELBO
from tests.support.cases import positive, real
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate
from tests.support.guides import GUIDES
from tests.support.models import conj, poisson, two


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- Arguments ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 1.5, "adaptive", None, True])
def test_bad_num_particles(bad):
    with pytest.raises(ValueError, match=f"Invalid num_particles: {bad!r}. Expected a positive"):
        DReG_ELBO(bad)


@pytest.mark.parametrize("bad", ["eager", float("nan"), float("inf"), None, True])
def test_bad_scale(bad):
    with pytest.raises(ValueError, match="Invalid control_variate_scale: .*Expected a finite"):
        DReG_ELBO(2, control_variate_scale=bad)


# -- Sites without a path gradient ---------------------------------------------


def discrete_guide(p):
    def guide():
        pyro.sample("k", dist.Bernoulli(p() if callable(p) else p))
        pyro.sample("z", dist.Normal(real("loc", 0.2), 0.9))

    return guide


def discrete_model():
    k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4)))
    z = pyro.sample("z", dist.Normal(2 * k - 1, 1.0))
    pyro.sample("x", dist.Normal(z, 0.8), obs=torch.tensor(0.6))


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_discrete_site_with_a_parameter(entrance, vectorize, num_particles):
    """RenyiELBO gives its parameter a gradient of zero, and says nothing."""
    guide = discrete_guide(lambda: pyro.param("p", torch.tensor(0.3)))
    elbo = DReG_ELBO(num_particles, vectorize_particles=vectorize)
    message = "(?s)site 'k' from Bernoulli without.*log_prob depends on a parameter.*Trace_ELBO"
    with pytest.raises(NotImplementedError, match=message):
        getattr(elbo, entrance)(discrete_model, guide)
    assert pyro.param("p").grad is None and pyro.param("loc").unconstrained().grad is None
    assert elbo.loss(discrete_model, guide) > 0  # the bound itself needs no gradient


def test_discrete_site_without_a_parameter():
    case = two()
    case.model, case.guide = discrete_model, discrete_guide(torch.tensor(0.3))
    loss, gradient = evaluate(DReG_ELBO(3, 0, vectorize_particles=True), case, seed=0)
    renyi = RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)
    assert loss == pytest.approx(evaluate(renyi, case, seed=0)[0])
    plain = DReG_ELBO(3, 0, vectorize_particles=True, control_variate_scale=0.0)
    assert_same(evaluate(plain, case, seed=0), evaluate(renyi, case, seed=0))


def test_discrete_site_that_depends_on_a_draw():
    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.2), 0.9))
        pyro.sample("k", dist.Bernoulli(logits=z))

    with pytest.raises(NotImplementedError, match="site 'k'"):
        DReG_ELBO().loss_and_grads(discrete_model, guide)


def test_partly_reparameterized_site():
    case = poisson(rejection_gamma.RejectionGamma)
    with pytest.raises(NotImplementedError, match="site 'rate' from RejectionGamma"):
        DReG_ELBO().loss_and_grads(case.model, case.guide)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_delta_density_keeps_its_weight(entrance, vectorize):
    """A Delta whose log_density holds the parameter has no score identity."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.3))

    def guide():
        s = positive("s", 0.7)
        e = pyro.sample("e", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(e * s, log_density=-s.log()))

    case = two()
    case.model, case.guide = model, guide
    guide()
    options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 0}
    expected = evaluate(RenyiELBO(**options), case, seed=0)
    assert_same(evaluate(DReG_ELBO(**options), case, entrance, seed=0), expected)


def test_replayed_values_are_no_draws():
    case, elbo = two(), DReG_ELBO(3, retain_graph=True)  # that of 2 * v
    trace = poutine.trace(case.guide).get_trace()
    v = real("v", 0.4)
    trace.nodes["z1"]["value"] = 2 * v
    case.guide = poutine.replay(case.guide, trace=trace)
    expected = evaluate(DReG_ELBO(3, control_variate_scale=0.0, retain_graph=True), case, seed=0)
    for entrance in ENTRANCES:
        _, gradient = evaluate(elbo, case, entrance, seed=0)
        assert gradient["m1"] != 0
        assert_same(gradient["m1"], expected[1]["m1"])
        assert_same(gradient["v"], expected[1]["v"])


def test_changed_in_place():
    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.3), 1.0))
        z.add_(1.0)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(RuntimeError, match="guide site 'z' was changed in place"):
        DReG_ELBO().loss_and_grads(model, guide)
    assert pyro.param("loc").grad is None


# -- The value of the loss -----------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
def test_loss_is_the_bound(vectorize):
    case = two()
    elbo = DReG_ELBO(6, 0, vectorize_particles=vectorize)
    svi = SVI(case.model, case.guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    pyro.set_rng_seed(0)
    evaluated = svi.evaluate_loss()
    pyro.set_rng_seed(0)
    assert svi.step() == pytest.approx(evaluated)
    assert_same(elbo.loss(lambda: None, lambda: None), 0.0)


def test_loss_builds_no_graph():
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(real("prior", 0.3), 1.0))
        calls.append(z.requires_grad)

    def guide():
        pyro.sample("z", dist.Normal(real("loc", 0.3), 1.0))

    DReG_ELBO(3, 0, vectorize_particles=True).loss(model, guide)
    assert calls == [False]


# -- Other -----------------------------------------------------------------------


def test_report():
    elbo = DReG_ELBO(3)
    with pytest.raises(RuntimeError, match=r"call SVI.step\(\) first"):
        elbo.report()
    case = GUIDES["AutoNormal"]()
    evaluate(elbo, case)
    report = {row.site: row for row in elbo.report()}
    assert report["th_unconstrained"].treatment == "path gradient, c = 1"
    assert report["tau"].treatment == "as RenyiELBO"
    assert report["tau"].reason == "a Delta has no score identity"
    expected = [tuple(row) for row in elbo.report()]
    elbo.loss(case.model, case.guide, *case.args)  # runs without a gradient
    assert [tuple(row) for row in elbo.report()] == expected


def test_particles_may_differ_in_structure():
    """In a loop: one has a site that the others lack."""

    def run(where):
        z = pyro.sample("z", dist.Normal(real(f"{where}_loc", 0.1), 1.0))
        if z > 0:
            pyro.sample("u", dist.Normal(real(f"{where}_u", float(where == "guide")) + z, 1.0))

    elbo = DReG_ELBO(8)
    loss = elbo.loss_and_grads(lambda: run("model"), lambda: run("guide"))
    gradients = [p.unconstrained().grad for p in map(pyro.param, ("model_u", "guide_u"))]
    assert all(g.isfinite() and g != 0 for g in gradients) and loss == loss


@pytest.mark.parametrize("vectorize", [False, True])
def test_other_losses_on_a_draw_keep_their_gradient(vectorize):
    """The taps pass what comes from elsewhere as it is."""
    stashed = []

    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.3), 1.0))
        stashed.append(z)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.3))

    loss = DReG_ELBO(3, 0, vectorize_particles=vectorize).differentiable_loss(model, guide)
    loc = pyro.param("loc")
    (alone,) = torch.autograd.grad(loss, loc, retain_graph=True)
    (both,) = torch.autograd.grad(loss + 7.0 * sum(z.sum() for z in stashed), loc)
    assert_same(both, alone + 21.0)


def count_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_no_graph_is_left_behind():
    case = conj()
    for vectorize in (False, True):
        elbo = DReG_ELBO(4, vectorize_particles=vectorize, control_variate_scale="adaptive")
        evaluate(elbo, case)
        gc.collect()
        before = count_tensors()
        gc.disable()
        try:
            for seed in range(5):
                evaluate(elbo, case, seed=seed)
            after = count_tensors()
        finally:
            gc.enable()
        assert after - before < 10
