# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models of one, two and several latents whose ELBO under RVRSGuide is a sum on a grid."""

from typing import Any, Dict, Optional

import pyro
import pyro.distributions as dist
import torch

from tests.support.cases import positive, real


def bound(lw: torch.Tensor, lq: torch.Tensor, T: Any, epsilon: float) -> torch.Tensor:
    """The ELBO of each problem; ``lw`` and ``lq`` ``[grid, *batch]``, with cell volumes in
    ``lq``."""
    a = epsilon + (1 - epsilon) * torch.sigmoid(lw + T)
    z = (lq.exp() * a).sum(0)
    return ((lq.exp() * a * (lw - a.log())).sum(0)) / z + z.log()


GRID = torch.linspace(-9.0, 9.0, 3001, dtype=torch.float64)


def curve(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * z + 1.5 * (2 * z).tanh()


def one_model() -> None:
    """Skewed, with a learned prior mean and noise. Log densities fall no faster than a
    square, lest the tests need draws that are never seen."""
    z = pyro.sample("z", dist.Normal(real("prior", 0.4), 1.0))
    pyro.sample("x", dist.Normal(curve(z), positive("noise", 0.8)), obs=torch.tensor(2.0))


def one_guide() -> None:
    pyro.sample("z", dist.Normal(real("loc", 0.2), positive("scale", 0.9)))


def one_bound(T: float, epsilon: float) -> torch.Tensor:
    z, step = GRID, (GRID[1] - GRID[0]).log()
    lp = dist.Normal(pyro.param("prior"), 1.0).log_prob(z)
    lp = lp + dist.Normal(curve(z), pyro.param("noise")).log_prob(torch.tensor(2.0))
    lq = dist.Normal(pyro.param("loc"), pyro.param("scale")).log_prob(z)
    return bound(lp - lq, lq + step, T, epsilon)


def two_model() -> None:
    """Two latents, of which one is positive and sits in a plate, and the other in none."""
    a = pyro.sample("a", dist.Normal(0.0, real("width", 0.2).exp()))
    with pyro.plate("items", 1):
        b = pyro.sample("b", dist.LogNormal(a, 0.7))
        pyro.sample("x", dist.Normal(curve(b.log()) + a, 0.6), obs=torch.tensor([1.5]))


def two_guide() -> None:
    """The second depends on the first."""
    a = pyro.sample("a", dist.Normal(real("m", 0.7), positive("s", 0.6)))
    with pyro.plate("items", 1):
        pyro.sample("b", dist.LogNormal(real("slope", 0.5) * a, positive("t", 0.5)))


def two_bound(T: float, epsilon: float) -> torch.Tensor:
    a = torch.linspace(-4.0, 5.0, 401, dtype=torch.float64).unsqueeze(-1)
    u = torch.linspace(-5.0, 5.0, 401, dtype=torch.float64)  # log b
    step = ((a[1] - a[0]) * (u[1] - u[0])).log()
    param = pyro.param
    lp = dist.Normal(0.0, param("width").exp()).log_prob(a)
    lp = lp + dist.Normal(a, 0.7).log_prob(u)
    lp = lp + dist.Normal(curve(u) + a, 0.6).log_prob(torch.tensor(1.5))
    lq = dist.Normal(param("m"), param("s")).log_prob(a)
    lq = lq + dist.Normal(param("slope") * a, param("t")).log_prob(u)
    return bound((lp - lq).reshape(-1), (lq + step).reshape(-1), T, epsilon)


#: model, guide, bound, and a threshold at which about a third is accepted.
CASES: Dict[str, Any] = {
    "one": (one_model, one_guide, one_bound, 1.2),
    "two": (two_model, two_guide, two_bound, 1.7),
}


# Local latents: z_n ~ N(g, 1), x_n ~ N(curve(z_n), noise), with g = prior, or g drawn.

X = (0.5, -1.2, 2.0, 0.3)


class Local:
    """
    :param subsample_size: of the plate, or None.
    :param has_global: whether g is a latent, outside of the plate.
    """

    def __init__(self, subsample_size: Optional[int] = None, has_global: bool = False) -> None:
        self.subsample_size = subsample_size
        self.has_global = has_global

    def items(self) -> Any:
        return pyro.plate("items", len(X), subsample_size=self.subsample_size)

    def model(self) -> None:
        g = real("prior", 0.4)
        if self.has_global:
            g = pyro.sample("g", dist.Normal(g, 0.8))
        with self.items() as i:
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(curve(z), positive("noise", 0.8)), obs=torch.tensor(X)[i])

    def guide(self) -> None:
        g = 0.0
        if self.has_global:
            g = pyro.sample("g", dist.Normal(real("m", 0.3), positive("s", 0.5)))
        loc, scale = real("loc", 0.1, -0.4, 0.9, 0.2), positive("scale", 0.9, 0.7, 0.6, 1.0)
        with self.items() as i:
            pyro.sample("z", dist.Normal(loc[i] + 0.3 * g, scale[i]))

    def bound(self, T: torch.Tensor, epsilon: float) -> torch.Tensor:
        """:param T: one for each item."""
        param = pyro.param
        if not self.has_global:
            return self._items(param("prior"), 0.0, T, epsilon).sum()
        q, p = dist.Normal(param("m"), param("s")), dist.Normal(param("prior"), 0.8)
        g = torch.linspace(-6.0, 6.0, 121, dtype=torch.float64)
        g = q.loc + q.scale * g  # the gradient passes through the nodes, or the weights
        g = g.detach()
        total = self._items(g.unsqueeze(-1), g.unsqueeze(-1), T, epsilon).sum(-1)
        log_ratio = p.log_prob(g) - q.log_prob(g)
        return (q.log_prob(g).exp() * (g[1] - g[0]) * (log_ratio + total)).sum()

    def _items(self, prior: Any, g: Any, T: torch.Tensor, epsilon: float) -> torch.Tensor:
        param = pyro.param
        z = GRID[::3].reshape(-1, 1, 1) if self.has_global else GRID.reshape(-1, 1)
        step = (z[1] - z[0]).log()
        lp = dist.Normal(prior, 1.0).log_prob(z)
        lp = lp + dist.Normal(curve(z), param("noise")).log_prob(torch.tensor(X))
        lq = dist.Normal(param("loc") + 0.3 * torch.as_tensor(g), param("scale")).log_prob(z)
        return bound(lp - lq, lq + step, T, epsilon)
