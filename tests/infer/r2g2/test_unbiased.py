# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""z-tests: against exact gradients, and paired with the plain gradient of the same draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import (
    KINDS,
    fixed,
    net,
    regression,
    spent,
    treatments,
    weights,
)
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import draw_gradients

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def check_paired(case, num_samples=200, detect=0.15, elbo=None, fresh=False, **options):
    """Equal in the mean to the plain gradient, with the same random numbers."""
    elbo = R2G2_ELBO(**options) if elbo is None else elbo
    ours = draw_gradients(elbo, case, num_samples, seed=0)
    plain = draw_gradients(spent(case, **options), case, num_samples, seed=0)
    assert_unbiased(ours, paired=plain, detect=detect)
    assert any((ours[name] - plain[name]).abs().max() > 1e-6 for name in ours), "nothing projected"
    return elbo


# -- Exact gradients -----------------------------------------------------------


@pytest.mark.parametrize("is_logistic", [False, True], ids=["linear", "logistic"])
@pytest.mark.parametrize("kind", KINDS)
def test_regression(kind, is_logistic):
    case = regression(kind, is_logistic=is_logistic)
    samples = draw_gradients(R2G2_ELBO(), case, 250, seed=0)
    assert_unbiased(samples, case.exact_gradient(), detect=0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_vectorized_particles(kind):
    case = regression(kind)
    elbo = R2G2_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=1)
    x, y = fixed(3, 8, seed=6), torch.tensor([1.0, 0.0, 1.0])

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.5).expand([8]).to_event(1))
        z = (w @ x.mT).squeeze(-2) if w.dim() > 2 else w @ x.mT
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    case.model = model
    samples = draw_gradients(elbo, case, 40, seed=0)
    assert_unbiased(samples, case.exact_gradient(), detect=0.3)
    assert treatments(elbo) == {"w": "projected"}


def test_subsampled_and_scaled():
    x, y = fixed(6, 8, seed=6), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    case = regression(rows=6)

    def model():
        with poutine.scale(scale=1.3):
            w = pyro.sample("w", dist.Normal(0.0, 1.5).expand([8]).to_event(1))
            with pyro.plate("data", 6, subsample_size=2) as index:
                pyro.sample("y", dist.Normal(x[index] @ w, 0.7), obs=y[index])

    exact = {name: 1.3 * g for name, g in case.exact_gradient().items()}
    case.model, case.guide = model, poutine.scale(case.guide, 1.3)
    elbo = R2G2_ELBO()
    assert_unbiased(draw_gradients(elbo, case, 300, seed=0), exact, detect=0.6)
    assert treatments(elbo) == {"w": "projected"}


# -- Networks ------------------------------------------------------------------


@pytest.mark.parametrize("guide, solver", [("AutoNormal", "cg"), ("AutoDiagonalNormal", "auto")])
def test_network(guide, solver):
    check_paired(net(guide), 50, detect=0.25, solver=solver)


