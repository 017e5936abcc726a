# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models that carry their own answers.

Each function makes a :class:`~tests.support.cases.Case` with ``exact_loss``: the negative
ELBO by conjugacy, closed-form moments, quadrature or enumeration. Arguments move
the guide: at the exact posterior, away from it, wider or narrower.
``tests/support/guides.py`` holds the guides without exact answers.
"""

import itertools
from typing import Any, Callable, Dict

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing import fakes, rejection_gamma
from torch.distributions import kl_divergence

from tests.support.cases import (
    HALF_LOG_2PI,
    Case,
    normal_kl,
    normal_nll,
    positive,
    real,
)

# ---------------------------------------------------------------------------
# conj: z_i ~ N(0, 1), x_i ~ N(z_i, .5). Exact posterior N(.8 x_i, sqrt(.2)).

CONJ_X = (0.5, -1.2, 2.0, 0.3)
LOC, SCALE = (0.9, -0.3, 1.0, 0.0), (0.9, 0.5, 0.7, 1.1)  # a generic wide guide


def conj_model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def conj_nelbo(m: torch.Tensor, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Negative ELBO of each item for q(z_i) = N(m_i, s_i)."""
    return normal_kl(m, s, 0.0, 1.0) + normal_nll((x - m) ** 2 + s**2, 0.5)


def conj_guide(loc: Any, scale: Any, normal: Any = dist.Normal) -> Callable[..., None]:
    def guide(x: torch.Tensor) -> None:
        m, s = real("loc", *loc), positive("scale", *scale)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(m, s))

    return guide


def conj(shift: float = 0.3, width: float = 1.5, normal: Any = dist.Normal) -> Case:
    """Mean field, ``shift`` and ``width`` (times the exact scale) away from the posterior.

    :param normal: the guide's distribution, for a draw without ``rsample``.
    """
    x = torch.tensor(CONJ_X)
    guide = conj_guide([0.8 * v + shift for v in CONJ_X], [width * 0.2**0.5] * 4, normal)

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(pyro.param("loc"), pyro.param("scale"), x).sum()

    return Case(conj_model, guide, (x,), exact_loss, {"z"} if normal.has_rsample else ())


def subsample_scale_mask() -> Case:
    """conj with 3 of 4 items a step, everything scaled by 1.7, the third item masked,
    and the likelihood tempered by a further .5."""
    x = torch.tensor(CONJ_X)
    mask = torch.tensor([True, True, False, True])

    def items() -> Any:
        return pyro.plate("data", 4, subsample_size=3)

    def model(x: torch.Tensor) -> None:
        with poutine.scale(scale=1.7), items() as i, poutine.mask(mask=mask[i]):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        m, s = real("loc", *LOC), positive("scale", *SCALE)
        with poutine.scale(scale=1.7), items() as i, poutine.mask(mask=mask[i]):
            pyro.sample("z", dist.Normal(m[i], s[i]))

    def exact_loss() -> torch.Tensor:
        m, s = pyro.param("loc"), pyro.param("scale")
        nll = normal_nll((x - m) ** 2 + s**2, 0.5)
        return 1.7 * (normal_kl(m, s, 0.0, 1.0) + 0.5 * nll)[mask].sum()

    return Case(model, guide, (x,), exact_loss, {"z"}, subsamples=tuple(itertools.combinations(range(4), 3)))


def sequential_plate() -> Case:
    """conj with one site for each item, in a Python loop over a plate."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        m, s = real("loc", *LOC), positive("scale", *SCALE)
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(m[i], s[i]))

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(pyro.param("loc"), pyro.param("scale"), x).sum()

    return Case(model, guide, (x,), exact_loss, {f"z_{i}" for i in range(4)})


def learned_model() -> Case:
    """conj with a learned prior mean and a learned noise scale."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        prior, noise = real("prior", 0.4), positive("noise", 0.8)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def exact_loss() -> torch.Tensor:
        m, s = pyro.param("loc"), pyro.param("scale")
        kl = normal_kl(m, s, pyro.param("prior"), 1.0)
        return (kl + normal_nll((x - m) ** 2 + s**2, pyro.param("noise"))).sum()

    return Case(model, conj_guide(LOC, SCALE), (x,), exact_loss, {"z"})


