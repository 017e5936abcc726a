# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Priors and guides that are not what their class says; draws without gradient."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from torch.distributions import kl, kl_divergence, register_kl

from pyro_rb.infer import R2G2_ELBO, RaoBlackwell_ELBO
from tests.infer.r2g2.models import KINDS, fixed, gaussian, reasons, treatments
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import assert_same, draw_gradients, evaluate

N, ROWS = 8, 3
ZEROS, EYE = torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def tilt(value):
    """Makes a Normal skew."""
    return torch.special.log_ndtr(3.0 * value) + math.log(2.0)


def tilted(family):
    """A subclass with a density of its own; kl_divergence takes it for the family."""

    class Tilted(family):
        def log_prob(self, value):
            log_prob = super().log_prob(value)
            event = tuple(range(log_prob.dim(), value.dim()))
            return log_prob + (tilt(value).sum(event) if event else tilt(value))

    return Tilted


def tilted_instance(fn):
    log_prob = fn.log_prob
    fn.log_prob = lambda value: log_prob(value) + tilt(value).sum(-1)
    return fn


class Mixin:
    def log_prob(self, value):
        return super().log_prob(value) + tilt(value)


class Mixed(Mixin, dist.Normal):
    pass


class Clipped(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value).clamp(min=-1.2)


class OfAUser(dist.TorchDistribution):
    """Says of itself only what pyro.sample needs."""

    has_rsample = True

    def __init__(self, batch_shape):
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def log_prob(self, value):
        return dist.StudentT(torch.tensor(5.0)).log_prob(value)

    def rsample(self, sample_shape=torch.Size()):
        return torch.randn(sample_shape + self.batch_shape)

    def expand(self, batch_shape, _instance=None):
        return OfAUser(batch_shape)


#: Priors without a formula for the mean of their log density.
OTHERS = {
    "subclass": lambda: tilted(dist.Normal)(ZEROS, 1.0).to_event(1),
    "mixin": lambda: Mixed(ZEROS, 1.0).to_event(1),
    "clipped": lambda: Clipped(ZEROS, 1.0).to_event(1),
    "multivariate": lambda: tilted(dist.MultivariateNormal)(ZEROS, EYE + 0.3),
    "low_rank": lambda: tilted(dist.LowRankMultivariateNormal)(ZEROS, 0.3 * EYE[:, :2], 1.0 + ZEROS),
    "laplace": lambda: tilted(dist.Laplace)(ZEROS, 1.0).to_event(1),
    "independent": lambda: tilted(dist.Independent)(dist.Normal(ZEROS, 1.0), 1),
    "instance": lambda: tilted_instance(dist.Normal(ZEROS, 1.0).to_event(1)),
    "masked": lambda: dist.Normal(ZEROS, 1.0).mask(ZEROS == 0.0).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(tilted(dist.Normal)(0.0, 1.0), [N]).to_event(1),
    "of_a_user": lambda: OfAUser([N]).to_event(1),
}
#: And with one, also under a harmless subclass.
KNOWN = {
    "normal": lambda: dist.Normal(ZEROS, 1.5).to_event(1),
    "subclass": lambda: type("Same", (dist.Normal,), {})(ZEROS, 1.5).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(ZEROS, EYE + 0.3),
}


def regression(prior, guide):
    """``guide`` makes the guide's distribution, or is an autoguide."""
    x, y = fixed(ROWS, N, seed=6), torch.tensor([1.0, 0.0, 1.0])

    def model():
        w = pyro.sample("w", prior())
        with pyro.plate("data", ROWS):
            pyro.sample("y", dist.Normal((x @ w).tanh(), 0.7), obs=y)

    if isinstance(guide, type):
        return Case(model, guide(model, init_scale=0.4))
    return Case(model, lambda: pyro.sample("w", guide()))


def traces(case, seed):
    pyro.set_rng_seed(seed)
    guide_trace = poutine.trace(case.guide).get_trace()
    model_trace = poutine.trace(poutine.replay(case.model, guide_trace)).get_trace()
    return model_trace, guide_trace


GUIDES = [*KINDS, AutoNormal, AutoMultivariateNormal]
# Autoguides ask for the support.
PAIRS = [(n, g) for n in OTHERS for g in (KINDS if n == "of_a_user" else GUIDES)]