@pytest.mark.parametrize("guide", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_full_rank_guide_of_one_layer(guide):
    elbo = check_paired(net(guide, sizes=(8, 1)), 50, detect=0.3)
    assert "projected" in treatments(elbo).values()


def test_gaussian_process():
    """``f = K u`` with correlated inducing values."""
    k = (-0.5 * (fixed(4, 1, seed=1) - fixed(9, 1, seed=2).mT).square()).exp()
    case = regression("scale_tril", n=9, rows=4)

    def model():
        u = pyro.sample("w", dist.MultivariateNormal(torch.zeros(9), torch.eye(9)))
        f = torch.einsum("ij,j->i", k, u)
        with pyro.plate("data", 4):
            pyro.sample("y", dist.StudentT(3.0, f, 0.3), obs=fixed(4, seed=3))

    case.model = model
    check_paired(case, 150, detect=0.4)


PARTLY = {
    "disjoint": lambda x, w: F.linear(F.linear(x, w[:2]).tanh()[:, :1].expand(3, 6), w[2:]),
    "overlapping": lambda x, w: (x @ w[:3].mT + x @ w[1:].mT).tanh(),
    "one_item": lambda x, w: (F.linear(x, w) * w[0, 0].item()).tanh(),
    "a_half": lambda x, w: F.linear(x, w).tanh() + w[:2].square().sum(),
}


@pytest.mark.parametrize("name", PARTLY)
def test_only_some_elements_are_projected(name):
    elbo = check_paired(weights(PARTLY[name]), 150, detect=0.3)
    assert treatments(elbo)["w"].startswith("projected")


# -- More than one Gaussian site -------------------------------------------------


def two_sites(model, guide):
    def positive(name, *shape, seed):
        return pyro.param(
            name, lambda: 0.5 * (0.3 * fixed(*shape, seed=seed).double()).exp(), constraint=constraints.positive
        )

    def real(name, *shape, seed):
        return pyro.param(name, lambda: 0.5 * fixed(*shape, seed=seed).double())

    return Case(lambda: model(), lambda: guide(real, positive))


def test_linear_use_in_the_guide():
    """The second site's mean is a linear function of the first."""
    x = fixed(3, 6, seed=1).double()

    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(0.3 * (x @ u), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(v.tanh(), 0.5).to_event(1), obs=fixed(3, seed=2).double())

    def model_apart():
        pyro.sample("u", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(v.tanh(), 0.5).to_event(1), obs=fixed(3, seed=2).double())

    def guide(real, positive):
        u = pyro.sample("u", dist.Normal(real("a", 6, seed=1), positive("b", 6, seed=2)).to_event(1))
        z = F.linear(u, x)
        pyro.sample("v", dist.Normal(z, (positive("c", 3, seed=3) * (0.3 * z).exp())).to_event(1))

    elbo = check_paired(two_sites(model_apart, guide), detect=0.3)
    assert treatments(elbo) == {"u": "projected", "v": "plain"}
    case = two_sites(model, guide)  # the model uses it once more
    plain = draw_gradients(spent(case), case, 5, seed=0)
    assert_unbiased(draw_gradients(elbo, case, 5, seed=0), paired=plain, detect=None)
    assert treatments(elbo) == {"u": "plain", "v": "plain"}


def test_latent_of_a_hidden_layer():
    """Latent inputs and random weights of the decoder: a product is plain."""
    c = fixed(2, 7, seed=1).double()

    def model():
        z = pyro.sample("u", dist.Normal(torch.zeros(4, 7), 1.0).to_event(2))
        w = pyro.sample("v", dist.Normal(torch.zeros(5, 2), 1.0).to_event(2))
        h = F.linear(z, pyro.param("decoder", lambda: c.clone()))
        y = F.linear(h.tanh(), w)
        pyro.sample("y", dist.Normal(y, 0.5).to_event(2), obs=fixed(4, 5, seed=2).double())

    def guide(real, positive):
        pyro.sample("u", dist.Normal(real("a", 4, 7, seed=1), positive("b", 4, 7, seed=2)).to_event(2))
        pyro.sample("v", dist.Normal(real("c", 5, 2, seed=3), positive("d", 5, 2, seed=4)).to_event(2))

    elbo = check_paired(two_sites(model, guide), detect=0.25)
    assert treatments(elbo) == {"u": "projected", "v": "plain"}


def test_prior_depends_on_another_site():
    """Hierarchical scale: the prior's parameter is a use of the first site."""
    x = fixed(3, 6, seed=1).double()

    def model():
        t = pyro.sample("u", dist.Normal(0.0, 1.0))
        w = pyro.sample("v", dist.Normal(torch.zeros(6), t.exp()).to_event(1))
        pyro.sample("y", dist.Normal((x @ w).tanh(), 0.5).to_event(1), obs=fixed(3, seed=2).double())

    def guide(real, positive):
        pyro.sample("u", dist.Normal(real("a", seed=1), positive("b", seed=2)))
        pyro.sample("v", dist.Normal(real("c", 6, seed=3), positive("d", 6, seed=4)).to_event(1))

    elbo = check_paired(two_sites(model, guide))
    assert treatments(elbo) == {"u": "plain", "v": "projected"}


def test_prior_that_depends_on_a_later_site_of_the_guide():
    """The log prior is no expectation over one site then; it stays as it is."""

    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(u, 0.5).to_event(1))
        pyro.sample("y", dist.Normal(v, 0.5).to_event(1), obs=fixed(3, seed=2).double())

    def guide(real, positive):
        v = pyro.sample("v", dist.Normal(real("c", 3, seed=3), positive("d", 3, seed=4)).to_event(1))
        pyro.sample("u", dist.Normal(0.7 * v, positive("b", 3, seed=2)).to_event(1))

    case, elbo = two_sites(model, guide), R2G2_ELBO()
    ours = draw_gradients(elbo, case, 700, seed=0)
    assert_unbiased(ours, independent=draw_gradients(Trace_ELBO(), case, 700, seed=1), detect=0.7)
    assert elbo.report()[0].reason.endswith("log prior not analytic")