def shared_parameter() -> Case:
    """conj with one parameter in the model (prior mean) and in the guide (location)."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(real("t", 0.4), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(real("t", 0.4), positive("scale", *SCALE)))

    def exact_loss() -> torch.Tensor:
        t, s = pyro.param("t"), pyro.param("scale")
        return (normal_kl(t, s, t, 1.0) + normal_nll((x - t) ** 2 + s**2, 0.5)).sum()

    return Case(model, guide, (x,), exact_loss, {"z"})


def delta_density() -> Case:
    """conj with parameter-free noise under a Delta whose log density has the parameter:
    the derivative of that density at fixed value does not average to zero."""
    x = torch.tensor(CONJ_X)

    def guide(x: torch.Tensor) -> None:
        m, s = real("loc", *LOC), positive("scale", *SCALE)
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros(()), 1.0)
            e = pyro.sample("e", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(m + s * e, log_density=-s.log()))

    def exact_loss() -> torch.Tensor:
        return conj_nelbo(pyro.param("loc"), pyro.param("scale"), x).sum()

    return Case(conj_model, guide, (x,), exact_loss)


def no_latents() -> Case:
    """Maximum likelihood: parameters in the model, an empty guide."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(real("loc", 0.7), positive("noise", 0.8)), obs=x)

    def exact_loss() -> torch.Tensor:
        return normal_nll((x - pyro.param("loc")) ** 2, pyro.param("noise")).sum()

    return Case(model, lambda x: None, (x,), exact_loss)


# ---------------------------------------------------------------------------
# two: z1 ~ N(0, 1), z2 ~ N(z1, .7), x = 1.3 ~ N(z2, .5).


def two_model() -> None:
    z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, 0.7))
    pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.3))


def two_posterior() -> Dict[str, Any]:
    """The exact posterior: ``mean`` and ``cov`` of (z1, z2), and q(z2 | z1) =
    N(intercept + slope z1, scale)."""
    prior, noise = 1 / 0.49, 1 / 0.25
    cov = torch.linalg.inv(torch.tensor([[1 + prior, -prior], [-prior, prior + noise]]))
    return {
        "mean": cov @ torch.tensor([0.0, 1.3 * noise]),
        "cov": cov,
        "intercept": 1.3 * noise / (prior + noise),
        "slope": prior / (prior + noise),
        "scale": (prior + noise) ** -0.5,
    }


def two(exact: bool = False) -> Case:
    """Hierarchical guide q(z1) q(z2 | z1), wide, or at the exact posterior."""
    init = {"m1": 0.3, "s1": 1.1, "a": 0.2, "b": -0.4, "s2": 0.9}
    if exact:
        p = two_posterior()
        init = {"m1": float(p["mean"][0]), "s1": float(p["cov"][0, 0].sqrt())}
        init.update(a=p["intercept"], b=p["slope"], s2=p["scale"])

    def guide() -> None:
        z1 = pyro.sample("z1", dist.Normal(real("m1", init["m1"]), positive("s1", init["s1"])))
        loc = real("a", init["a"]) + real("b", init["b"]) * z1
        pyro.sample("z2", dist.Normal(loc, positive("s2", init["s2"])))

    def exact_loss() -> torch.Tensor:
        m1, s1, a, b, s2 = (pyro.param(name) for name in ("m1", "s1", "a", "b", "s2"))
        step = (a + (b - 1) * m1) ** 2 + (b - 1) ** 2 * s1**2 + s2**2  # E (z2 - z1)^2
        miss = (1.3 - a - b * m1) ** 2 + b**2 * s1**2 + s2**2  # E (x - z2)^2
        entropy2 = s2.log() + HALF_LOG_2PI + 0.5
        return normal_kl(m1, s1, 0.0, 1.0) - entropy2 + normal_nll(step, 0.7) + normal_nll(miss, 0.5)

    return Case(two_model, guide, (), exact_loss, {"z1", "z2"})


