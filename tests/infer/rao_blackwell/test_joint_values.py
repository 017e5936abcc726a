# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Several discrete variables as one site by ``to_event``: their joint values."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_rb import RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO
from pyro_rb.poutine.topk_table import IN_A_PLATE, TableTooLarge, find_table
from tests.infer.rao_blackwell.models import fixed, parameter
from tests.infer.topk.models import gradient
from tests.support.cases import Case
from tests.support.common import assert_unbiased, assert_variance_ratio


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- Tables ------------------------------------------------------------------------------


class Dice(dist.TorchDistribution):
    """Of a shape that is a tuple, as those of some distributions of Pyro."""

    arg_constraints = {}
    has_enumerate_support = True

    def __init__(self, logits):
        self.logits = logits.log_softmax(-1)
        super().__init__(tuple(logits.shape[:-1]), validate_args=False)

    def enumerate_support(self, expand=True):
        return torch.arange(1.0, 7.0).reshape((6,) + (1,) * len(self.batch_shape))

    def log_prob(self, value):
        logits, value = torch.broadcast_tensors(self.logits, value.long().unsqueeze(-1))
        return logits.gather(-1, value[..., :1] - 1).squeeze(-1)


EVENTS = {
    "Dice": lambda: Dice(fixed(3, 2, 6)).to_event(1),
    "Bernoulli": lambda: dist.Bernoulli(logits=fixed(4)).to_event(1),
    "Categorical": lambda: dist.Categorical(logits=fixed(2, 3, 4)).to_event(1),
    "OneHotCategorical": lambda: dist.OneHotCategorical(logits=fixed(5, 2, 3)).to_event(1),
    "Binomial": lambda: dist.Binomial(2, logits=fixed(3)).to_event(1),
    "matrix": lambda: dist.Categorical(logits=fixed(2, 3, 2)).to_event(2),
    "twice": lambda: dist.OneHotCategorical(logits=fixed(3, 2, 2, 2)).to_event(1).to_event(1),
    "expanded": lambda: dist.Categorical(logits=fixed(3)).expand([4, 2]).to_event(1),
    "expanded event": lambda: dist.Bernoulli(logits=fixed(3)).to_event(1).expand([2]),
    "one variable": lambda: dist.Categorical(logits=fixed(1, 3)).to_event(1),
}


@pytest.mark.parametrize("name", EVENTS)
def test_table(name):
    fn = EVENTS[name]()
    table = find_table(fn)
    num = table.num_categories
    values = table.values(torch.arange(num).expand(fn.batch_shape + (num,)))
    assert values.shape == (num,) + fn.batch_shape + fn.event_shape
    assert len(values.reshape(num, -1).unique(dim=0)) == num
    log_q = table.log_q.expand(fn.batch_shape + (num,))
    torch.testing.assert_close(log_q.movedim(-1, 0), fn.log_prob(values))
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(fn.batch_shape))


def test_a_table_is_made_up_to_a_limit():
    assert find_table(dist.Bernoulli(0.5 * torch.ones(2, 15)).to_event(1)).num_categories == 2**15
    for fn in (
        dist.Bernoulli(0.5 * torch.ones(3, 15)),
        dist.Bernoulli(0.5 * torch.ones(10000)),
        dist.Categorical(torch.ones(11, 3)),
    ):
        with pytest.raises(TableTooLarge, match=f"too many joint values of .* variables; {IN_A_PLATE[:11]}"):
            find_table(fn.to_event(1))


# -- Gradients ---------------------------------------------------------------------------

NUM_TASKS, NUM_CLUSTERS = 3, 2


def couples(z):
    """A cost of which no task has a part of its own."""
    return (z * fixed(NUM_TASKS, NUM_CLUSTERS, seed=3)).sum((-1, -2)) + 2.0 * z[..., 0].prod(-1)


