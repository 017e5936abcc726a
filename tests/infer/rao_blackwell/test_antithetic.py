# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Antithetic pairs at vectors of bits: the default for two draws."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_rb import RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO
from pyro_rb.poutine import topk_table
from tests.infer.rao_blackwell.models import (
    PROBLEMS,
    Problem,
    case,
    data,
    first_row,
    fixed,
    gradient,
    parameter,
    pick,
    positive,
    replicates,
    score_function,
)
from tests.ops.test_antithetic import cells
from tests.support.cases import real
from tests.support.common import assert_unbiased, assert_variance_ratio

X = ((0.5, -1.0), (1.2, 0.3), (-0.7, 2.0))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def with_options(problem, **infer):
    def make(num):
        made = problem.make(num)
        made.guide = poutine.infer_config(made.guide, lambda site: infer if site["name"] == "b" else {})
        return made

    return replace(problem, make=make)


def check(problem, expected, detect=0.4, site="b", **options):
    # Joint values of so few bits would be summed.
    elbo = RaoBlackwell_ELBO(max_plate_nesting=problem.nesting, sum_up_to=0, **options)
    rows = problem.draw(elbo, num_burn_in=3)
    (row,) = (row for row in elbo.report() if row.site == site)
    assert "antithetic" in row.reason
    assert_unbiased(rows, expected, projections=40, detect=detect)


# -- Exact, cell by cell -----------------------------------------------------------------

PROBS = (0.2, 0.5, 0.9)


def vector(num, by="logits"):
    loc = torch.tensor([1.0, 2.0, -1.0])

    def model(num):
        with replicates(num, -1):
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(b @ loc + 2 * b[..., 0] * b[..., 1], 1.0), obs=torch.tensor(1.5))

    def guide(num):
        probs = torch.tensor(PROBS)
        value = parameter(num, by, probs.logit() if by == "logits" else probs)
        with replicates(num, -1):
            pyro.sample("b", dist.Bernoulli(**{by: value}).to_event(1))

    return case(model, guide, num)


@pytest.mark.parametrize("by", ["logits", "probs"])
def test_mean_over_all_cells(by, monkeypatch):
    """Replicates are the cells of the uniform numbers, and the weighted sum has no error."""
    uniform, volume = cells(PROBS)
    expected = Problem(lambda num: vector(num, by), 1, {"b": 0}).exact[by]
    made, elbo = vector(len(uniform), by), RaoBlackwell_ELBO(max_plate_nesting=1, sum_up_to=0)
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: uniform.expand(shape))
    grad = gradient(lambda: elbo.differentiable_loss(made.model, made.guide, len(uniform)), made)[by]
    torch.testing.assert_close(volume @ grad, expected, rtol=1e-9, atol=1e-12)


# -- Sites before and after --------------------------------------------------------------


def between(num):
    """z -> b -> y: bits between a Gaussian and a categorical, in a plate, scaled and masked."""
    x, mask = torch.tensor([0.4, -1.0, 2.1]), torch.tensor([True, False, True])

    def model(num):
        prior = parameter(num, "prior", fixed(1, 3, seed=1))
        with poutine.scale(scale=2.5), poutine.mask(mask=mask), replicates(num, -2), data(3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = prior + fixed(3, seed=2) * z.unsqueeze(-1)
            b = pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=3) + b @ fixed(3, 4, seed=4)))
            pyro.sample("x", dist.Normal(z + b.sum(-1) + pick(fixed(4, seed=5), y), 0.9), obs=x)

    def guide(num):
        loc, scale = parameter(num, "loc", 0.5 * fixed(3, seed=6)), positive(num, "scale", torch.full((3,), 0.8))
        bias, slope = parameter(num, "bias", fixed(3, 3, seed=7)), parameter(num, "slope", fixed(3, 3, seed=8))
        table, by_bits = parameter(num, "table", fixed(3, 4, seed=9)), parameter(num, "by_bits", fixed(1, 3, seed=10))
        with poutine.scale(scale=2.5), poutine.mask(mask=mask), replicates(num, -2), data(3):
            z = pyro.sample("z", dist.Normal(loc, scale))
            b = pyro.sample("b", dist.Bernoulli(logits=bias + slope * z.unsqueeze(-1)).to_event(1))
            logits = table + (by_bits * b).sum(-1, keepdim=True) * fixed(4, seed=11)
            pyro.sample("y", dist.Categorical(logits=logits))

    return case(model, guide, num)