def multivariate(exact: bool = False) -> Case:
    """One site with three correlated entries: z ~ N(0, I), x = 1.3 ~ N(<w, z>, .5)."""
    w = torch.tensor([1.0, -0.5, 2.0])
    loc, scale_tril = torch.tensor([0.4, 0.1, 0.8]), torch.eye(3) + 0.3 * torch.ones(3, 3).tril(-1)
    if exact:
        cov = torch.linalg.inv(torch.eye(3) + 4 * torch.outer(w, w))
        loc, scale_tril = cov @ (4 * 1.3 * w), torch.linalg.cholesky(cov)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ w, 0.5), obs=torch.tensor(1.3))

    def q() -> Any:
        m = pyro.param("loc", lambda: loc.clone())
        tril = pyro.param("tril", lambda: scale_tril.clone(), constraint=constraints.lower_cholesky)
        return dist.MultivariateNormal(m, scale_tril=tril)

    def exact_loss() -> torch.Tensor:
        posterior = q()
        prior = dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3))
        square = (1.3 - posterior.mean @ w) ** 2 + w @ posterior.covariance_matrix @ w
        return kl_divergence(posterior, prior) + normal_nll(square, 0.5)

    return Case(model, lambda: pyro.sample("z", q()), (), exact_loss, {"z"})


# ---------------------------------------------------------------------------
# mix: mu ~ N(0, 2), tau ~ LogNormal(0, .7), w ~ Beta(2, 3), th_i ~ N(mu, tau),
# x_i ~ N(th_i w, .8).


def mix_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros(()), 0.7))
    w = pyro.sample("w", dist.Beta(torch.tensor(2.0), 3.0))
    with pyro.plate("data", len(x)):
        th = pyro.sample("th", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(th * w, 0.8), obs=x)


def mix() -> Case:
    """Hand-written mean field, wide, with a LogNormal and a Beta latent."""
    x = torch.tensor(CONJ_X)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(real("mu_loc", 0.4), positive("mu_scale", 1.0)))
        pyro.sample("tau", dist.LogNormal(real("tau_loc", 0.3), positive("tau_scale", 0.35)))
        pyro.sample("w", dist.Beta(positive("w_a", 2.5), positive("w_b", 1.8)))
        loc = real("th_loc", 0.5, -0.8, 1.0, 0.4)
        scale = positive("th_scale", 0.9, 0.8, 1.1, 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("th", dist.Normal(loc, scale))

    def exact_loss() -> torch.Tensor:
        p = {name: pyro.param(name) for name in pyro.get_param_store().keys()}
        q_w = dist.Beta(p["w_a"], p["w_b"])
        kl = normal_kl(p["mu_loc"], p["mu_scale"], 0.0, 2.0)
        kl = kl + normal_kl(p["tau_loc"], p["tau_scale"], 0.0, 0.7)
        kl = kl + kl_divergence(q_w, dist.Beta(torch.tensor(2.0), 3.0))
        m, s = p["th_loc"], p["th_scale"]
        square = (m - p["mu_loc"]) ** 2 + s**2 + p["mu_scale"] ** 2
        tau_power = (-2 * p["tau_loc"] + 2 * p["tau_scale"] ** 2).exp()  # E tau^-2
        # -E log p(th) - H(th): the two constants .5 log 2 pi cancel.
        local = 0.5 * square * tau_power + p["tau_loc"] - s.log() - 0.5
        w1, w2 = q_w.mean, q_w.variance + q_w.mean**2
        miss = x**2 - 2 * x * m * w1 + (m**2 + s**2) * w2
        return kl + (local + normal_nll(miss, 0.8)).sum()

    return Case(mix_model, guide, (x,), exact_loss, {"mu", "tau", "w", "th"})


# ---------------------------------------------------------------------------
# Discrete latents: k ~ Bernoulli(.4), z ~ N(2 k - 1, 1), x = .6 ~ N(z, .8).


def switch_model() -> None:
    k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4)))
    z = pyro.sample("z", dist.Normal(2 * k - 1, 1.0))
    pyro.sample("x", dist.Normal(z, 0.8), obs=torch.tensor(0.6))