def clusters(num, kind="OneHotCategorical", infer=None):
    """Tasks belong to clusters, whose functions are Gaussian sites after them."""
    one_hot = torch.eye(NUM_CLUSTERS)

    def sample(logits, infer):
        fn = getattr(dist, kind)(logits=logits).to_event(1)
        z = pyro.sample("z", fn, infer=infer)
        return z if kind == "OneHotCategorical" else one_hot[z.long()]

    def model():
        with pyro.plate("copies", num, dim=-2):
            z = sample(torch.zeros(NUM_TASKS, NUM_CLUSTERS), {})
            with pyro.plate("data", 2, dim=-1):
                f = pyro.sample("f", dist.Normal(couples(z), 1.0))
                pyro.sample("x", dist.Normal((f.unsqueeze(-1) * z[..., 0]), 1.0).to_event(1), obs=fixed(2, 3, seed=5))

    def guide():
        def copied(name, value):
            return pyro.param(name, lambda: value.expand((num, 1) + value.shape).clone())

        logits = copied("logits", fixed(NUM_TASKS, NUM_CLUSTERS, seed=4))
        loc, slope = (pyro.param(n, lambda s=s: fixed(2, seed=s).expand(num, 2).clone()) for n, s in LOCS.items())
        with pyro.plate("copies", num, dim=-2):
            z = sample(logits, infer or {})
            with pyro.plate("data", 2, dim=-1):
                pyro.sample("f", dist.Normal(loc + slope * couples(z), 0.8))

    return Case(model, guide)


LOCS = {"loc": 6, "slope": 7}


def exact():
    """Sums over the values of each task, and integrates the Gaussian sites in closed form."""
    pyro.clear_param_store()
    logits = fixed(NUM_TASKS, NUM_CLUSTERS, seed=4).requires_grad_()
    loc, slope = (fixed(2, seed=s).requires_grad_() for s in LOCS.values())
    log_q, total = logits.log_softmax(-1), 0.0
    x = fixed(2, 3, seed=5)
    for which in itertools.product(range(NUM_CLUSTERS), repeat=NUM_TASKS):
        z = torch.eye(NUM_CLUSTERS)[list(which)]
        log_prob = (log_q * z).sum()
        mean, var, prior = loc + slope * couples(z), 0.8**2, couples(z)
        kl = 0.5 * (var + (mean - prior) ** 2 - 1.0) - torch.tensor(0.8).log()
        first = z[:, 0]
        fit = 0.5 * ((mean.unsqueeze(-1) * first - x) ** 2 + var * first).sum()
        cost = log_prob + NUM_TASKS * torch.tensor(float(NUM_CLUSTERS)).log() + kl.sum() + fit
        total = total + log_prob.exp() * cost
    grads = torch.autograd.grad(total, (logits, loc, slope))
    return {"logits": grads[0], "loc": grads[1], "slope": grads[2]}


SETTINGS = {
    "all": ({}, {}, "exact"),
    "budget": ({"sum_up_to": 0}, {}, "top-k"),
    "k": ({"k": 2, "num_samples": 1}, {}, "top-k, k = 2"),
    "none": ({"sum_up_to": 0, "baseline": None}, {}, "top-k"),
    "probe": ({"sum_up_to": 0, "baseline": "reinforce+"}, {}, "top-k"),
    "draws": ({}, {"draws": 2}, "several draws"),
    "asked": ({}, {"topk": 3}, "top-k, k = 3"),
    "single": ({}, {"topk": 0}, "single draw"),
}


