# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch

from pyro_rb.ops.score_identity import (
    log_prob_has_memory,
    support_can_move,
    support_moves,
)


def learned(value=1.5):
    return torch.tensor(value, requires_grad=True)


def stretched(base, loc=0.0, scale=1.0, first=()):
    transforms = [*first, T.AffineTransform(loc, scale)]
    return dist.TransformedDistribution(base, transforms)


MOVING = {
    "uniform": lambda: dist.Uniform(0.0, learned()),
    "uniform wrapped": lambda: dist.Uniform(torch.zeros(2), learned()).to_event(1),
    "uniform masked": lambda: dist.Uniform(torch.zeros(2), learned()).mask(
        torch.ones(2).bool()
    ),
    "pareto": lambda: dist.Pareto(learned(), 3.0),
    "pareto by hand": lambda: stretched(
        dist.Exponential(3.0), scale=learned(), first=[T.ExpTransform()]
    ),
    "affine beta": lambda: dist.AffineBeta(2.0, 3.0, learned(), 1.0),
    "shifted exponential": lambda: stretched(dist.Exponential(1.0), loc=learned()),
    "stretched unit interval": lambda: stretched(
        dist.Uniform(0.0, 1.0), 0.0, learned()
    ),
    "inside compose": lambda: dist.TransformedDistribution(
        dist.Exponential(1.0),
        [T.ComposeTransform([T.ExpTransform(), T.AffineTransform(learned(), 1.0)])],
    ),
    "through the real line, from within": lambda: dist.TransformedDistribution(
        dist.Uniform(0.2, 0.8),
        [T.SigmoidTransform().inv, T.AffineTransform(learned(), 1.0)],
    ),
    "learned inverse": lambda: dist.TransformedDistribution(
        dist.Exponential(1.0), [T.AffineTransform(learned(), 1.0).inv]
    ),
    "power of an interval": lambda: dist.TransformedDistribution(
        dist.Uniform(0.0, 2.0), [T.PowerTransform(learned())]
    ),
    "unknown learned transform": lambda: dist.TransformedDistribution(
        dist.Uniform(torch.zeros(2), 1.0).to_event(1), [T.spline(2)]
    ),
}
FIXED = {
    "through the real line and back": lambda: dist.TransformedDistribution(
        dist.Beta(2.0, 3.0),
        [
            T.SigmoidTransform().inv,
            T.AffineTransform(learned(), learned()),
            T.SigmoidTransform(),
        ],
    ),
    "normal": lambda: dist.Normal(learned(), 1.0),
    "multivariate": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "gamma": lambda: dist.Gamma(learned(), learned()),
    "exponential": lambda: dist.Exponential(learned()),
    "half cauchy": lambda: dist.HalfCauchy(learned()),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(3, requires_grad=True)),
    "log normal": lambda: dist.LogNormal(learned(), learned()),
    "weibull": lambda: dist.Weibull(learned(), learned()),
    "kumaraswamy": lambda: dist.Kumaraswamy(learned(), learned()),
    "uniform with constant ends": lambda: dist.Uniform(0.0, 2.0),
    # The density vanishes at the end that moves.
    "shifted log normal": lambda: stretched(
        dist.Normal(0.0, 1.0), loc=learned(), first=[T.ExpTransform()]
    ),
    "flow on the real line": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [T.planar(2)]
    ),
}


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING.keys())
def test_support_moves(make):
    assert support_moves(make())
    assert support_can_move(make())


@pytest.mark.parametrize("make", FIXED.values(), ids=FIXED.keys())
def test_support_is_fixed(make):
    assert not support_moves(make())


@pytest.mark.parametrize(
    "name", ["normal", "gamma", "dirichlet", "flow on the real line"]
)
def test_support_can_never_move(name):
    assert not support_can_move(FIXED[name]())


@pytest.mark.parametrize(
    "make, mean",
    [
        (lambda p: dist.Uniform(torch.zeros_like(p), p), -1 / 1.5),
        (lambda p: dist.Pareto(p, 3.0 * torch.ones_like(p)), 3 / 1.5),
        (lambda p: dist.Weibull(p, torch.ones_like(p)), 0.0),
        (lambda p: stretched(dist.Normal(0.0, 1.0), p, 1.0, [T.ExpTransform()]), 0.0),
    ],
    ids=["uniform", "pareto", "weibull", "shifted log normal"],
)
def test_mean_of_the_score(make, mean):
    # This is what a support that moves does to the identity that estimators rely on.
    p = torch.full((20000,), 1.5, dtype=torch.double, requires_grad=True)
    fn = make(p)
    # Stay clear of the very end, where rounding may put a draw outside.
    z = fn.rsample().detach() * (1 - 1e-12) + 1e-12
    (score,) = torch.autograd.grad(fn.log_prob(z).sum(), p)
    tolerance = 5 * score.std() / len(score) ** 0.5 + 1e-9
    assert abs(score.mean() - mean) < tolerance < 0.2


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: dist.Normal(learned(), 1.0), False),
        (lambda: dist.LogNormal(learned(), 1.0), False),
        (lambda: iaf(), False),
        (lambda: flow(T.planar(3)), True),
        (lambda: flow(T.block_autoregressive(3)), True),
        (lambda: flow(T.affine_coupling(3)), False),
        (
            lambda: dist.RelaxedOneHotCategoricalStraightThrough(
                torch.tensor(0.5), torch.ones(3, requires_grad=True)
            ),
            True,
        ),
    ],
    ids=["normal", "log normal", "iaf", "planar", "block", "coupling", "straight"],
)
def test_log_prob_has_memory(make, expected):
    torch.manual_seed(0)
    fn = make()
    assert log_prob_has_memory(fn, fn.rsample((5,))) is expected


def flow(*transforms):
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return dist.TransformedDistribution(base, list(transforms))


def iaf():
    return flow(T.affine_autoregressive(3, hidden_dims=[8]))


def test_batch_norm_has_memory_and_keeps_its_buffers():
    torch.manual_seed(0)
    transform = T.batchnorm(3)
    fn = flow(transform)
    value = fn.rsample((7,))
    before = {name: buffer.clone() for name, buffer in transform.named_buffers()}
    assert log_prob_has_memory(fn, value)
    for name, buffer in transform.named_buffers():
        assert torch.equal(buffer, before[name])


def test_caches_are_put_back():
    torch.manual_seed(0)
    # The affine part has an inverse, so it forgets the draw before planar fails.
    parts = [T.planar(3), T.affine_autoregressive(3, hidden_dims=[8])]
    fn = flow(*parts)
    value = fn.rsample((5,))
    assert log_prob_has_memory(fn, value)
    assert fn.log_prob(value).requires_grad


def test_the_graph_of_the_draw_stays_good():
    torch.manual_seed(0)
    fn = iaf()
    value = fn.rsample((5,))
    assert not log_prob_has_memory(fn, value)
    value.sum().backward()
