# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The mean and the variance of the gradient, by sampling.

Each sample is the mean over many particles, so that it is near to normal even where
rare categories carry the gradient, and random projections are tested.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.infer.topk.models import (
    ENUMERABLE,
    NOISY,
    enumerated,
    exact_gradient,
    fixed,
    gradient,
    mixture,
    one_site,
    table,
)
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased, assert_variance_ratio

pytestmark = pytest.mark.slow

PARTICLES = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 2}
SETTINGS = {
    "k1_none": {"k": 1, "baseline": None},
    "k1_loo": {"k": 1},
    "k0_n2_loo": {"k": 0, "num_samples": 2},
    "k1_n2_loo": {"k": 1, "num_samples": 2},
    "budget3_none": {"budget": 3, "baseline": None},
    "budget3_loo": {"budget": 3},
    "k1_reinforce+": {"k": 1, "baseline": "reinforce+"},
    "k0_reinforce+": {"k": 0, "baseline": "reinforce+"},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def draw(elbo, case, num_samples, seed=0):
    """Name -> ``[num_samples, *shape]``."""
    pyro.set_rng_seed(seed)
    with pyro.validation_enabled(False):
        rows = [gradient(elbo, case) for _ in range(num_samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ENUMERABLE)
def test_unbiased(name, setting):
    case = ENUMERABLE[name]()
    samples = draw(RaoBlackwellTopK_ELBO(**SETTINGS[setting], **PARTICLES), case, 16)
    assert_unbiased(samples, exact_gradient(case), projections=10, detect=1.0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NOISY)
def test_unbiased_beside_other_noise(name, setting):
    case = NOISY[name]()
    samples = draw(RaoBlackwellTopK_ELBO(**SETTINGS[setting], **PARTICLES), case, 40)
    reference = TraceEnum_ELBO(strict_enumeration_warning=False, **PARTICLES)
    expected = draw(reference, enumerated(case), 40, seed=1)
    assert_unbiased(samples, independent=expected, projections=10, detect=1.0)


@pytest.mark.parametrize("setting", ["k1_loo", "budget3_none"])
def test_looped_particles(setting):
    case = mixture()
    samples = draw(RaoBlackwellTopK_ELBO(**SETTINGS[setting], num_particles=4), case, 150)
    assert_unbiased(samples, exact_gradient(case), projections=10, detect=1.0)


# -- Countable supports, with closed forms -------------------------------------------


def kl_case(prior, posterior):
    """KL(q || p), no data."""

    def model():
        pyro.sample("z", prior())

    def guide():
        pyro.sample("z", posterior())

    return Case(model, guide)


def poisson():
    case = kl_case(lambda: dist.Poisson(4.0), lambda: dist.Poisson(positive("rate", 2.5)))
    rate = pyro.param("rate")
    return case, rate * (rate / 4.0).log() - rate + 4.0


def geometric():
    case = kl_case(lambda: dist.Geometric(0.3), lambda: dist.Geometric(logits=real("logit", 0.2)))
    p = pyro.param("logit").sigmoid()
    mean = (1 - p) / p
    return case, (p / 0.3).log() + mean * ((1 - p) / 0.7).log()


def negative_binomial():
    case = kl_case(
        lambda: dist.NegativeBinomial(3.0, torch.tensor(0.5)),
        lambda: dist.NegativeBinomial(3.0, logits=real("logit", -0.3)),
    )
    p = pyro.param("logit").sigmoid()
    return case, 3.0 * p / (1 - p) * (p / 0.5).log() + 3.0 * ((1 - p) / 0.5).log()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", [poisson, geometric, negative_binomial])
def test_countable(make, setting):
    case, loss = make()
    (name, parameter), = case.parameters().items()
    expected = torch.autograd.grad(loss, parameter)[0]
    samples = draw(RaoBlackwellTopK_ELBO(**SETTINGS[setting], **PARTICLES), case, 16)
    assert_unbiased(samples, {name: expected}, detect=1.0)


@pytest.mark.parametrize("make", [poisson, geometric, negative_binomial])
def test_whole_window_is_exact(make):
    case, loss = make()
    actual = gradient(RaoBlackwellTopK_ELBO(k=300), case)
    expected = torch.autograd.grad(loss, list(case.parameters().values()))
    torch.testing.assert_close(list(actual.values()), list(expected), rtol=1e-7, atol=1e-7)


# -- Pyro's own baselines ------------------------------------------------------------


class Average(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.weight * x.sum(-1)


def with_baseline(case, **options):
    def infer(site):
        return {"baseline": options} if site["name"] == "z" else {}

    return Case(case.model, pyro.poutine.infer_config(case.guide, infer), case.args)


@pytest.mark.parametrize("site", [None, 0, {"k": 0, "num_samples": 2}, 2])
@pytest.mark.parametrize("kind", ["decaying", "value"])
def test_own_baseline_is_unbiased(kind, site):
    case = mixture()
    expected = exact_gradient(case)
    if kind == "decaying":
        options = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
    else:
        options = {"baseline_value": torch.full((100, 1, 4), -3.0)}
    case = with_baseline(case, **options)
    if site is not None:
        guide = case.guide
        case.guide = pyro.poutine.infer_config(guide, lambda s: {"topk": site} if s["name"] == "z" else {})
    elbo = RaoBlackwellTopK_ELBO(**PARTICLES)
    samples = draw(elbo, case, 16)
    assert "infer={'baseline': ...}" in elbo.report()[0].reason
    samples = {name: samples[name] for name in expected}
    assert_unbiased(samples, expected, projections=10, detect=1.0)


def test_own_baseline_is_trace_graphs_on_a_plain_draw():
    """One site in a plate on which every cost depends: then both subtract the same."""
    case = one_site()
    grads = []
    for elbo in (RaoBlackwellTopK_ELBO(k=0, max_plate_nesting=0), TraceGraph_ELBO(max_plate_nesting=0)):
        pyro.clear_param_store()
        own = with_baseline(one_site(), use_decaying_avg_baseline=True)
        pyro.set_rng_seed(0)
        for _ in range(5):
            parameters = own.parameters()
            for p in parameters.values():
                p.grad = None
            elbo.loss_and_grads(own.model, own.guide, *own.args)
        grads.append({name: p.grad for name, p in parameters.items()})
        averages = pyro.param("__baseline_avg_downstream_cost_z")
        grads[-1]["average"] = averages.detach()
    torch.testing.assert_close(*grads)
    assert case.args == ()


def test_network_of_a_baseline_learns():
    network = Average()
    case = with_baseline(one_site(), nn_baseline=network, nn_baseline_input=torch.ones(2))
    before = network.weight.item()
    for elbo in (RaoBlackwellTopK_ELBO(), RaoBlackwellTopK_ELBO(k=0)):
        loss = elbo.differentiable_loss(case.model, case.guide)
        grad, = torch.autograd.grad(loss, network.weight, retain_graph=True)
        # d (cost - 2 w)^2 / dw = -4 (cost - 2 w), where the cost is about minus the loss.
        assert grad != 0
        pyro.set_rng_seed(0)
        value = elbo.differentiable_loss(case.model, case.guide).detach()
        pyro.set_rng_seed(0)
        assert value == pytest.approx(elbo.loss(case.model, case.guide), rel=1e-12)
    assert network.weight.item() == before


def test_baseline_of_the_wrong_shape():
    case = with_baseline(mixture(), baseline_value=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"baseline at site z to be torch.Size\(\[4\]\)"):
        RaoBlackwellTopK_ELBO().differentiable_loss(case.model, case.guide, *case.args)


def test_own_baseline_is_ignored_at_exact_sites():
    case = mixture()
    expected = exact_gradient(case)
    case = with_baseline(case, use_decaying_avg_baseline=True)
    torch.testing.assert_close(gradient(RaoBlackwellTopK_ELBO(k=5), case), expected)


def test_baseline_of_a_reparameterised_site_changes_nothing():
    def guide():
        pyro.sample("n", dist.Normal(real("loc", 0.3), 1.0), infer={"baseline": {"use_decaying_avg_baseline": True}})
        pyro.sample("z", dist.Categorical(logits=table("logits", 5)))

    def model():
        n = pyro.sample("n", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Categorical(torch.ones(5)))
        pyro.sample("x", dist.Normal(n + z, 1.0), obs=torch.tensor(0.0))

    samples = draw(RaoBlackwellTopK_ELBO(**PARTICLES), Case(model, guide), 40)
    expected = draw(TraceEnum_ELBO(**PARTICLES), enumerated(Case(model, guide)), 40, seed=1)
    assert_unbiased(samples, independent=expected, projections=5, detect=1.0)


# -- Variance -------------------------------------------------------------------------


def gaussian_mixture(num_points=200, num_components=10):
    """The data and size of the paper's example; locations and guide part of the way."""
    same = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    locs = 5.0 * torch.randn(num_components, 2, **same)
    labels = torch.randint(num_components, (num_points,), **same)
    x = locs[labels] + torch.randn(num_points, 2, **same)
    start = locs + torch.randn(num_components, 2, **same)
    x, start = x.to(torch.empty(0)), start.to(torch.empty(0))
    logits = -0.1 * (x.unsqueeze(1) - start).square().sum(-1)

    def model(x):
        centers = pyro.param("locs", lambda: start.clone())
        with pyro.plate("data", num_points):
            z = pyro.sample("z", dist.Categorical(torch.ones(num_components)))
            pyro.sample("x", dist.Normal(centers[z], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", num_points):
            pyro.sample("z", dist.Categorical(logits=pyro.param("logits", lambda: logits.clone())))

    return Case(model, guide, (x,))


def mean_of(num):
    return Trace_ELBO(num_particles=num, vectorize_particles=True, max_plate_nesting=1)


def test_variance_on_the_mixture():
    """At four evaluations: issue targets a ratio of at least 40 for budget and loo."""
    case = gaussian_mixture()
    plain = draw(mean_of(4), case, 200)
    none = draw(RaoBlackwellTopK_ELBO(budget=4, baseline=None), case, 200)
    loo = draw(RaoBlackwellTopK_ELBO(budget=4), case, 200)
    assert_variance_ratio(loo, plain, below=1 / 30)
    assert_variance_ratio(loo, none, below=0.5)
    assert_variance_ratio(none, plain, below=0.25)
    assert_unbiased(loo, exact_gradient(case), projections=10, detect=1.0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_one_draw_of_the_complement_is_better_than_a_plain_one(k):
    """Proposition 1: at most the mass of the complement, times."""
    num, cost, logits = 4000, fixed(6), table("start", 6).detach()

    def model():
        with pyro.plate("copies", num):
            z = pyro.sample("z", dist.Categorical(logits=fixed(6, seed=1)))
            pyro.sample("x", dist.Normal(cost[z], 1.3), obs=torch.tensor(0.7))

    def guide():
        """Parameters of its own for each copy: as many gradients in one call."""
        with pyro.plate("copies", num):
            pyro.sample("z", dist.Categorical(logits=pyro.param("logits", lambda: logits.repeat(num, 1))))

    case = Case(model, guide)
    plain = gradient(TraceEnum_ELBO(strict_enumeration_warning=False), case)["logits"]
    ours = gradient(RaoBlackwellTopK_ELBO(k=k, baseline=None), case)["logits"]
    complement = logits.softmax(-1).sort(descending=True).values[k:].sum().item()
    assert_variance_ratio(ours, plain, below=1.25 * complement)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_budget_is_never_worse_than_averaging(scale):
    case = gaussian_mixture()
    with torch.no_grad():
        pyro.param("logits").mul_(scale)
    plain = draw(mean_of(3), case, 200)
    assert_variance_ratio(draw(RaoBlackwellTopK_ELBO(budget=3, baseline=None), case, 200), plain, below=1.2)


@pytest.mark.parametrize(
    "options, evaluations",
    [({}, 2), ({"k": 3}, 4), ({"num_samples": 3}, 4), ({"budget": 3}, 3), ({"k": 2, "baseline": "reinforce+"}, 4)],
)
def test_number_of_evaluations(options, evaluations):
    network, seen = torch.nn.Embedding(10, 2), []
    network.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(10)))
            pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=torch.zeros(3, 2))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Categorical(logits=table("logits", 3, 10)))

    elbo = RaoBlackwellTopK_ELBO(max_plate_nesting=1, **options)
    elbo.loss(model, guide)
    assert seen == [(evaluations, 3)]


# -- Training --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"k": 1}, {"budget": 3}, {"k": 1, "baseline": "reinforce+"}])
def test_svi_finds_the_posterior(options):
    case = gaussian_mixture(num_points=30, num_components=6)
    elbo = RaoBlackwellTopK_ELBO(**options)
    svi = SVI(case.model, case.guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.995}), elbo)
    for _ in range(400):
        svi.step(*case.args)
    # The best that any guide can do with these locations.
    locs = pyro.param("locs").detach()
    log_joint = dist.Normal(locs, 1.0).to_event(1).log_prob(case.args[0].unsqueeze(1))
    best = -(log_joint - torch.tensor(6.0).log()).logsumexp(-1).sum()
    exact = TraceEnum_ELBO().loss(case.model, enumerated(case).guide, *case.args)
    assert best - 1e-6 <= exact <= best + 1.0