@pytest.mark.parametrize("kind", ["OneHotCategorical", "Categorical"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_unbiased(setting, kind):
    options, infer, treatment = SETTINGS[setting]
    num, expected = 3000, exact()
    elbo = RaoBlackwell_ELBO(max_plate_nesting=2, **options)
    pyro.clear_param_store()
    grads = gradient(elbo, clusters(num, kind, infer))
    assert elbo.report()[0].treatment.startswith(treatment)
    samples = {name: grads[name].reshape((num,) + expected[name].shape) for name in expected}
    assert_unbiased(samples, expected, detect=2.0 if setting == "single" else 0.5)


OF_BITS = [{"k": 2}, {"budget": 4}, {"k": 0, "num_samples": 3}, {"draws": 1, "sum_up_to": 0}]


@pytest.mark.parametrize("options", OF_BITS, ids=str)
def test_bits_of_which_some_are_looked_at(options):
    num, prior = 2000, torch.tensor([0.2, 0.5, 0.6, 0.9])

    def cost(z):
        log_prior = dist.Bernoulli(prior).log_prob(z).sum(-1)
        return -log_prior - dist.Normal(z.sum(-1) + 2 * z.prod(-1), 0.5).log_prob(torch.tensor(1.0))

    def model(num):
        with pyro.plate("replicates", num):
            z = pyro.sample("z", dist.Bernoulli(prior).to_event(1))
            loc = z.sum(-1) + 2 * z.prod(-1)
            pyro.sample("x", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))

    def guide(num):
        logits = parameter(num, "logits", fixed(4))
        with pyro.plate("replicates", num):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    elbo = RaoBlackwell_ELBO(max_plate_nesting=1, **options)
    samples = gradient(elbo, Case(model, guide, (num,)))
    assert elbo.report()[0].treatment.startswith("top-k")
    logits = fixed(4).requires_grad_()
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    log_q = dist.Bernoulli(logits=logits).log_prob(z).sum(-1)
    (expected,) = torch.autograd.grad((log_q.exp() * (cost(z) + log_q)).sum(), logits)
    assert_unbiased(samples, {"logits": expected}, detect=0.3)


def test_particles():
    expected = exact()
    pyro.clear_param_store()
    elbo = RaoBlackwell_ELBO(max_plate_nesting=2, num_particles=2, vectorize_particles=True)
    grads = gradient(elbo, clusters(2000))
    samples = {name: grads[name].reshape((2000,) + expected[name].shape) for name in expected}
    assert_unbiased(samples, expected, detect=0.5)


def test_all_joint_values_have_no_noise_of_their_own():
    """Where nothing else is drawn the gradient is exact."""
    logits = fixed(NUM_TASKS, NUM_CLUSTERS, seed=4)

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(NUM_TASKS, NUM_CLUSTERS)).to_event(1))
        pyro.factor("cost", couples(z))

    def guide():
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("logits", logits.clone())).to_event(1))

    actual = gradient(RaoBlackwell_ELBO(), Case(model, guide))["logits"]
    q = logits.clone().requires_grad_()
    total = 0.0
    for which in itertools.product(range(NUM_CLUSTERS), repeat=NUM_TASKS):
        z = torch.eye(NUM_CLUSTERS)[list(which)]
        log_q = (q.log_softmax(-1) * z).sum()
        total = total + log_q.exp() * (log_q + NUM_TASKS * torch.tensor(2.0).log() - couples(z))
    torch.testing.assert_close(actual, torch.autograd.grad(total, q)[0])


def test_a_matrix_that_depends_on_another_site():
    """With more plates elsewhere: Pyro compares its shape to that of the model without dims of the event."""
    prior, costs = fixed(3, NUM_CLUSTERS, seed=8), fixed(2, 3, NUM_CLUSTERS, seed=9)

    def model():
        g = pyro.sample("g", dist.Categorical(logits=torch.zeros(2)))
        z = pyro.sample("z", dist.OneHotCategorical(logits=prior).to_event(1))
        with pyro.plate("data", 4):
            pyro.factor("cost", (costs[g] * z).sum((-1, -2)))

    def guide():
        g = pyro.sample("g", dist.Categorical(logits=pyro.param("g_logits", fixed(2, seed=1))))
        logits = pyro.param("logits", fixed(2, 3, NUM_CLUSTERS, seed=2))
        pyro.sample("z", dist.OneHotCategorical(logits=logits[g]).to_event(1))

    pyro.clear_param_store()
    actual = gradient(RaoBlackwell_ELBO(max_plate_nesting=1), Case(model, guide))
    logits = {"g_logits": fixed(2, seed=1).requires_grad_(), "logits": fixed(2, 3, 2, seed=2).requires_grad_()}
    log_g, log_z = (x.log_softmax(-1) for x in logits.values())
    cost = log_z - prior.log_softmax(-1) - 4 * costs
    total = (log_g.exp() * (log_g + (log_z.exp() * cost).sum((-1, -2)))).sum()
    expected = torch.autograd.grad(total, list(logits.values()))
    torch.testing.assert_close(actual, dict(zip(logits, expected)))