@pytest.mark.parametrize("guide_uses_it", [False, True], ids=["model", "guide"])
def test_discrete_site(guide_uses_it):
    """The prior of the Gaussian depends on the discrete value: its score factor does too."""
    x = fixed(3, 6, seed=1).double()

    def model():
        k = pyro.sample("k", dist.Bernoulli(0.4))
        w = pyro.sample("u", dist.Normal(torch.zeros(6), 0.5 + k).to_event(1))
        y = dist.Normal((x @ w).tanh() + k if not guide_uses_it else k.expand(3), 0.5)
        pyro.sample("y", y.to_event(1), obs=fixed(3, seed=2).double())

    def guide(real, positive):
        w = pyro.sample("u", dist.Normal(real("a", 6, seed=1), positive("b", 6, seed=2)).to_event(1))
        logits = real("c", seed=3)
        if guide_uses_it:
            logits = logits + (x @ w).tanh().sum()
        pyro.sample("k", dist.Bernoulli(logits=logits))

    case = two_sites(model, guide)
    elbo = R2G2_ELBO()
    ours = draw_gradients(elbo, case, 80, seed=0)
    plain = draw_gradients(spent(case), case, 80, seed=0)
    assert_unbiased(ours, paired=plain, detect=0.5)
    assert treatments(elbo)["u"] == ("plain" if guide_uses_it else "projected")
    if guide_uses_it:
        assert "guide of a score-function site" in elbo.report()[0].reason


# -- A use that is there in some draws only ----------------------------------------


def test_second_use_behind_a_branch():
    """The first call of a fresh loss, many times: the same noise is used again."""

    def use(x, w):
        f = F.linear(x, w)
        return f + F.linear(x.roll(1, 0), w).tanh() if f.sum() > 0 else f

    case = weights(use, (1, 6), rows=3)

    class Forgets(R2G2_ELBO):
        def _get_terms(self, *args):
            self._plain = {}
            return super()._get_terms(*args)

    check_paired(case, 150, elbo=Forgets(), detect=0.15)


# -- Local mode ----------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoDiagonalNormal"])
def test_local(guide):
    case = net(guide)
    elbo = R2G2_ELBO(pre_activations="local")
    ours = draw_gradients(elbo, case, 100, seed=0)
    plain = draw_gradients(spent(case), case, 100, seed=1)
    assert_unbiased(ours, independent=plain, detect=0.7)
    assert "local" in treatments(elbo).values()


def test_local_with_exact_gradient():
    case = weights(lambda x, w: F.linear(x, w))
    x = fixed(3, 6, seed=9)

    def exact_loss():
        loc, scale = pyro.param("w.loc"), pyro.param("w.scale")
        f, var = F.linear(x, loc), F.linear(x.square(), scale.square())
        kl = 0.5 * (loc.square() + scale.square() - 1) - scale.log()
        square = (f - 0.5 * fixed(3, 4, seed=10)).square() + var
        return kl.sum() + square.sum() / 0.5

    case.exact_loss = exact_loss
    elbo = R2G2_ELBO(pre_activations="local")
    assert_unbiased(draw_gradients(elbo, case, 100, seed=0), case.exact_gradient(), detect=0.3)
    assert treatments(elbo) == {"w": "local"}


def test_local_with_a_weight_that_is_used_twice():
    case = weights(lambda x, w: F.linear(x, w).tanh() + F.linear(x.roll(1, 0), w))
    elbo = R2G2_ELBO(pre_activations="local")
    ours = draw_gradients(elbo, case, 30, seed=0)
    plain = draw_gradients(spent(case), case, 30, seed=0)
    assert_unbiased(ours, paired=plain, detect=0.1)
    assert treatments(elbo) == {"w": "plain"}