def discrete_first() -> Case:
    """q(k) q(z | k), exact by enumeration of k."""

    def guide() -> None:
        k = pyro.sample("k", dist.Bernoulli(logits=real("logit", 0.3)))
        m, s = real("loc", -0.6, 0.9), positive("scale", 1.2, 0.8)
        pyro.sample("z", dist.Normal(m[k.long()], s[k.long()]))

    def exact_loss() -> torch.Tensor:
        m, s = pyro.param("loc"), pyro.param("scale")
        q_k = torch.stack([-pyro.param("logit"), pyro.param("logit")]).sigmoid()
        kl = normal_kl(m, s, torch.tensor([-1.0, 1.0]), 1.0)
        nelbo = kl + normal_nll((0.6 - m) ** 2 + s**2, 0.8)
        return (q_k * (q_k.log() - torch.tensor([0.6, 0.4]).log() + nelbo)).sum()

    return Case(switch_model, guide, (), exact_loss, {"z"})


def discrete_last() -> Case:
    """q(z) q(k | z), exact by Gauss-Hermite quadrature over z and enumeration of k."""

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(real("loc", 0.2), positive("scale", 1.1)))
        pyro.sample("k", dist.Bernoulli(logits=real("a", 0.3) + real("b", 0.7) * z))

    def exact_loss() -> torch.Tensor:
        nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(64))
        m, s, a, b = (pyro.param(name).double() for name in ("loc", "scale", "a", "b"))
        z = m + s * nodes
        k = torch.tensor([[0.0], [1.0]], dtype=z.dtype)
        log_q = dist.Bernoulli(logits=a + b * z).log_prob(k)
        log_p = dist.Bernoulli(torch.tensor(0.4, dtype=z.dtype)).log_prob(k)
        log_p = log_p + dist.Normal(2 * k - 1, 1.0).log_prob(z)
        inner = (log_q.exp() * (log_q - log_p)).sum(0) * weights / weights.sum()
        entropy = s.log() + HALF_LOG_2PI + 0.5
        return inner.sum() - entropy + normal_nll((0.6 - m) ** 2 + s**2, 0.8)

    return Case(switch_model, guide, (), exact_loss, {"z"})


# ---------------------------------------------------------------------------
# Not Gaussian.


def poisson(gamma: Any = dist.Gamma, exact: bool = False) -> Case:
    """rate ~ Gamma(2, 1), three counts ~ Poisson(rate). Posterior Gamma(10, 4).

    :param gamma: the guide's distribution: reparameterized, partly, or not at all.
    """
    counts = torch.tensor([3.0, 1.0, 4.0])
    init = (10.0, 4.0) if exact else (3.0, 1.5)

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Poisson(rate), obs=counts)

    def guide() -> None:
        a, b = positive("a", init[0]), positive("b", init[1])
        pyro.sample("rate", gamma(a, b))

    def exact_loss() -> torch.Tensor:
        a, b = pyro.param("a"), pyro.param("b")
        kl = kl_divergence(dist.Gamma(a, b), dist.Gamma(torch.tensor(2.0), 1.0))
        log_rate = a.digamma() - b.log()
        return kl + (a / b - counts * log_rate + (counts + 1).lgamma()).sum()

    return Case(model, guide, (), exact_loss, {"rate"} if gamma is dist.Gamma else ())


def lognormal_model(x: torch.Tensor) -> None:
    """tau_i ~ LogNormal(0, 1), x_i ~ N(log tau_i, .5): conj in another coordinate."""
    with pyro.plate("data", len(x)):
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(tau.log(), 0.5), obs=x)


# By name.
EXACT: Dict[str, Callable[[], Case]] = {
    "mean_field": conj,
    "subsample_scale_mask": subsample_scale_mask,
    "sequential_plate": sequential_plate,
    "learned_model": learned_model,
    "shared_parameter": shared_parameter,
    "delta_density": delta_density,
    "no_latents": no_latents,
    "hierarchical": two,
    "multivariate": multivariate,
    "mix": mix,
    "discrete_first": discrete_first,
    "discrete_last": discrete_last,
    "gamma": poisson,
    "gamma_partly_reparameterized": lambda: poisson(rejection_gamma.RejectionGamma),
    "gamma_score_function": lambda: poisson(fakes.NonreparameterizedGamma),
    "normal_score_function": lambda: conj(normal=fakes.NonreparameterizedNormal),
}
