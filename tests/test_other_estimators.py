# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The estimators of other papers that an example compares to are what they are said to be."""

import math
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_rb import RaoBlackwell_ELBO
from tests.support.common import assert_unbiased

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COSTS = torch.tensor([3.0, -1.0, 0.5, 8.0])


#: Three bits, uncertain and nearly certain.
LOGITS = [(0.3, -0.5, 1.0), (3.0, 2.0, -2.5)]
CODES = torch.cartesian_prod(*3 * [torch.arange(2.0)])


@pytest.fixture
def support(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    from support import other_estimators, several_draws

    yield SimpleNamespace(other=other_estimators, several=several_draws)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("models", "support"):
            del sys.modules[name]


@pytest.mark.parametrize("control", [lambda z: z.sin().sum(-1), lambda z: 3.0 * (z.softmax(-1) @ COSTS)])
def test_relax_is_unbiased(support, control):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5])
    p = logits.softmax(-1)
    exact = p * (COSTS - p @ COSTS)
    _, _, gradient, _ = support.other.relax_gradient(logits.expand(100_000, -1), COSTS.__getitem__, control)
    assert_unbiased(gradient, exact)


def test_relax_has_less_noise_by_a_good_control_variate(support):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5]).expand(20_000, -1)

    def noise(scale):
        def control(z):
            return scale * ((z / 0.5).softmax(-1) @ COSTS)

        return support.other.relax_gradient(logits, COSTS.__getitem__, control)[3]

    assert noise(1.0) < 0.7 * noise(0.0)


def test_labels_are_draws(support):
    logits = torch.tensor([0.3, -0.5, 1.0, -1.5])
    found = support.other.relax_gradient(logits.expand(100_000, -1), COSTS.__getitem__, lambda z: z.sum(-1))
    label, cost, _, _ = found
    shares = torch.bincount(label) / len(label)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.01)
    assert torch.equal(cost, COSTS[label])


def log_joint(codes, theta):
    """Of bits and an observation, by a parameter of the model; the last bits matter together."""
    mean = (codes * theta).sum(-1) + 2.0 * codes[..., 1] * codes[..., 2]
    return torch.distributions.Normal(mean, 0.7).log_prob(torch.tensor(1.5)) - codes.shape[-1] * math.log(2.0)


def make_items(logits, num, theta=(0.5, -1.0, 2.0), **infer):
    """Model and guide: items of a plate, each with parameters of its own."""

    def model():
        theta_ = pyro.param("theta", lambda: torch.tensor(theta).expand(num, -1).clone())
        with pyro.plate("items", num):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(theta)]).to_event(1))
            mean = (z * theta_).sum(-1) + 2.0 * z[..., 1] * z[..., 2]
            pyro.sample("x", dist.Normal(mean, 0.7), obs=torch.tensor(1.5))

    def guide():
        alpha = pyro.param("alpha", lambda: torch.tensor(logits).expand(num, -1).clone())
        with pyro.plate("items", num):
            pyro.sample("z", dist.Bernoulli(logits=alpha).to_event(1), infer=infer)

    return model, guide