def test_other_shapes_of_a_matrix_raise():
    def model():
        pyro.sample("z", dist.Bernoulli(torch.full((3, 2), 0.5)).to_event(2))

    def guide():
        pyro.sample("z", dist.Bernoulli(torch.full((2, 2), 0.5)).to_event(2))

    with pytest.raises(ValueError, match="shapes disagree at site 'z'"):
        RaoBlackwell_ELBO(max_plate_nesting=1).loss(model, guide)


def test_less_variance_than_a_single_draw():
    variances = []
    for infer in ({}, {"draws": 2}):
        pyro.clear_param_store()
        variances.append(gradient(RaoBlackwell_ELBO(max_plate_nesting=2), clusters(2000, infer=infer))["logits"])
    assert_variance_ratio(*(v.flatten(1) for v in variances), below=0.3)


# -- Report ------------------------------------------------------------------------------


def reason(fn, loss=RaoBlackwell_ELBO, infer=None, **options):
    def guide():
        pyro.sample("z", fn, infer=infer or {})

    elbo = loss(max_plate_nesting=0, **options)
    elbo.loss_and_grads(poutine.block(guide, hide_types=["param"]), guide)
    return elbo.report()[0].reason


def test_report():
    few, many = (dist.OneHotCategorical(logits=fixed(n, 3)).to_event(1) for n in (3, 4))
    assert reason(few) == "27 of 27 joint values"
    assert reason(many) == f"3 of 81 joint values; {IN_A_PLATE}"
    assert reason(many, sum_up_to=81) == "81 of 81 joint values"
    assert reason(many, infer={"topk": {"sum_up_to": 81}}) == "81 of 81 joint values"
    assert reason(many, infer={"draws": 4}) == f"4 draws: 81 joint values; {IN_A_PLATE}"
    assert reason(many, RaoBlackwellTopK_ELBO) == f"2 of 81 joint values; {IN_A_PLATE}"
    large = dist.OneHotCategorical(logits=fixed(30, 3)).to_event(1)
    assert reason(large) == f"2 draws: too many joint values of 30 variables; {IN_A_PLATE}"
    counts = dist.Poisson(torch.ones(3)).to_event(1)
    assert reason(counts) == f"2 draws: 3 variables without a largest value; {IN_A_PLATE}"
    zeros = dist.ZeroInflatedPoisson(torch.ones(3), gate=torch.tensor(0.3)).to_event(1)
    assert reason(zeros) == "2 draws: no enumerable support"
    for one in (dist.Categorical(logits=fixed(3, 1)), dist.Binomial(0, logits=fixed(3)), dist.Bernoulli(fixed(0))):
        assert reason(one.to_event(1)) == "one value"  # which is not looked at twice


def test_bits():
    """Pairs, unless all joint values are summed, or the user asks for some."""
    few, many = (dist.Bernoulli(logits=fixed(n)).to_event(1) for n in (5, 6))
    assert reason(few) == "32 of 32 joint values"
    assert reason(few, infer={"antithetic": True}) == f"2 antithetic draws: 32 joint values; {IN_A_PLATE}"
    assert reason(many) == f"2 antithetic draws: 64 joint values; {IN_A_PLATE}"
    assert reason(many, infer={"topk": {"k": 3}}) == f"4 of 64 joint values; {IN_A_PLATE}"
    assert reason(many, RaoBlackwellTopK_ELBO) == f"2 of 64 joint values; {IN_A_PLATE}"
    for options in ({"k": 3}, {"budget": 4}, {"k": 0, "num_samples": 4}):
        assert reason(many, **options) == f"4 of 64 joint values; {IN_A_PLATE}"
    assert reason(many, sum_up_to=33) == f"2 antithetic draws: 64 joint values; {IN_A_PLATE}"
    assert reason(many, draws=1) == f"3 of 64 joint values; {IN_A_PLATE}"
    assert reason(few, RaoBlackwellTopK_ELBO, k=31) == "32 of 32 joint values"
