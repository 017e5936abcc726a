# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""In the place of RenyiELBO, and where it is refused."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule

from pyro_rb.infer import (
    R2G2_ELBO,
    DReG_ELBO,
    RaoBlackwellTopK_ELBO,
    RVRSGuide,
    STLTrace_ELBO,
)
from tests.support.cases import Case, positive, real
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- Arguments -----------------------------------------------------------------


def test_positional_arguments_are_those_of_renyi():
    """All but alpha, with the same defaults; options of our own are given by name."""
    renyi = list(inspect.signature(RenyiELBO).parameters.values())[1:]
    ours = inspect.signature(DReG_ELBO).parameters.values()
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in renyi]
    assert DReG_ELBO(8).num_particles == 8 and not DReG_ELBO(8).vectorize_particles
    elbo = DReG_ELBO(4, 1, None, True, False)
    reference = RenyiELBO(0, 4, 1, None, True, False)
    for name, value in vars(reference).items():
        assert getattr(elbo, name) == value
    with pytest.raises(TypeError, match="positional arguments"):
        DReG_ELBO(4, 1, None, True, False, 1.0)


def test_particles_are_looped_by_default():
    """So that a model that looks at all of its values has the objective of RenyiELBO."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z - z.mean()).square().sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(real("loc", 0.3, -0.2, 0.1), 0.7).to_event(1))

    case = Case(model, guide)
    expected = evaluate(RenyiELBO(num_particles=4), case, seed=0)
    assert_same(evaluate(DReG_ELBO(4, control_variate_scale=0.0), case, seed=0), expected)
    assert evaluate(DReG_ELBO(4), case, seed=0)[0] == pytest.approx(expected[0])


# -- Errors of shapes under vectorized particles ---------------------------------

GROUP = torch.tensor([0, 1, 2, 0, 1, 2])
X, Y = torch.ones(6, 3, dtype=torch.float64), torch.arange(6, dtype=torch.float64)


def coefficients():
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def by_matrix_product():
    w = coefficients()
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(X @ w, 1.0), obs=Y)


def by_index():
    w = coefficients()
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(w[GROUP], 1.0), obs=Y)


def by_branch():
    loc = 1.0 if coefficients()[..., 0] > 0 else 0.0
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))


def by_item():
    pyro.sample("x", dist.Normal(coefficients()[..., 0].item(), 1.0), obs=torch.tensor(0.5))


def by_unpacking():
    a, b, c = coefficients()
    pyro.sample("x", dist.Normal(a + b + c, 1.0), obs=torch.tensor(0.5))


def guide():
    pyro.sample("w", dist.Normal(real("loc", 0.1, 0.2, 0.3), positive("scale", 0.5)).to_event(1))


@pytest.mark.parametrize("entrance", ("loss",) + ENTRANCES)
@pytest.mark.parametrize("model", [by_matrix_product, by_index, by_branch, by_item, by_unpacking])
def test_shape_error_names_the_remedy(model, entrance):
    call = getattr(DReG_ELBO(4, vectorize_particles=True), entrance)
    with pytest.raises(Exception, match="one more dim on the left.*set vectorize_particles=False"):
        call(model, guide)
    assert pyro.param("loc").unconstrained().grad is None
    getattr(DReG_ELBO(4), entrance)(model, guide)  # the remedy is right


def test_shape_error_of_the_guide():
    def guide():
        w = pyro.sample("w", dist.Normal(real("loc", 0.1, 0.2, 0.3), 0.5).to_event(1))
        pyro.sample("u", dist.Normal(X @ w, 1.0).to_event(1))

    def model():
        w = coefficients()
        pyro.sample("u", dist.Normal(w.mean(-1, keepdim=True).expand(6), 1.0).to_event(1))

    with pytest.raises(RuntimeError, match="set vectorize_particles=False"):
        DReG_ELBO(4, vectorize_particles=True).loss_and_grads(model, guide)
    DReG_ELBO(4).loss_and_grads(model, guide)


def test_other_errors_have_no_hint():
    def broken():
        coefficients()
        raise error

    def looped():
        w = coefficients()
        pyro.sample("x", dist.Normal(torch.ones(5) @ w, 1.0), obs=torch.tensor(0.5))

    for error in (KeyError("no such shape"), ValueError("unlucky"), NotImplementedError("dim")):
        with pytest.raises(type(error)) as raised:
            DReG_ELBO(4, 0, vectorize_particles=True).loss_and_grads(broken, guide)
        assert "vectorize_particles" not in str(raised.value)
    with pytest.raises(RuntimeError, match="size") as raised:
        DReG_ELBO(4).loss_and_grads(looped, guide)
    assert "vectorize_particles" not in str(raised.value)


def test_hint_does_not_hide_that_a_site_is_discrete():
    """vectorize_particles=False would not help."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("k", dist.Categorical(logits=real("logits", 0.1, 0.2, 0.3)))
        pyro.sample("loc", dist.Normal(real("m", 0.1, 0.2, 0.3), 0.5).to_event(1))

    for vectorize in (True, False):
        elbo = DReG_ELBO(4, vectorize_particles=vectorize)
        for entrance in ENTRANCES:
            with pytest.raises(NotImplementedError, match="site 'k' from Categorical without"):
                getattr(elbo, entrance)(model, guide)


