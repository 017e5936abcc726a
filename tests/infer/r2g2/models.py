# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models with linear functions of Gaussian values, for the tests of R2G2_ELBO."""

from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_rb.infer import R2G2_ELBO
from tests.support.cases import Case, normal_nll
from tests.support.elbo_contract import evaluate


def fixed(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are the same in every test."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return draws.to(torch.empty(0).device)


def spent(case: Case, **kwargs: Any) -> R2G2_ELBO:
    """A loss that has done its steps: the plain gradient, with analytic KL."""
    elbo = R2G2_ELBO(num_steps=1, **kwargs)
    evaluate(elbo, case)
    return elbo


def gaussian(name: str, kind: str, n: int, width: float = 0.4) -> Callable[[], Any]:
    """Makes parameters of a Gaussian over vectors of length ``n``, and the distribution."""

    def make() -> Any:
        loc = pyro.param(f"{name}.loc", lambda: 0.3 * fixed(n, seed=1))
        if kind == "diagonal":
            scale = pyro.param(
                f"{name}.scale",
                lambda: width * (0.3 * fixed(n, seed=2)).exp(),
                constraint=constraints.positive,
            )
            return dist.Normal(loc, scale).to_event(1)
        if kind == "scale_tril":
            tril = pyro.param(
                f"{name}.tril",
                lambda: width * (torch.eye(n) + (0.3 * fixed(n, n, seed=3)).tril(-1)),
                constraint=constraints.lower_cholesky,
            )
            return dist.MultivariateNormal(loc, scale_tril=tril)
        factor = pyro.param(f"{name}.factor", lambda: width * 0.5 * fixed(n, 2, seed=4))
        diagonal = pyro.param(
            f"{name}.diagonal",
            lambda: width**2 * (0.3 * fixed(n, seed=5)).exp(),
            constraint=constraints.positive,
        )
        return dist.LowRankMultivariateNormal(loc, factor, diagonal)

    return make


KINDS = ("diagonal", "scale_tril", "low_rank")


def regression(
    kind: str = "diagonal", n: int = 8, rows: int = 3, is_logistic: bool = False
) -> Case:
    """Bayesian linear or logistic regression, with its exact loss by quadrature."""
    x = fixed(rows, n, seed=6)
    y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])[:rows]
    make = gaussian("w", kind, n)
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.5).expand([n]).to_event(1))
        z = x @ w
        with pyro.plate("data", rows):
            fn = dist.Bernoulli(logits=z) if is_logistic else dist.Normal(z, 0.7)
            pyro.sample("y", fn, obs=y)

    def guide() -> None:
        pyro.sample("w", make())

    def exact_loss() -> Tensor:
        q = make()
        prior = dist.MultivariateNormal(torch.zeros(n), 2.25 * torch.eye(n))
        full = dist.MultivariateNormal(q.mean, covariance(q))
        mean, var = x @ q.mean, ((x @ covariance(q)) * x).sum(-1)
        if is_logistic:
            z = mean[:, None] + var.sqrt()[:, None] * nodes.to(mean)
            nll = -dist.Bernoulli(logits=z).log_prob(y[:, None]) * weights.to(mean)
            nll = nll.sum(-1) / weights.sum().to(mean)
        else:
            nll = normal_nll((y - mean).square() + var, 0.7)
        return kl_divergence(full, prior) + nll.sum()

    return Case(model, guide, (), exact_loss)


def covariance(q: Any) -> Tensor:
    if hasattr(q, "covariance_matrix"):
        return q.covariance_matrix
    return torch.diag_embed(q.variance)


class Net(PyroModule):
    """A multi-layer perceptron with one output and standard normal weights."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.num_layers = len(sizes) - 1
        for i, (k, h) in enumerate(zip(sizes, sizes[1:])):
            layer = PyroModule[torch.nn.Linear](k, h)
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([h, k]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([h]).to_event(1))
            setattr(self, f"l{i}", layer)

    def forward(self, x: Tensor, y: Optional[Tensor] = None) -> Tensor:
        for i in range(self.num_layers):
            x = getattr(self, f"l{i}")(x if i == 0 else torch.tanh(x))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x.squeeze(-1), 0.5), obs=y)


def net(guide: str = "AutoNormal", sizes: Sequence[int] = (8, 6, 6, 1), rows: int = 3) -> Case:
    """A Bayesian neural network with an autoguide away from its initial values."""
    model = Net(sizes)
    x, y = fixed(rows, sizes[0], seed=7), fixed(rows, seed=8)
    made = getattr(autoguide, guide)(model, init_scale=0.2, init_loc_fn=autoguide.init_to_mean)
    case = Case(model, made, (x, y))
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(case.parameters().items())):
            p.add_((0.4 if "loc" in name else 0.2) * fixed(*p.shape, seed=20 + i))
    return case


def weights(
    use: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int] = (4, 6),
    rows: int = 3,
    prior: Any = None,
    width: float = 0.4,
) -> Case:
    """One matrix of weights with a diagonal guide; ``use(x, w)`` predicts data."""
    x = fixed(rows, shape[-1], seed=9)
    size = int(np.prod(shape))

    def model() -> None:
        p = dist.Normal(torch.zeros(shape), 1.0) if prior is None else prior(shape)
        w = pyro.sample("w", p.to_event(len(shape)))
        f = use(x, w)
        y = 0.5 * fixed(*f.shape, seed=10)
        pyro.sample("y", dist.Normal(f, 0.5).to_event(f.dim()), obs=y)

    def guide() -> None:
        loc = pyro.param("w.loc", lambda: 0.5 * fixed(size, seed=11).reshape(tuple(shape)))
        scale = pyro.param(
            "w.scale",
            lambda: width * (0.3 * fixed(size, seed=12).reshape(tuple(shape))).exp(),
            constraint=constraints.positive,
        )
        pyro.sample("w", dist.Normal(loc, scale).to_event(len(shape)))

    return Case(model, guide, ())


def treatments(elbo: R2G2_ELBO) -> Dict[str, str]:
    return {row.site: row.treatment for row in elbo.report()}


def reasons(elbo: R2G2_ELBO) -> Dict[str, str]:
    return {row.site: row.reason for row in elbo.report()}