def after_a_label(num):
    """y -> b -> z: probabilities of bits by label, outside of a plate inside of which there is a Gaussian."""
    x = fixed(2, seed=1)

    def model(num):
        with replicates(num, -2):
            y = pyro.sample("y", dist.Categorical(torch.ones(4)))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
            with data(2):
                z = pyro.sample("z", dist.Normal(b.sum(-1) + 0.5 * y, 1.0))
                pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(num):
        logits = parameter(num, "logits", fixed(1, 4, seed=2))
        table = parameter(num, "table", fixed(1, 4, 2, seed=3))
        loc, slope = parameter(num, "loc", fixed(2, seed=4)), parameter(num, "slope", fixed(2, seed=5))
        with replicates(num, -2):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            bits = torch.stack([pick(table[..., i], y) for i in range(2)], -1)
            b = pyro.sample("b", dist.Bernoulli(probs=torch.sigmoid(bits)).to_event(1))
            with data(2):
                pyro.sample("z", dist.Normal(loc + slope * b.sum(-1), 0.7))

    return case(model, guide, num)


STRUCTURES = {
    "between": Problem(between, rules={"z": 40, "b": 0}),
    "after_a_label": Problem(after_a_label, rules={"z": 40, "b": 0}),
    "score_function": Problem(score_function, 1, {"g": 300, "b": 0, "z": 10}, 4000),
}
SETTINGS = {
    "default": {},
    "vectorized": {"num_particles": 2, "vectorize_particles": True},
    "path": {"control_variate_scale": 1.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, setting):
    problem = STRUCTURES[name]
    check(problem, problem.exact, detect=0.5, **SETTINGS[setting])


@pytest.mark.parametrize("options", [{}, {"baseline": None}, {"baseline": "reinforce+"}], ids=str)
def test_several_pairs_on_demand(options):
    problem = with_options(STRUCTURES["between"], draws=4, antithetic=True)
    check(problem, STRUCTURES["between"].exact, detect=0.6, **options)


def test_coins_of_a_table_that_is_too_large(monkeypatch):
    """Each element of the plate has a pair of its own."""
    expected = PROBLEMS["nested"].exact
    monkeypatch.setattr(topk_table, "MAX_TABLE", 100)
    check(PROBLEMS["nested"], expected, detect=0.5, control_variate_scale=1.0)


def test_a_chain_of_vectors():
    """Sites in ``markov`` share dims."""

    def make(num, steps):
        def model(num):
            b = torch.zeros(2)
            with replicates(num, -1):
                for t in steps(range(3)):
                    name = f"b_{t}" if t else "b"
                    b = pyro.sample(name, dist.Bernoulli(logits=0.5 * b + fixed(2, seed=t)).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(1.2))

        def guide(num):
            b, bias = torch.zeros(2), [parameter(num, f"bias_{t}", fixed(2, seed=9 + t)) for t in range(3)]
            slope = parameter(num, "slope", torch.tensor([0.8, -0.5]))
            with replicates(num, -1):
                for t in steps(range(3)):
                    name = f"b_{t}" if t else "b"
                    b = pyro.sample(name, dist.Bernoulli(logits=bias[t] + slope * b).to_event(1))

        return case(model, guide, num)

    expected = Problem(lambda num: make(num, iter), 1, {"b": 0, "b_1": 0, "b_2": 0}).exact
    check(Problem(lambda num: make(num, pyro.markov), 1, num=3000), expected)


def test_two_vectors_of_different_events():
    """A matrix of bits, and a vector whose logits depend on it."""

    def make(num):
        def sample(b_logits, c_bias, c_slope):
            b = pyro.sample("b", dist.Bernoulli(logits=b_logits).to_event(2)).sum((-1, -2))
            logits = c_bias + c_slope * b.unsqueeze(-1)
            return b - pyro.sample("c", dist.Bernoulli(logits=logits).to_event(1)) @ torch.tensor([1.0, 2.0])

        def model(num):
            with replicates(num, -1):
                loc = sample(torch.zeros(2, 1), torch.zeros(2), torch.ones(2))
                pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))

        def guide(num):
            logits = parameter(num, "b_logits", fixed(2, 1, seed=1))
            c = [parameter(num, f"c_{i}", fixed(2, seed=2 + i)) for i in range(2)]
            with replicates(num, -1):
                sample(logits, *c)

        return case(model, guide, num)

    def exact():
        """The same, of vectors only."""
        log_p = dist.Bernoulli(logits=torch.zeros(2)).to_event(1)
        made = make(1)
        b_logits, bias, slope = (made.parameters()[n][0] for n in ("b_logits", "c_0", "c_1"))
        bits = torch.cartesian_prod(*[torch.arange(2.0)] * 2)
        b, c = bits.unsqueeze(1), bits.unsqueeze(0)
        total = b.sum(-1, keepdim=True)
        log_q = dist.Bernoulli(logits=b_logits.flatten()).to_event(1).log_prob(b)
        log_q = log_q + dist.Bernoulli(logits=bias + slope * total).to_event(1).log_prob(c)
        log_p = log_p.log_prob(b) + dist.Bernoulli(logits=total).to_event(1).log_prob(c.expand(4, 4, 2))
        log_p = log_p + dist.Normal(b.sum(-1) - c @ torch.tensor([1.0, 2.0]), 1.0).log_prob(torch.tensor(0.5))
        return first_row(gradient(lambda: -(log_q.exp() * (log_p - log_q)).sum(), made))

    check(Problem(make, 1, num=4000), exact())


