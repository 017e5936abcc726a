# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Variance of the gradient, against that of losses with one treatment for all sites."""

from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_rb import (
    R2G2_ELBO,
    RaoBlackwell_ELBO,
    RaoBlackwellTopK_ELBO,
    STLTrace_ELBO,
)
from tests.infer.rao_blackwell.models import (
    PROBLEMS,
    Problem,
    case,
    fixed,
    parameter,
    positive,
    replicates,
)
from tests.support.common import assert_unbiased, assert_variance_ratio

NUM_BURN_IN = 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def draw(problem, elbo, num=2000):
    return replace(problem, num=num).draw(elbo, NUM_BURN_IN)


# -- A vector of bits, whose values no table holds ---------------------------------------

NUM_BITS, NUM_EVALUATIONS = 30, 4


def decode(z):
    """Logits of the pixels of an image."""
    return z @ fixed(NUM_BITS, 24, seed=1) / NUM_BITS**0.5


def log_densities(z, logits, x):
    """Of model and guide, an element for each image."""
    bits = dist.Bernoulli(torch.full((NUM_BITS,), 0.5)).to_event(1)
    pixels = dist.Bernoulli(logits=decode(z)).to_event(1)
    return bits.log_prob(z) + pixels.log_prob(x), dist.Bernoulli(logits=logits).to_event(1).log_prob(z)


