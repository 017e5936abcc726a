# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from scipy.optimize import brentq
from torch.distributions import Normal

from pyro_rb.ops.rejection import (
    acceptance,
    clean_log_weights,
    estimate_bound,
    first_accepted,
    gradient_weights,
    log_normalizer,
)
from pyro_rb.ops.rejection_threshold import adapt_threshold, solve_threshold

EPSILONS = (1e-4, 0.01, 0.1, 0.3)
THRESHOLDS = (-1.0, 1.0, 4.0)


def elbo(lw, lq, T, epsilon):
    a = epsilon + (1 - epsilon) * (lw + T).sigmoid()
    z = (lq.exp() * a).sum()
    return (lq.exp() * a * (lw - a.log())).sum() / z + z.log()


class Quadrature:
    """One latent, a skewed posterior; on a grid that is exact to many digits."""

    def __init__(self):
        self.loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        self.log_scale = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
        self.theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.z = torch.linspace(-7.0, 7.0, 240, dtype=torch.float64)

    def log_p(self, z):
        return -((z - self.theta) ** 2) / 2 - torch.nn.functional.softplus(3 * self.theta * z)

    def log_q(self, z):
        return Normal(self.loc, self.log_scale.exp()).log_prob(z)

    @property
    def parameters(self):
        return [self.loc, self.log_scale, self.theta]

    def exact(self, T, epsilon):
        log_q = self.log_q(self.z)
        value = elbo(self.log_p(self.z) - log_q, log_q + (self.z[1] - self.z[0]).log(), T, epsilon)
        return torch.stack(torch.autograd.grad(value, self.parameters))

    def estimated(self, T, epsilon):
        """The mean of the estimate from two accepted draws, over all pairs of grid points."""
        z = self.z.clone().requires_grad_()
        lw = self.log_p(z) - self.log_q(z)
        (dz,) = torch.autograd.grad(lw.sum(), z, retain_graph=True)
        # dz / dphi at a fixed base draw, and the derivative of log p by theta.
        by_loc = dz
        by_log_scale = dz * (self.z - self.loc.detach())
        theta = self.theta.detach().expand_as(z).clone().requires_grad_()
        log_p = -((self.z - theta) ** 2) / 2 - torch.nn.functional.softplus(3 * theta * self.z)
        (by_theta,) = torch.autograd.grad(log_p.sum(), theta)
        lw = lw.detach()
        r = self.log_q(self.z).detach().exp() * acceptance(lw, torch.tensor(T), epsilon)
        r = r / r.sum()
        i, j = torch.cartesian_prod(torch.arange(len(z)), torch.arange(len(z))).unbind(-1)
        _, path, model = gradient_weights(torch.stack([lw[i], lw[j]]), torch.tensor(T), epsilon)
        pairs = r[i] * r[j]
        return torch.stack(
            [
                (pairs * (w[0] * g[i] + w[1] * g[j]) / 2).sum()
                for w, g in ((path, by_loc), (path, by_log_scale), (model, by_theta))
            ]
        )


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("T", THRESHOLDS)
def test_weights_give_the_gradient(T, epsilon):
    problem = Quadrature()
    torch.testing.assert_close(
        problem.estimated(T, epsilon), problem.exact(T, epsilon), rtol=1e-7, atol=1e-9
    )


def no_covariance(lw, T, epsilon):
    f, path, model = WEIGHTS(lw, T, epsilon)
    return f, path, torch.ones_like(model)


def log_sigmoid(lw, T, epsilon):
    return reweighed(lw, T, epsilon, lw - torch.nn.functional.logsigmoid(lw + T), 1.0)


def plain_covariance(lw, T, epsilon):
    return reweighed(lw, T, epsilon, WEIGHTS(lw, T, epsilon).f, (len(lw) - 1) / len(lw))


def reweighed(lw, T, epsilon, f, factor):
    s, odds = (lw + T).sigmoid(), epsilon / (1 - epsilon)
    rho = (odds + s * s) / (odds + s)
    d = factor * len(lw) / (len(lw) - 1) * (f - f.mean(0))
    return f, rho**2 + 2 * d * s * s * (1 - s) / (odds + s), 1 + d * (1 - rho)


@pytest.mark.parametrize("defect", [no_covariance, log_sigmoid, plain_covariance])
def test_defects_of_the_weights_are_seen(defect, monkeypatch):
    monkeypatch.setitem(globals(), "gradient_weights", defect)
    with pytest.raises(AssertionError, match="not close"):
        test_weights_give_the_gradient(1.0, 0.1)


WEIGHTS = gradient_weights


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_weights_against_autograd(epsilon):
    """rho is df/dlw, and the path weight the derivative of h over a."""
    lw = torch.linspace(-12.0, 12.0, 41, dtype=torch.float64, requires_grad=True)
    T = torch.tensor(0.7, dtype=torch.float64)
    odds = epsilon / (1 - epsilon)
    s = (lw + T).sigmoid()
    f = lw - acceptance(lw, T, epsilon).log()
    (rho,) = torch.autograd.grad(f.sum(), lw, retain_graph=True)
    mean = f.mean().detach()
    scale = len(lw) / (len(lw) - 1)
    # The covariance with f, at the weight S / (S - 1); f itself has the weight 1.
    h = scale * (f - mean).detach() * (odds + s * s)
    (dh,) = torch.autograd.grad(h.sum(), lw)
    actual = gradient_weights(lw.detach(), T, epsilon)
    s = s.detach()
    torch.testing.assert_close(actual.f, f.detach())
    torch.testing.assert_close(actual.path, rho**2 + dh / (odds + s))
    torch.testing.assert_close(actual.model, 1 + scale * (f - mean).detach() * (1 - rho))