@pytest.mark.parametrize("name, guide", PAIRS)
def test_log_prior_without_a_formula_is_that_of_the_draw(name, guide):
    case = regression(OTHERS[name], guide if isinstance(guide, type) else gaussian("w", guide, N))
    elbo = R2G2_ELBO()
    loss, _ = evaluate(elbo, case, seed=0)
    model_trace, guide_trace = traces(case, 0)
    site = next(s for s in guide_trace.nodes.values() if s["type"] == "sample")
    assert_same(loss, -(model_trace.log_prob_sum() + site["fn"].entropy().sum()).item())
    row = elbo.report()[0]
    assert row.treatment == "projected" and row.reason.endswith("log prior not analytic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KNOWN)
def test_log_prior_with_a_formula(name, kind):
    case = regression(KNOWN[name], gaussian("w", kind, N))
    elbo = R2G2_ELBO()
    loss, _ = evaluate(elbo, case, seed=0)
    model_trace, guide_trace = traces(case, 0)
    model_trace.compute_log_prob()
    q = guide_trace.nodes["w"]["fn"]
    if kind == "diagonal":
        q = dist.MultivariateNormal(q.mean, scale_tril=q.stddev.diag())
    p = KNOWN[name]()
    if not isinstance(p, dist.MultivariateNormal):
        p = dist.MultivariateNormal(p.mean, scale_tril=p.stddev.diag())
    assert_same(loss, (kl_divergence(q, p) - model_trace.nodes["y"]["log_prob_sum"]).item())
    assert "not analytic" not in reasons(elbo)["w"]


def test_laplace_and_gumbel_priors():
    for family in (dist.Laplace, dist.Gumbel):
        pyro.clear_param_store()
        case = regression(lambda: family(ZEROS, 1.0 + ZEROS).to_event(1), gaussian("w", "diagonal", N))
        loss, _ = evaluate(R2G2_ELBO(), case, seed=0)
        model_trace, guide_trace = traces(case, 0)
        model_trace.compute_log_prob()
        divergence = kl_divergence(guide_trace.nodes["w"]["fn"].base_dist, family(ZEROS, 1.0 + ZEROS)).sum()
        assert_same(loss, (divergence - model_trace.nodes["y"]["log_prob_sum"]).item())


def test_registered_divergence_is_that_of_the_class_itself():
    class Base(OfAUser):
        support = constraints.real

        def expand(self, batch_shape, _instance=None):
            return type(self)(batch_shape)

    class Derived(Base):
        def log_prob(self, value):
            return super().log_prob(value) + tilt(value)

    try:
        register_kl(torch.distributions.Normal, Base)(lambda p, q: p.loc.square())
        for family, reason in ((Base, ""), (Derived, "log prior not analytic")):
            case = regression(lambda: family([N]).to_event(1), gaussian("w", "diagonal", N))
            elbo = R2G2_ELBO()
            evaluate(elbo, case)
            assert ("log prior not analytic" in reasons(elbo)["w"]) == bool(reason)
    finally:
        kl._KL_REGISTRY.pop((torch.distributions.Normal, Base))
        kl._KL_MEMOIZE.clear()


def test_prior_subclass_is_unbiased():
    case = regression(OTHERS["subclass"], gaussian("w", "diagonal", N))
    ours = draw_gradients(R2G2_ELBO(), case, 40, seed=0)
    plain = draw_gradients(Trace_ELBO(), case, 40, seed=0)
    assert_unbiased(ours, paired=plain, detect=0.6)


def test_prior_of_correlated_parts_depends_on_a_parameter():
    """The noise of one part of the site may be in the prior of another."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        b = pyro.sample("b", type("Same", (dist.Normal,), {"arg_constraints": {}})(a, 0.5).to_event(1))
        pyro.sample("y", dist.Normal(b.tanh(), 0.5).to_event(1), obs=torch.ones(3))

    case = Case(model, AutoMultivariateNormal(model, init_scale=0.5))
    elbo = R2G2_ELBO()
    ours = draw_gradients(elbo, case, 40, seed=0)
    assert_unbiased(ours, paired=draw_gradients(Trace_ELBO(), case, 40, seed=0), detect=1.2)
    assert "log prior not analytic" in elbo.report()[0].reason


# -- Guides ------------------------------------------------------------------------


class Antithetic(dist.Normal):
    def rsample(self, sample_shape=torch.Size()):
        half = torch.randn(sample_shape + self.batch_shape)[..., : N // 2]
        return self.loc + self.scale * torch.cat([half, -half], -1)


class Truncated(dist.Normal):
    def __call__(self, sample_shape=torch.Size()):
        return self.rsample(sample_shape).clamp(-1.0, 1.0)


class Tempered(dist.Normal):
    def log_prob(self, value):
        return 1.5 * super().log_prob(value)


class OwnEntropy(dist.Normal):
    def entropy(self):
        return 2.0 * super().entropy()


class OwnScore(dist.Normal):
    def score_parts(self, value):
        return super().score_parts(value)._replace(entropy_term=2.0 * self.log_prob(value))


def tempered_instance(loc, scale):
    fn = dist.Normal(loc, scale)
    fn.log_prob = lambda value: 1.5 * type(fn).log_prob(fn, value)
    return fn


CHANGED = {
    "rsample": Antithetic,
    "__call__": Truncated,
    "log_prob": Tempered,
    "entropy": OwnEntropy,
    "score_parts": OwnScore,
    "instance": tempered_instance,
}


def loc_and_scale():
    loc = pyro.param("loc", lambda: 0.3 * fixed(N, seed=1))
    return loc, pyro.param("scale", lambda: 0.5 + ZEROS, constraint=constraints.positive)


@pytest.mark.parametrize("name", CHANGED)
def test_guide_that_is_no_normal_is_left_as_it_is(name):
    case = regression(KNOWN["normal"], lambda: CHANGED[name](*loc_and_scale()).to_event(1))
    evaluate(Trace_ELBO(), case)
    elbo = R2G2_ELBO()
    for seed in range(2):
        assert_same(evaluate(elbo, case, seed=seed), evaluate(Trace_ELBO(), case, seed=seed))
    family = "Normal" if name == "instance" else CHANGED[name].__name__
    method = "log_prob" if name == "instance" else name
    assert reasons(elbo) == {"w": f"not Gaussian ({family} has its own {method})"}


def draw_under(context):
    def guide():
        loc, scale = loc_and_scale()
        with context():
            return pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return guide


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_draw_without_gradient_sends_none(context):
    """Neither through the value nor by the entropy: what is left is a score of mean zero."""
    case = regression(KNOWN["normal"], AutoNormal)
    case.guide, elbo = draw_under(context), R2G2_ELBO()
    evaluate(Trace_ELBO(), case)
    for seed in range(2):
        assert_same(evaluate(elbo, case, seed=seed), evaluate(Trace_ELBO(), case, seed=seed))
    assert reasons(elbo) == {"w": "drawn without gradient"}


def test_one_of_two_draws_without_gradient():
    x = fixed(ROWS, N, seed=6)

    def model():
        pyro.sample("u", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(ZEROS, 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x @ w).tanh(), 0.7).to_event(1), obs=torch.ones(ROWS))

    def guide():
        loc, scale = loc_and_scale()
        with torch.no_grad():
            u = pyro.sample("u", dist.Normal(loc[0], scale[0]))
        pyro.sample("w", dist.Normal(loc + u, scale).to_event(1))

    case, elbo = Case(model, guide), R2G2_ELBO()
    evaluate(Trace_ELBO(), case)
    ours = draw_gradients(elbo, case, 60, seed=0)
    assert_unbiased(ours, paired=draw_gradients(Trace_ELBO(), case, 60, seed=0), detect=0.6)
    assert treatments(elbo) == {"u": "plain", "w": "projected"}


@pytest.mark.parametrize("detached", ["loc", "scale"])
def test_detached_parameter_gets_no_gradient(detached):
    def make():
        loc, scale = loc_and_scale()
        loc, scale = (loc.detach(), scale) if detached == "loc" else (loc, scale.detach())
        return dist.Normal(loc, scale).to_event(1)

    case = regression(KNOWN["normal"], make)
    evaluate(Trace_ELBO(), case)
    elbo = R2G2_ELBO()
    _, gradient = evaluate(elbo, case)
    assert gradient[detached] is None and treatments(elbo) == {"w": "projected"}


def test_loss_without_gradient_has_the_same_value():
    case = regression(KNOWN["normal"], gaussian("w", "diagonal", N))
    expected = evaluate(R2G2_ELBO(), case, seed=0)[0]
    pyro.set_rng_seed(0)
    with torch.no_grad():
        assert_same(R2G2_ELBO().loss(case.model, case.guide), expected)


# -- Handlers around the loss --------------------------------------------------------


class Narrow(Messenger):
    def _pyro_sample(self, msg):
        if msg["name"] == "w":
            msg["fn"] = dist.Normal(ZEROS, 0.01).to_event(1)


class Supply(Messenger):
    def _pyro_sample(self, msg):
        if msg["name"] == "w":
            msg["value"] = ZEROS.clone()


@pytest.mark.parametrize("is_around_loss", [True, False])
def test_distribution_that_a_handler_replaces_is_the_one_that_is_drawn_from(is_around_loss):
    case = regression(KNOWN["normal"], gaussian("w", "diagonal", N))
    elbo = R2G2_ELBO()
    if is_around_loss:
        with Narrow():
            evaluate(elbo, case)
    else:
        case.guide = Narrow()(case.guide)
        evaluate(elbo, case)
    assert elbo.report()[0].reason == "depends on no parameter"


def test_distribution_that_is_replaced_after_the_draw_is_an_error():
    case = regression(KNOWN["normal"], gaussian("w", "diagonal", N))
    message = r"replaced the distribution of guide site 'w'.*handler\(guide\)"
    with Narrow(), pytest.raises(NotImplementedError, match=message):
        RaoBlackwell_ELBO().loss_and_grads(case.model, case.guide)


def test_value_that_is_replaced_after_the_draw_is_plain():
    case = regression(KNOWN["normal"], gaussian("w", "diagonal", N))
    elbo = R2G2_ELBO()
    with Supply():
        expected = evaluate(Trace_ELBO(), case, seed=0)
        assert_same(evaluate(elbo, case, seed=0), expected)
    assert reasons(elbo) == {"w": "its value was supplied, not drawn"}