# -- Draws without a density -----------------------------------------------------


def pair():
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    y = pyro.sample("y", dist.Normal(z, 1.0))
    pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(1.0))


def proposal():
    pyro.sample("z", dist.Normal(real("z_loc", 0.3), positive("z_scale", 0.8)))
    pyro.sample("y", dist.Normal(real("y_loc", 0.5), positive("y_scale", 0.6)))


def rejection_sampled():
    return RVRSGuide(pair, proposal, T=1.0, adaptation="fixed")


def in_a_list():
    def only_z():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def of_z():
        pyro.sample("z", dist.Normal(real("z_loc", 0.3), 0.8))

    guide = AutoGuideList(pair)
    guide.append(AutoNormal(poutine.block(pair, hide=["z"])))
    guide.append(RVRSGuide(only_z, of_z))
    return guide


def in_a_module():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = rejection_sampled()

        def forward(self):
            return self.inner()

    return Guide()


WRAPPED = {
    "plain": rejection_sampled,
    "in_a_list": in_a_list,
    "in_a_module": in_a_module,
    "in_a_function": lambda: (lambda guide: lambda: guide())(rejection_sampled()),
    "scaled": lambda: poutine.scale(rejection_sampled(), 0.5),
    "without_its_factor": lambda: poutine.block(rejection_sampled(), hide=["_rvrs_factor"]),
    "with_other_options": lambda: poutine.infer_config(rejection_sampled(), lambda site: {"my": 1}),
}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_draws_without_a_density_are_refused(name, vectorize):
    guide = WRAPPED[name]()
    message = "site '[zy]' by RVRSGuide, which does not know the density.*Trace_ELBO with RVRSGuide"
    for num_particles in (1, 3):
        elbo = DReG_ELBO(num_particles, 1, vectorize_particles=vectorize)
        for entrance in ("loss",) + ENTRANCES:
            with pytest.raises(NotImplementedError, match=message):
                getattr(elbo, entrance)(pair, guide)
    assert all(p.grad is None for p in pyro.get_param_store()._params.values())


def test_local_draws_without_a_density_are_refused():
    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 1.0]))

    guide = RVRSGuide(model, AutoNormal(model), local_plate="data")
    with pytest.raises(NotImplementedError, match="site 'z' by RVRSGuide"):
        DReG_ELBO().loss_and_grads(model, guide)


def test_the_remedies_of_the_refusal_work():
    guide = rejection_sampled()
    assert DReG_ELBO().loss(pair, guide.guide) > 0
    SVI(pair, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: STLTrace_ELBO(num_particles=n, max_plate_nesting=0),
        lambda n: R2G2_ELBO(num_particles=n, max_plate_nesting=0),
        lambda n: RaoBlackwellTopK_ELBO(num_particles=n, max_plate_nesting=0),
    ],
    ids=["STLTrace_ELBO", "R2G2_ELBO", "RaoBlackwellTopK_ELBO"],
)
def test_losses_of_the_elbo_take_draws_without_a_density(make, num_particles):
    """They leave the sites to Trace_ELBO, and so have its gradient."""
    reference = pyro.infer.Trace_ELBO(num_particles=num_particles, max_plate_nesting=0)
    for entrance in ENTRANCES:
        # The guide remembers how many proposals it took: each has one of its own.
        expected = evaluate(reference, Case(pair, rejection_sampled()), entrance, seed=0)
        actual = evaluate(make(num_particles), Case(pair, rejection_sampled()), entrance, seed=0)
        assert_same(actual, expected)