def autoencoder(num):
    """With the logits that an encoder makes as parameters: each replicate is an image."""
    x = (fixed(24, seed=2) > 0).double()

    def model(num):
        with replicates(num, -1):
            z = pyro.sample("z", dist.Bernoulli(torch.full((NUM_BITS,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(num):
        logits = parameter(num, "logits", fixed(NUM_BITS, seed=3))
        with replicates(num, -1):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return case(model, guide, num)


def leave_one_out(num):
    """By hand, over particles, for each image."""
    x = (fixed(24, seed=2) > 0).double()
    logits = fixed(NUM_BITS, seed=3).repeat(num, 1).requires_grad_()
    z = torch.bernoulli(torch.sigmoid(logits.detach()).expand(NUM_EVALUATIONS, num, NUM_BITS))
    log_p, log_q = log_densities(z, logits, x)
    cost = (log_p - log_q).detach()
    advantage = cost - (cost.sum(0) - cost) / (NUM_EVALUATIONS - 1)
    loss = -(advantage * log_q).mean(0).sum()
    return {"logits": torch.autograd.grad(loss, logits)[0]}


@pytest.mark.parametrize(
    "options",
    [{"draws": NUM_EVALUATIONS}, {"draws": 1, "num_particles": NUM_EVALUATIONS, "vectorize_particles": True}],
    ids=["draws", "particles"],
)
def test_bits_are_as_good_as_leave_one_out_by_hand(options):
    num = 4000
    ours = replace(Problem(autoencoder, 1), num=num).draw(RaoBlackwell_ELBO(max_plate_nesting=1, **options))
    by_hand = leave_one_out(num)
    assert_unbiased(ours, independent=by_hand, projections=20, detect=0.3)
    assert_variance_ratio(ours, by_hand, below=1.1)


def test_two_draws_are_much_better_than_one():
    """By default, at twice the evaluations of the model."""
    problem = Problem(autoencoder, 1, num=3000)
    ours, plain = (problem.draw(elbo(max_plate_nesting=1)) for elbo in (RaoBlackwell_ELBO, Trace_ELBO))
    assert_variance_ratio(ours, plain, below=0.25)


def test_draws_of_a_gamma_and_of_bits():
    """One particle with four draws of each site, against four particles."""
    problem, options = replace(PROBLEMS["score_function"], num=4000), {"max_plate_nesting": 1}
    ours = problem.draw(RaoBlackwell_ELBO(draws=4, **options), NUM_BURN_IN)
    plain = problem.draw(Trace_ELBO(num_particles=4, vectorize_particles=True, **options))
    for name, below in (("logits", 0.2), ("a", 0.8)):
        assert_variance_ratio(ours[name], plain[name], below=below)


# -- Discrete and continuous sites -------------------------------------------------------


def enumerated(problem):
    def make(num):
        marked = problem.make(num)
        marked.guide = config_enumerate(marked.guide)
        return marked

    return replace(problem, make=make)


@pytest.mark.parametrize(
    "single, parameter, below",
    [
        (partial(RaoBlackwellTopK_ELBO, budget=3), "scale", 0.9),
        (partial(STLTrace_ELBO, control_variate_scale="adaptive"), "logits", 0.1),
        (R2G2_ELBO, "logits", 0.1),
    ],
    ids=["top-k", "path gradient", "projection"],
)
def test_better_than_each_single_loss(single, parameter, below):
    """In total, and most for the parameters that the single loss does nothing for."""
    problem, options = PROBLEMS["regression"], {"max_plate_nesting": 2}
    ours, theirs = (draw(problem, elbo(**options), 4000) for elbo in (RaoBlackwell_ELBO, single))
    assert_variance_ratio(ours[parameter], theirs[parameter], below=below)
    assert_variance_ratio(ours, theirs, below=1.0)


@pytest.mark.parametrize("name, below", [("chain", 0.5), ("discrete_first", 0.8), ("nested", 0.8)])
def test_all_values_are_better_than_enumeration(name, below):
    """That leaves the noise of continuous sites, and of scores whose mean is zero."""
    problem = replace(PROBLEMS[name], num=1000)
    options = {"max_plate_nesting": problem.nesting}
    ours = problem.draw(RaoBlackwell_ELBO(k=10, **options), NUM_BURN_IN)
    theirs = enumerated(problem).draw(TraceEnum_ELBO(**options))
    assert_variance_ratio(ours, theirs, below=below)


# -- Projection and path gradient at one site --------------------------------------------


def linear(num, width=1.0):
    """A linear regression of 6 rows by 20 weights; the mean-field optimum, ``width`` times as wide."""
    x, y, noise = fixed(6, 20, seed=1), fixed(6, seed=2), 0.5
    precision = torch.eye(20) + x.mT @ x / noise**2
    optimum = torch.linalg.solve(precision, x.mT @ y / noise**2)

    def model(num):
        with replicates(num, -2):
            w = pyro.sample("w", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            with pyro.plate("data", 6):
                pyro.sample("y", dist.Normal((w @ x.mT).squeeze(-2), noise), obs=y)

    def guide(num):
        loc = parameter(num, "loc", optimum.unsqueeze(0))
        scale = positive(num, "scale", width * precision.diagonal().rsqrt().unsqueeze(0))
        with replicates(num, -2):
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return case(model, guide, num)


def linear_problem(width):
    return Problem(lambda num: linear(num, width), rules={"w": 0})


OTHERS = {
    "projection": lambda: R2G2_ELBO(max_plate_nesting=2),
    "path gradient": lambda: STLTrace_ELBO(control_variate_scale="adaptive", max_plate_nesting=2),
    "path gradient, c = 1": lambda: STLTrace_ELBO(control_variate_scale=1.0, max_plate_nesting=2),
}


@pytest.mark.parametrize("other", OTHERS)
def test_better_than_either_at_the_optimum(other):
    problem = linear_problem(1.0)
    ours = draw(problem, RaoBlackwell_ELBO(max_plate_nesting=2))
    assert_variance_ratio(ours, draw(problem, OTHERS[other]()), below=0.5)


@pytest.mark.parametrize("width", [0.2, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("other", ["projection", "path gradient"])
def test_not_worse_than_either_elsewhere(other, width):
    problem = linear_problem(width)
    ours = draw(problem, RaoBlackwell_ELBO(max_plate_nesting=2))
    assert_unbiased(ours, problem.exact, projections=20, detect=0.5)
    assert_variance_ratio(ours, draw(problem, OTHERS[other]()), below=1.2)
