# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Losses of others that change the objective, as a second base class."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.cevae import CEVAE, TraceCausalEffect_ELBO
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item

from pyro_rb import RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO


class CausalSTL(STLTrace_ELBO, TraceCausalEffect_ELBO):
    pass


class CausalRB(RaoBlackwell_ELBO, TraceCausalEffect_ELBO):
    pass


class CausalTopK(RaoBlackwellTopK_ELBO, TraceCausalEffect_ELBO):
    pass


@pytest.fixture
def cevae():
    x = torch.randn(20, 3)
    t, y = torch.bernoulli(torch.full((2, 20), 0.4))
    network = CEVAE(feature_dim=3, latent_dim=2, hidden_dim=4, num_layers=2)
    return network.model, network.guide, x, t, y


def evaluate(elbo, call):
    pyro.set_rng_seed(0)
    loss = elbo.loss_and_grads(*call, size=20)
    grads = {name: value.unconstrained().grad.clone() for name, value in pyro.get_param_store().named_parameters()}
    for _, value in pyro.get_param_store().named_parameters():
        value.grad = None
    return loss, grads


def test_the_objective_of_the_other_base_is_kept(cevae):
    make = partial(CausalSTL, control_variate_scale=0.0)
    pyro.set_rng_seed(0)
    TraceCausalEffect_ELBO().loss(*cevae, size=20)  # makes the parameters
    expected, found = evaluate(TraceCausalEffect_ELBO(), cevae), evaluate(make(), cevae)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert evaluate(Trace_ELBO(), cevae)[0] != pytest.approx(expected[0], rel=1e-2)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad)
    losses = []
    for elbo in (make(), TraceCausalEffect_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(*cevae, size=20))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("cls", [CausalRB, CausalTopK])
@pytest.mark.parametrize("method", ["loss", "loss_and_grads", "differentiable_loss"])
def test_sums_that_would_leave_it_out_are_refused(cls, method, cevae):
    with pytest.raises(NotImplementedError, match="whose loss TraceCausalEffect_ELBO changes.*Expected STLTrace_ELBO"):
        getattr(cls(), method)(*cevae, size=20)


class Penalized(RaoBlackwell_ELBO):
    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        penalty = pyro.param("loc").square()
        return loss + torch_item(penalty), surrogate + penalty


def test_a_subclass_with_a_term_of_its_own():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0))

    guide()
    losses = []
    for elbo in (Penalized(), RaoBlackwell_ELBO()):
        pyro.set_rng_seed(0)
        losses.append((elbo.loss(model, guide), elbo.loss_and_grads(model, guide)))
    for penalized, plain in zip(*losses):
        assert penalized == pytest.approx(plain + 4.0)

    def model_with_bit():
        model()
        pyro.sample("b", dist.Bernoulli(0.5))

    def guide_with_bit():
        guide()
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.3))))

    with pytest.raises(NotImplementedError, match="Found Penalized, whose loss Penalized changes"):
        Penalized().loss_and_grads(model_with_bit, guide_with_bit)
