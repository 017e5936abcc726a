# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pytest
import torch

from pyro_rb.ops.antithetic import draw_pairs, pair_score

VECTORS = {
    "one": [0.3],
    "undecided": [0.5, 0.5],
    "mixed": [0.2, 0.5, 0.9],
    "sure": [1e-6, 1 - 1e-6, 0.4],
    "four": [0.35, 0.6, 0.75, 0.1],
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def cells(probs):
    """Uniform numbers ``[cells, size]``, one in each cell where no bit of a pair changes, and log volumes."""
    ends = [sorted({0.0, p, 1.0 - p, 1.0}) for p in probs]
    sides = [[((a + b) / 2, b - a) for a, b in zip(e, e[1:])] for e in ends]
    found = torch.tensor(list(itertools.product(*sides)))
    return found[..., 0], found[..., 1].prod(-1)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("by", ["logits", "probs"])
def test_mean_over_all_cells_is_the_gradient(name, by, monkeypatch):
    """However the logits were made, and for a cost of no particular form."""
    probs = torch.tensor(VECTORS[name])
    size = len(probs)
    costs = torch.randn((2,) * size)
    uniform, volume = cells(VECTORS[name])
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: uniform.expand(shape))
    values = draw_pairs(probs.expand(uniform.shape), 1)

    def f(bits):
        return costs[tuple(bits.long().unbind(-1))]

    leaf = (probs.logit() if by == "logits" else probs).clone().requires_grad_()
    logits = leaf if by == "logits" else leaf.logit()
    score = pair_score(values, logits, -2, 1)
    (actual,) = torch.autograd.grad((volume * (f(values) / 2 * score).sum(0)).sum(), leaf)
    support = torch.cartesian_prod(*[torch.arange(2.0)] * size).reshape(-1, size)
    p = torch.sigmoid(leaf) if by == "logits" else leaf
    mass = torch.where(support == 1, p, 1 - p).prod(-1)
    (expected,) = torch.autograd.grad((mass * f(support)).sum(), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-11)


def test_each_draw_of_a_pair_has_the_distribution():
    probs = torch.tensor([0.0, 0.03, 0.5, 0.8, 1.0])
    num = 40000
    values = draw_pairs(probs.expand(num, 5), 2)
    assert values.shape == (4, num, 5) and values.dtype == torch.float64
    assert set(values.unique().tolist()) == {0.0, 1.0}
    error = 5 * (probs * (1 - probs) / num).sqrt()
    assert ((values.mean(1) - probs).abs() <= error).all()
    first, second = values[:2], values[2:]
    assert (first[..., 2] != second[..., 2]).all()
    assert not (first * second)[..., 1].any() and (first + second)[..., 3].all()
    assert (first[0] != first[1]).any(), "pairs are independent"


def test_shapes():
    """Draws at some dim on the left of the batch, and events of two dims."""
    logits = torch.randn(3, 1, 4, 5, requires_grad=True)
    value = draw_pairs(torch.sigmoid(logits.expand(3, 2, 4, 5)), 3).unsqueeze(1)  # [6, 1, 3, 2, 4, 5]
    score = pair_score(value, logits, -4, 2)
    assert score.shape == (6, 1, 3, 2)
    torch.testing.assert_close(score[3:], -score[:3])
    by_hand = ((value[:3] - value[3:]) * torch.sigmoid(logits.abs()) * logits).sum((-1, -2))
    torch.testing.assert_close(score[:3], by_hand)
    assert pair_score(value, logits, -6, 0).shape == value.shape


def test_infinite_logits():
    logits = torch.tensor([-math.inf, 0.3, math.inf], requires_grad=True)
    score = pair_score(draw_pairs(torch.sigmoid(logits), 4), logits, -1, 1)
    (grad,) = torch.autograd.grad(score.square().sum(), logits)
    assert score.isfinite().all() and grad.isfinite().all() and grad[1] != 0