# -- Variance, options, report -----------------------------------------------------------


def test_less_variance_than_independent_draws():
    problem, elbo = Problem(vector, 1, num=4000), RaoBlackwell_ELBO(max_plate_nesting=1)
    ours, others = (with_options(problem, antithetic=a).draw(elbo) for a in (True, False))
    assert_variance_ratio(ours, others, below=0.75)


def reason(fn, elbo=None, **infer):
    elbo = elbo or RaoBlackwell_ELBO(max_plate_nesting=0)

    def guide():
        pyro.sample("b", fn(real("on", 0.2)), infer=infer)

    with torch.no_grad():
        model = poutine.block(guide, hide_types=["param"])
    elbo.loss_and_grads(model, guide)
    return elbo.report()[0].reason


def bits(x):
    return dist.Bernoulli(logits=x.expand(6)).to_event(1)


def counts(x):
    return dist.Poisson(x.exp().expand(3)).to_event(1)


def test_when_it_is_the_default():
    assert reason(bits).startswith("2 antithetic draws")
    assert reason(bits, draws=4).startswith("4 draws")
    assert reason(bits, draws=4, antithetic=True).startswith("4 antithetic draws")
    assert reason(bits, antithetic=False).startswith("2 draws")
    assert reason(counts).startswith("2 draws")
    assert reason(bits, baseline={"use_decaying_avg_baseline": True}).startswith("2 draws")
    for baseline in (None, "reinforce+"):
        assert reason(bits, RaoBlackwell_ELBO(max_plate_nesting=0, baseline=baseline)).startswith("2 draws")
    assert reason(bits, RaoBlackwellTopK_ELBO(max_plate_nesting=0), draws=2).startswith("2 antithetic draws")


@pytest.mark.parametrize(
    "fn, infer, message",
    [
        (counts, {"antithetic": True}, "'b', of type Independent with draws=2.*Expected a Bernoulli"),
        (bits, {"antithetic": True, "draws": 3}, "'b'.*draws=3.*even number"),
        (bits, {"antithetic": True, "draws": 1}, "'b'.*draws=1.*even number"),
        (bits, {"antithetic": 1}, "Invalid infer={'antithetic': 1} at guide site 'b'"),
        (bits, {"antithetic": True, "baseline": {"use_decaying_avg_baseline": True}}, "'b'.*one of the two"),
    ],
)
def test_options_that_make_no_sense(fn, infer, message):
    with pytest.raises(ValueError, match=message):
        reason(fn, **infer)
