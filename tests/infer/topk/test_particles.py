# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Sites without slots: the mean cost of the other particles is their baseline."""

from copy import copy
from functools import lru_cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedGamma
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.infer.topk.models import gradient, table
from tests.support.brute_force import exact_gradient
from tests.support.cases import Case, positive
from tests.support.common import assert_unbiased, assert_variance_ratio

COPIES = 2000
VECTORISED = {"num_particles": 3, "vectorize_particles": True}
PARTICLES = {
    "one": {},
    "looped": {"num_particles": 3},
    "vectorized": VECTORISED,
    "none": {**VECTORISED, "baseline": None},
    "probe": {**VECTORISED, "baseline": "reinforce+"},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def topk(**kwargs):
    return RaoBlackwellTopK_ELBO(max_plate_nesting=1, **kwargs)


def copies(name, num, *shape):
    """Parameters of copies of a model that stand side by side in a plate."""
    return pyro.param(name, lambda: table("_" + name, *shape).detach().expand(num, *shape).clone())


def observe(loc):
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))


def vector(num):
    def model():
        with pyro.plate("copies", num):
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(3)).to_event(1))
            observe((b * torch.tensor([1.0, 2.0, 3.0])).sum(-1))

    def guide():
        with pyro.plate("copies", num):
            pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 3)).to_event(1), infer={"topk": 0})

    return Case(model, guide)


def one_hot_vector(num):
    def model():
        with pyro.plate("copies", num):
            b = pyro.sample("b", dist.OneHotCategorical(torch.ones(2, 3)).to_event(1))
            observe((b * torch.arange(6.0).reshape(2, 3)).sum((-1, -2)))

    def guide():
        with pyro.plate("copies", num):
            pyro.sample("b", dist.OneHotCategorical(logits=copies("q", num, 2, 3)).to_event(1), infer={"topk": 0})

    return Case(model, guide)


def after_slots(num, size=3, infer=None):
    """The weights of the slots of y are those of the draws of b."""

    def model():
        with pyro.plate("copies", num):
            y = pyro.sample("y", dist.Categorical(torch.ones(size)))
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
            observe(b.sum(-1) * (1.0 + y))

    def guide():
        with pyro.plate("copies", num):
            y = pyro.sample("y", dist.Categorical(logits=copies("r", num, size)), infer=infer or {})
            logits = copies("q", num, 2) + 0.5 * y.unsqueeze(-1)
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1), infer={"topk": 0})

    return Case(model, guide)


def before_slots(num, infer=None):
    def model():
        with pyro.plate("copies", num):
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            observe(b.sum(-1) * (1.0 + y))

    def guide():
        with pyro.plate("copies", num):
            b = pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 2)).to_event(1), infer={"topk": 0})
            logits = copies("r", num, 3) * b.sum(-1, keepdim=True)
            pyro.sample("y", dist.Categorical(logits=logits), infer=infer or {})

    return Case(model, guide)


def between_slots(num):
    """Each particle has other weights of y, and so of b."""

    def model():
        with pyro.plate("copies", num):
            a = pyro.sample("a", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
            observe(a.sum(-1) - b.sum(-1) * y)

    def guide():
        with pyro.plate("copies", num):
            a = pyro.sample("a", dist.Bernoulli(logits=copies("q", num, 2)).to_event(1), infer={"topk": 0})
            y = pyro.sample("y", dist.Categorical(logits=copies("r", num, 3) * a.sum(-1, keepdim=True)))
            logits = copies("s", num, 2) + 0.5 * y.unsqueeze(-1)
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1), infer={"topk": 0})

    return Case(model, guide)


IN_A_LOOP = {"enumerate": "sequential"}
CASES = {
    "vector": vector,
    "one-hot vector": one_hot_vector,
    "after slots": after_slots,
    "after all values": lambda num: after_slots(num, 2),
    "before slots": before_slots,
    "between slots": between_slots,
    "after a loop": lambda num: after_slots(num, 2, IN_A_LOOP),
    "before a loop": lambda num: before_slots(num, IN_A_LOOP),
}


@lru_cache
def _exact(name):
    case = CASES[name](1)
    expected = {n: grad[0] for n, grad in exact_gradient(case).items() if n[0] != "_"}
    pyro.clear_param_store()
    return expected


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", CASES)
def test_unbiased(name, particles):
    expected = _exact(name)
    case, elbo = CASES[name](COPIES), topk(**PARTICLES[particles])
    samples = gradient(elbo, case)
    assert_unbiased({n: samples[n] for n in expected}, expected, detect=1.0)
    (row,) = [row for row in elbo.report() if row.site == "b"]
    expected = {
        "one": "no baseline: num_particles > 1 or infer={'baseline': ...} gives one",
        "none": "no baseline",
    }
    assert row.treatment == "single draw, " + expected.get(particles, "baseline over 2 other particles")
    assert row.reason == "infer={'topk': 0}"


@pytest.mark.parametrize("particles", ["looped", "vectorized"])
def test_unbiased_where_each_particle_has_other_rows(particles):
    """A subsample: an element of one particle has no counterpart in another that is looped."""
    num, size = 4 * COPIES, 2 * COPIES

    def model():
        with pyro.plate("copies", num, subsample_size=size) as i:
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=2.0 * (i % 4))

    def guide():
        with pyro.plate("copies", num, subsample_size=size) as i:
            pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 2)[i]).to_event(1), infer={"topk": 0})

    samples = gradient(topk(**PARTICLES[particles]), Case(model, guide))["q"].reshape(COPIES, 4, 2)
    for row in range(4):
        pyro.clear_param_store()
        one = Case(*(_row(f, row) for f in ("model", "guide")))
        expected = exact_gradient(one)["q"][0]
        assert_unbiased(samples[:, row], expected, detect=0.5, scale=1.0)