def test_weights_in_float32_and_by_item():
    lw = 30 * torch.randn(5, 3, dtype=torch.float64)
    T = torch.tensor([-20.0, 0.0, 7.0], dtype=torch.float64)
    together = gradient_weights(lw, T, 0.01)
    single = gradient_weights(lw.float(), T.float(), 0.01)
    for n in range(3):
        for x, y, z in zip(together, gradient_weights(lw[:, n], T[n], 0.01), single):
            torch.testing.assert_close(x[:, n], y)
            torch.testing.assert_close(z[:, n].double(), y, rtol=1e-3, atol=1e-3)


def test_first_accepted_against_a_loop():
    is_accepted = torch.rand(40, 6) < 0.4
    index, num = first_accepted(is_accepted, 3)
    for n in range(6):
        expected = [m for m in range(40) if is_accepted[m, n]][:3]
        assert index[:, n].tolist() == expected
        assert num[n] == expected[-1] + 1
    torch.testing.assert_close(first_accepted(is_accepted[:, 0], 3)[0], index[:, 0])


@pytest.mark.parametrize("num_samples", [1, 2, 5])
@pytest.mark.parametrize("z", [0.9, 0.3, 0.05])
def test_normalizer_is_unbiased(num_samples, z):
    """Summed over the negative binomial distribution of N."""
    n = torch.arange(num_samples, 3000, dtype=torch.float64)
    s = torch.tensor(float(num_samples), dtype=torch.float64)
    log_mass = torch.lgamma(n) - torch.lgamma(s) - torch.lgamma(n - s + 1)
    log_mass = log_mass + s * math.log(z) + (n - s) * math.log1p(-z)
    mean = (log_mass.exp() * log_normalizer(num_samples, n)).sum().item()
    assert mean == pytest.approx(math.log(z), abs=1e-9)


def test_log_weights_that_are_not_finite():
    lw = torch.tensor([0.0, math.nan, math.inf, -math.inf])
    clean, num = clean_log_weights(lw)
    assert num == 3 and clean.tolist() == [0.0] + 3 * [-math.inf]
    a = acceptance(clean, torch.tensor(0.0), 0.1)
    assert a[0] > 0 and (a[1:] == 0).all()
    for x in estimate_bound(clean, torch.tensor(0.0), 0.1):
        assert x.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.05, 0.33, 0.9])
@pytest.mark.parametrize("spread", [0.1, 5.0, 1e3])
def test_threshold_against_brentq(dtype, target, spread):
    lw = (spread * torch.randn(30, 2, dtype=torch.float64) - 70).to(dtype)
    lw[3, 0] = -math.inf
    T = solve_threshold(lw, target, 0.01)
    assert T.dtype == dtype and T.shape == (2,)
    for n in range(2):
        x = lw[:, n].double()

        def excess(t):
            return acceptance(x, torch.tensor(t, dtype=torch.float64), 0.01).mean().item() - target

        expected = brentq(excess, -5e3, 5e3, xtol=1e-10)
        assert T[n].item() == pytest.approx(expected, abs=1e-2 if dtype == torch.float32 else 1e-6)


def test_threshold_out_of_reach():
    lw = torch.full((10,), -math.inf)
    assert solve_threshold(lw, 0.33, 0.01).isnan()
    lw[0] = 1.0
    T = solve_threshold(lw, 0.33, 0.01)  # at most one in ten can be accepted
    assert acceptance(lw, T, 0.01).mean().item() == pytest.approx(0.09, abs=1e-3)


@pytest.mark.parametrize("start", [-1e4, -30.0, 0.0, 30.0, 1e6])
@pytest.mark.parametrize("spread", [0.3, 300.0])
def test_threshold_adapts_from_anywhere(start, spread):
    T, target, seen = torch.tensor(start), 0.33, []
    for _ in range(400):
        lw = spread * torch.randn(11) - 70
        T = adapt_threshold(lw, T, target, 0.01, 0.1)
        seen.append(acceptance(spread * torch.randn(500) - 70, T, 0.01).mean())
    assert torch.stack(seen[150:]).mean().item() == pytest.approx(target, abs=0.03)


def test_threshold_step_by_item():
    lw = torch.randn(11, 4)
    lw[:, 3] = -math.inf
    T = torch.tensor([0.0, 1.0, 100.0, 2.0])
    new = adapt_threshold(lw, T, 0.33, 0.01, 0.1)
    for n in range(3):
        torch.testing.assert_close(new[n], adapt_threshold(lw[:, n], T[n], 0.33, 0.01, 0.1))
    assert new[3].isfinite()


def test_bound_and_its_error():
    torch.manual_seed(0)
    grid = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)
    q = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    log_p = -((grid - 0.5) ** 4) / 4
    exact = elbo(log_p - q.log_prob(grid), q.log_prob(grid) + (grid[1] - grid[0]).log(), 0.5, 0.01)
    T = torch.tensor(0.5, dtype=torch.float64)
    z = q.sample((1000, 200))
    value, error, mean_a = estimate_bound(-((z - 0.5) ** 4) / 4 - q.log_prob(z), T, 0.01)
    spread = value.std()
    assert abs(value.mean() - exact) < 4 * spread / 200**0.5 + 2e-3
    assert 0.8 < error.mean() / spread < 1.2
    assert (mean_a > 0.01).all()