def draw_gradients(loss, *args, **kwargs):
    """By parameters of guide and model, one for each item."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss.loss_and_grads(*make_items(*args, **kwargs))
    return {name: pyro.param(name).grad for name in ("alpha", "theta")}


def exact_loss(logits, num_draws):
    """Minus the bound of so many draws, of one draw the ELBO, with its gradient: sums over all tuples of codes."""
    alpha, theta = torch.tensor(logits).requires_grad_(), torch.tensor([0.5, -1.0, 2.0]).requires_grad_()
    log_q = torch.distributions.Bernoulli(logits=alpha).log_prob(CODES).sum(-1)
    log_w = log_joint(CODES, theta) - log_q
    tuples = torch.tensor(list(product(range(8), repeat=num_draws)))
    bounds = log_w[tuples].logsumexp(-1) - math.log(num_draws)
    loss = -(log_q[tuples].sum(-1).exp() * bounds).sum()
    return loss.item(), dict(zip(("alpha", "theta"), torch.autograd.grad(loss, (alpha, theta))))


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(
    "name, num_draws",
    [("LeaveOneOut", 2), ("LeaveOneOut", 4), ("Disarm", 2), ("Disarm", 4), ("UnorderedSet", 2), ("UnorderedSet", 4)],
)
def test_several_draws_are_unbiased(support, name, num_draws, logits):
    gradients = draw_gradients(getattr(support.several, name)(num_draws), logits, 40_000)
    assert_unbiased(gradients, exact_loss(logits, 1)[1])


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("num_draws", [2, 3])
def test_vimco_is_unbiased_for_its_bound(support, num_draws, logits):
    gradients = draw_gradients(support.several.Vimco(num_draws), logits, 40_000)
    exact = exact_loss(logits, num_draws)[1]
    assert_unbiased(gradients, exact)
    other = exact_loss(logits, 1)[1]
    assert (exact["alpha"] - other["alpha"]).norm() > 0.2 * other["alpha"].norm()


@pytest.mark.parametrize("name, num_bound", [("LeaveOneOut", 1), ("Disarm", 1), ("UnorderedSet", 1), ("Vimco", 4)])
def test_losses_of_several_draws(support, name, num_bound):
    """With and without the gradient."""
    num, loss = 40_000, getattr(support.several, name)(4)
    pair = make_items(LOGITS[0], num)
    wanted = pytest.approx(exact_loss(LOGITS[0], num_bound)[0], rel=0.02)
    assert loss.loss(*pair) / num == wanted
    assert loss.loss_and_grads(*pair) / num == wanted


def test_a_set_of_all_values_has_no_noise(support):
    """Nothing is left to chance."""
    gradients = draw_gradients(support.several.UnorderedSet(8), LOGITS[0], 50)
    for name, exact in exact_loss(LOGITS[0], 1)[1].items():
        torch.testing.assert_close(gradients[name], exact.expand(50, -1), rtol=1e-3, atol=1e-4)


def test_a_set_of_rare_values_is_leave_one_out(support):
    """Of forty bits no two draws agree."""
    size = 40
    theta = tuple(torch.linspace(-1.0, 1.0, size).tolist())

    losses = support.several.UnorderedSet(4), support.several.LeaveOneOut(4)
    found, wanted = (draw_gradients(loss, size * (0.2,), 20, theta) for loss in losses)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("max_table_bits", [0, 10])
def test_draws_without_replacement(support, max_table_bits, monkeypatch):
    """Ordered pairs have the probabilities of draws one after the other."""
    monkeypatch.setattr(support.several, "MAX_TABLE_BITS", max_table_bits)
    fn = dist.Bernoulli(logits=torch.tensor(LOGITS[1]).expand(100_000, -1)).to_event(1)
    first, second = (support.several.draw_distinct(fn, 2) @ torch.tensor([4.0, 2.0, 1.0])).long()
    shares = torch.bincount(8 * first + second, minlength=64).reshape(8, 8) / len(first)
    q = torch.distributions.Bernoulli(logits=torch.tensor(LOGITS[1])).log_prob(CODES).sum(-1).exp()
    exact = (q.unsqueeze(-1) * q / (1 - q.unsqueeze(-1))).fill_diagonal_(0.0)
    assert torch.allclose(shares, exact, atol=0.006)


def test_a_pair_by_hand_is_that_of_the_one_loss(support):
    def variances(loss, **infer):
        gradients = draw_gradients(loss, LOGITS[0], 40_000, **infer)
        return torch.cat([g.var(0) for g in gradients.values()])

    ours = variances(RaoBlackwell_ELBO(max_plate_nesting=1), draws=2)
    torch.testing.assert_close(ours, variances(support.several.Disarm(2)), rtol=0.05, atol=0.0)
