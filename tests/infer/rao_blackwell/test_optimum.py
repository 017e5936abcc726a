# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Where the guide is the posterior, the terms of the ELBO cancel at each draw, and so must those
of the gradient: with a baseline, whatever the slots, and a path gradient of scale 1.
"""

import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_rb import RaoBlackwell_ELBO
from tests.infer.rao_blackwell.models import fixed, gradient, pick
from tests.support.cases import Case

pytestmark = pytest.mark.slow

#: Order of the sites: of z (Gaussian), y (categorical), d (Bernoulli) and v (a vector of bits).
ORDERS = ("zyd", "yzd", "dyz", "ydz", "zdy", "zyv", "vzy")
SLOTS = (
    {},
    {"budget": 2},
    {"budget": 5},
    {"k": 1},
    {"k": 3},
    {"k": 10},
    {"k": 0, "num_samples": 2},
    {"k": 0, "num_samples": 3},
    {"k": 2, "num_samples": 2},
)
SIZES = pytest.mark.parametrize("size", [(), (4,)], ids=["global", "plate"])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def draw_sites(order, size, value):
    """
    A chain in which each site depends on the ones before.

    :param tuple size: ``()`` or that of a plate.
    :param callable value: makes a number, or a parameter that has it for its value.
    """
    h = torch.zeros(())
    for site in order:
        bias, slope = partial(value, f"{site}_bias"), value(f"{site}_slope", 0.7 * fixed(*size, seed=ord(site)))
        h = slope * h
        if site == "z":
            scale = value("scale", 0.5 + fixed(*size, seed=1).square())
            x = pyro.sample("z", dist.Normal(bias(fixed(*size, seed=2)) + h, scale))
        elif site == "y":
            logits = bias(fixed(*size, 6, seed=3)) + value("y_slopes", fixed(6, seed=4)) * h.unsqueeze(-1)
            x = pick(fixed(6, seed=5), pyro.sample("y", dist.Categorical(logits=logits)))
        elif site == "d":
            x = pyro.sample("d", dist.Bernoulli(logits=bias(fixed(*size, seed=6)) + h))
        else:
            logits = bias(fixed(*size, 3, seed=7)) + h.unsqueeze(-1)
            x = pyro.sample("v", dist.Bernoulli(logits=logits).to_event(1)).sum(-1)
        h = h + x


def make_exact(order, size):
    """Model and guide with the same distributions, in a plate if it has a size."""

    def run(value):
        with pyro.plate("data", *size) if size else nullcontext():
            draw_sites(order, size, value)

    def learned(name, x):
        constraint = constraints.positive if name == "scale" else constraints.real
        return pyro.param(name, x.clone(), constraint=constraint)

    return Case(lambda: run(lambda name, x: x), lambda: run(learned))


def assert_no_gradient(case, num_burn_in=0, num_seeds=3, **options):
    if not options.keys() & {"k", "num_samples", "budget"}:
        options["budget"] = 3  # else all values are summed
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1, **options)
    for seed in range(num_burn_in + num_seeds):
        pyro.set_rng_seed(seed)
        grads = gradient(lambda: elbo.differentiable_loss(case.model, case.guide, *case.args), case)
        if seed >= num_burn_in:
            for name, grad in grads.items():
                assert grad.abs().max() < 1e-13, name


@SIZES
@pytest.mark.parametrize("order", ORDERS)
def test_every_number_of_slots(order, size):
    case = make_exact(order, size)
    for slots in SLOTS:
        assert_no_gradient(case, num_seeds=1, control_variate_scale=1.0, **slots)


@SIZES
@pytest.mark.parametrize("slots", [{"budget": 2}, {"k": 2}], ids=["budget", "k"])
def test_baseline_by_one_more_draw(slots, size):
    assert_no_gradient(make_exact("zyd", size), control_variate_scale=1.0, baseline="reinforce+", **slots)


@SIZES
@pytest.mark.parametrize("order", ORDERS)
def test_adaptive_scale_after_its_start(order, size):
    assert_no_gradient(make_exact(order, size), num_burn_in=6)


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
def test_particles(vectorize):
    options = {"num_particles": 3, "vectorize_particles": vectorize, "control_variate_scale": 1.0}
    assert_no_gradient(make_exact("zyv", (4,)), **options)


def test_one_draw_of_each_of_several_particles():
    """Then the baseline is that of the other particles."""
    options = {"draws": 1, "num_particles": 3, "vectorize_particles": True, "control_variate_scale": 1.0}
    assert_no_gradient(make_exact("zyv", (4,)), **options)


def test_own_number_of_draws():
    case = make_exact("vzy", (4,))
    case.guide = poutine.infer_config(case.guide, lambda site: {"draws": 4} if site["name"] == "v" else {})
    assert_no_gradient(case, control_variate_scale=1.0)


def test_scale_and_mask():
    case, mask = make_exact("zyd", (4,)), torch.tensor([True, False, True, True])
    case.model, case.guide = (poutine.scale(poutine.mask(f, mask), 3.0) for f in (case.model, case.guide))
    assert_no_gradient(case, control_variate_scale=1.0)
    assert_no_gradient(case, num_burn_in=6)


@pytest.mark.parametrize("options", [{"control_variate_scale": 1.0}, {"num_burn_in": 6}], ids=["path", "adaptive"])
def test_auto_guide_list(options):
    """The posterior of independent sites, of which AutoNormal draws the continuous ones."""

    def model():
        pyro.sample("s", dist.LogNormal(0.3, 0.6))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 0.8))
            pyro.sample("y", dist.Categorical(logits=fixed(3, 6, seed=1)))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["y"])))

    def discrete():
        with guide.plates["data"]:
            pyro.sample("y", dist.Categorical(logits=pyro.param("logits", fixed(3, 6, seed=1))))

    guide.append(discrete)
    case = Case(model, guide)
    with torch.no_grad():
        for name, loc, scale in (("s", 0.3, 0.6), ("z", 0.0, 0.8)):
            getattr(guide[0].locs, name).fill_(loc)
            unconstrained = getattr(guide[0].scales, f"{name}_unconstrained")
            unconstrained.fill_(math.log(math.expm1(scale)))  # the inverse of softplus
    assert_no_gradient(case, **options)


def test_a_conjugate_posterior():
    """With data: z of each component given y, and the weights of the components."""
    x, locs = torch.tensor([0.5, -1.2, 2.0]), torch.tensor([-1.0, 0.4, 1.5, 3.0])
    log_evidence = dist.Normal(locs, (1.0 + 0.25) ** 0.5).log_prob(x.unsqueeze(-1))

    def model():
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(4)))
            z = pyro.sample("z", dist.Normal(locs[y], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide():
        logits, scale = pyro.param("logits", log_evidence.clone()), pyro.param("scale", torch.tensor(0.2**0.5))
        loc = pyro.param("loc", (locs + 4 * x.unsqueeze(-1)) / 5)
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal(pick(loc, y), scale))

    case = Case(model, guide)
    for slots in SLOTS:
        assert_no_gradient(case, control_variate_scale=1.0, **slots)
    assert_no_gradient(case, num_burn_in=6)


def test_without_a_baseline_it_is_not_zero():
    """The test would see it."""
    with pytest.raises(AssertionError, match="bias|slope|scale"):
        assert_no_gradient(make_exact("zyd", (4,)), control_variate_scale=1.0, baseline=None)