def _row(name, row):
    def model():
        with pyro.plate("copies", 1):
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor([2.0 * row]))

    def guide():
        with pyro.plate("copies", 1):
            pyro.sample("b", dist.Bernoulli(logits=copies("q", 1, 2)).to_event(1), infer={"topk": 0})

    return model if name == "model" else guide


def test_gamma_against_its_closed_form():
    """KL of Gamma(a, 1) and Gamma(2, 1), whose derivative is (a - 2) trigamma(a)."""

    def model():
        with pyro.plate("copies", COPIES):
            pyro.sample("g", dist.Gamma(2.0, 1.0))

    def guide():
        with pyro.plate("copies", COPIES):
            pyro.sample("g", NonreparameterizedGamma(positive("a", *[1.5] * COPIES), torch.ones(COPIES)))

    expected = -0.5 * torch.polygamma(1, torch.tensor(1.5)) * 1.5
    for particles in ("looped", "vectorized", "none"):
        assert_unbiased(gradient(topk(**PARTICLES[particles]), Case(model, guide))["a"], expected, detect=1.0)


@pytest.mark.parametrize("particles", ["looped", "vectorized"])
def test_by_hand(particles):
    """kappa_p = f_p - (sum of the others) / (P - 1), for each element of the plate."""
    case, num = vector(5), 3
    elbo = topk(**PARTICLES[particles])
    pyro.set_rng_seed(1)
    traces = [guide for _, guide in elbo._get_traces(case.model, case.guide, (), {})]
    values = torch.stack([trace.nodes["b"]["value"] for trace in traces]).reshape(num, 5, 3)
    pyro.set_rng_seed(1)
    actual = gradient(elbo, case)["q"]
    q = pyro.param("q")
    log_q = dist.Bernoulli(logits=q).log_prob(values).sum(-1)
    log_p = dist.Bernoulli(0.4 * torch.ones(3)).log_prob(values).sum(-1)
    log_p = log_p + dist.Normal((values * torch.tensor([1.0, 2.0, 3.0])).sum(-1), 1.0).log_prob(torch.tensor(2.0))
    f = (log_p - log_q).detach()
    kappa = f - (f.sum(0) - f) / (num - 1)
    (expected,) = torch.autograd.grad(-(kappa * log_q).sum() / num, q)
    torch.testing.assert_close(actual, expected)


class _Posterior(Messenger):
    """Makes a guide a model whose posterior it is, with an evidence of e to the 5."""

    def _pyro_post_param(self, msg):
        msg["value"] = msg["value"].detach()

    def _pyro_sample(self, msg):
        if msg["name"] == "b":
            fn, msg["fn"] = msg["fn"], copy(msg["fn"])
            msg["fn"].log_prob = lambda value: fn.log_prob(value) + 5.0


@pytest.mark.parametrize("particles", ["looped", "vectorized"])
@pytest.mark.parametrize("name", ["vector", "after slots", "between slots", "after a loop"])
def test_no_noise_at_the_posterior(name, particles):
    """All costs are the same, and that is not 0."""
    guide = CASES[name](4).guide

    grads = gradient(topk(**PARTICLES[particles]), Case(_Posterior()(guide), guide))
    torch.testing.assert_close(grads, {n: torch.zeros_like(g) for n, g in grads.items()})


def test_entrances_agree():
    for name in CASES:
        for particles in PARTICLES.values():
            pyro.clear_param_store()
            case, elbo = CASES[name](2), topk(**particles)
            pyro.set_rng_seed(0)
            loss = elbo.loss_and_grads(case.model, case.guide)
            actual = {n: p.grad for n, p in case.parameters().items() if p.grad is not None}
            pyro.set_rng_seed(0)
            expected = gradient(elbo, case)
            torch.testing.assert_close(actual, {n: expected[n] for n in actual})
            pyro.set_rng_seed(0)
            assert loss == pytest.approx(elbo.loss(case.model, case.guide))


def test_variance_on_a_binary_autoencoder():
    """At four evaluations the gradient is that of leave-one-out written by hand."""
    num, size = 10, 30
    x = (torch.rand(num, size) < 0.3).double()
    encoder, decoder = torch.nn.Linear(size, size), torch.nn.Linear(size, size)

    def model(x):
        with pyro.plate("data", num):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(size)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", num):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    class ByHand(Trace_ELBO):
        def differentiable_loss(self, *call):
            (pair,) = self._get_traces(*call, {})
            log_p, log_q = (
                sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site) for trace in pair
            )
            f = (log_p - log_q).detach()
            kappa = f - (f.sum(0) - f) / 3
            return -(log_p + kappa * log_q).mean(0).sum()

    def draw(elbo, num_samples, *call):
        pyro.set_rng_seed(0)
        grads = []
        for _ in range(num_samples):
            loss = elbo.differentiable_loss(model, guide, *call)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(encoder.parameters()))]))
        return torch.stack(grads)

    particles = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    ours = draw(RaoBlackwellTopK_ELBO(**particles), 60, x)
    torch.testing.assert_close(ours, draw(ByHand(**particles), 60, (x,)))
    assert_variance_ratio(ours, draw(Trace_ELBO(**particles), 60, x), below=0.02)
    looped = draw(RaoBlackwellTopK_ELBO(num_particles=4, max_plate_nesting=1), 60, x)
    assert_variance_ratio(looped, ours, below=1.5)
