# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Importance-weighted bounds by quadrature, for any number of particles, and models for
which that is feasible: at most three Normal latents in each independent item."""

import dataclasses
import itertools
from typing import Any, Callable, Dict, Optional, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from tests.support.cases import Case, positive, real
from tests.support.guides import move
from tests.support.models import (
    CONJ_X,
    LOC,
    SCALE,
    conj_guide,
    conj_model,
    two,
    two_model,
)


def grid(num_dims: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Standard normal nodes ``[M, num_dims]`` and their weights ``[M]``."""
    num_points = {1: 400, 2: 90, 3: 30}[num_dims]
    points = torch.linspace(-7.0, 7.0, num_points)
    nodes = torch.cartesian_prod(*[points] * num_dims).reshape(-1, num_dims)
    weights = (-0.5 * nodes.square().sum(-1)).exp()
    return nodes, weights / weights.sum()


def iwae_loss(log_w: torch.Tensor, weights: torch.Tensor, num_particles: int) -> torch.Tensor:
    """
    Minus the bound, by Frullani's integral ``log s = int (exp(-t) - exp(-t s)) / t dt``:
    the expectation of ``exp(-t s)`` is a product over particles.

    :param log_w: log weights at the nodes, ``[M]``.
    :param weights: of the nodes, ``[M]``.
    """
    shift = (log_w + weights.log()).logsumexp(0).detach()
    w = (log_w - shift).exp()
    step = 0.25
    t = torch.arange(-30.0, 50.0, step).exp()
    laplace = torch.cat([weights @ torch.exp(-w[:, None] * part) for part in t.split(100)])
    log_sum = step * ((-t).exp() - laplace**num_particles).sum()
    return -(log_sum + shift - torch.tensor(float(num_particles)).log())


def log_normal(x: Any, loc: Any, scale: Any) -> torch.Tensor:
    return dist.Normal(torch.as_tensor(loc), scale).log_prob(torch.as_tensor(x))


@dataclasses.dataclass
class Bound:
    """A case, and its exact loss for ``num_particles``. Its parameters may be moved."""

    case: Case
    exact: Callable[[int], torch.Tensor]
    nesting: int  # plates of the case

    def gradient(self, num_particles: int) -> Dict[str, torch.Tensor]:
        parameters = self.case.parameters()
        grads = torch.autograd.grad(self.exact(num_particles), list(parameters.values()))
        return dict(zip(parameters, grads))

    def replicate(self, size: int, subsample: Optional[Tuple[int, ...]] = None) -> Case:
        """``size`` independent copies in an outer plate, so that one call gives the sum
        of as many draws; of one subsample, if it is given."""
        plate, model, guide = pyro.plate("replicates", size, dim=-self.nesting - 1), self.case.model, self.case.guide
        if subsample is not None:
            model, guide = (_Subsample(subsample)(f) for f in (model, guide))
        return dataclasses.replace(self.case, model=plate(model), guide=plate(guide))

    def draw_gradients(
        self, elbo: Any, num_calls: int, size: int = 100, each_subsample: bool = False
    ) -> Dict[str, torch.Tensor]:
        """
        Means over ``size`` draws, ``[num_calls, *shape]``; and over each subsample that the plate may take, so that
        none of the noise is that of the subsample.
        """
        subsamples = self.case.subsamples if each_subsample else ()
        cases = [self.replicate(size, subsample) for subsample in subsamples or [None]]
        parameters, rows = self.case.parameters(), []
        for _ in range(num_calls):
            for case in cases:
                with pyro.validation_enabled(False):
                    elbo.loss_and_grads(case.model, case.guide, *case.args)
            rows.append({name: p.grad / (size * len(cases)) for name, p in parameters.items()})
            for p in parameters.values():
                p.grad = None
        return {name: torch.stack([row[name] for row in rows]) for name in parameters}


class _Subsample(Messenger):
    """The plate that takes a subsample takes this one."""

    def __init__(self, indices: Tuple[int, ...]) -> None:
        super().__init__()
        self.indices = torch.tensor(indices)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["fn"].subsample_size == len(self.indices):
            msg["value"] = self.indices


def items() -> Bound:
    """conj with a learned prior mean: one weight for each item."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        prior = real("prior", 0.4)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    case = Case(model, conj_guide(LOC, SCALE), (x,), tapped={"z"})
    return Bound(case, lambda k: sum(_item_losses(x, k, pyro.param("prior"))), 1)


def _item_losses(x: torch.Tensor, num_particles: int, prior: Any = 0.0) -> Any:
    nodes, weights = grid(1)
    m, s = pyro.param("loc"), pyro.param("scale")
    for i, x_i in enumerate(x):
        z = m[i] + s[i] * nodes[:, 0]
        log_w = log_normal(z, prior, 1.0) + log_normal(x_i, z, 0.5)
        yield iwae_loss(log_w - log_normal(z, m[i], s[i]), weights, num_particles)


def subsampled_items() -> Bound:
    """conj, two of four items at a time. The bound is that of all items."""
    x = torch.tensor(CONJ_X)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 4, subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        m, s = real("loc", *LOC), positive("scale", *SCALE)
        with pyro.plate("data", 4, subsample_size=2) as i:
            pyro.sample("z", dist.Normal(m[i], s[i]))

    case = Case(model, guide, (x,), tapped={"z"}, subsamples=tuple(itertools.combinations(range(4), 2)))
    return Bound(case, lambda k: sum(_item_losses(x, k)), 1)


def unplated_guide() -> Bound:
    """conj with an AutoDiagonalNormal: its site is outside of the plate, so that there is
    one weight for both items."""
    x = torch.tensor(CONJ_X[:2])
    guide = AutoDiagonalNormal(conj_model, init_scale=0.8)
    case = move(Case(conj_model, guide, (x,), tapped={"_AutoDiagonalNormal_latent"}))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(2)
        z = guide.loc + guide.scale * nodes
        log_w = log_normal(z, 0.0, 1.0) + log_normal(x, z, 0.5)
        log_w = log_w - log_normal(z, guide.loc, guide.scale)
        return iwae_loss(log_w.sum(-1), weights, num_particles)

    return Bound(case, exact, 1)


def hierarchical() -> Bound:
    """two: q(z1) q(z2 | z1)."""
    case = two()

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(2)
        m1, s1, a, b, s2 = (pyro.param(name) for name in ("m1", "s1", "a", "b", "s2"))
        z1 = m1 + s1 * nodes[:, 0]
        z2 = a + b * z1 + s2 * nodes[:, 1]
        log_w = log_normal(z1, 0.0, 1.0) + log_normal(z2, z1, 0.7) + log_normal(1.3, z2, 0.5)
        log_w = log_w - log_normal(z1, m1, s1) - log_normal(z2, a + b * z1, s2)
        return iwae_loss(log_w, weights, num_particles)

    return Bound(case, exact, 0)


def full_rank() -> Bound:
    """two with one MultivariateNormal, as a Delta guide makes of an auxiliary site."""

    def q() -> Any:
        tril = pyro.param(
            "tril", torch.tensor([[1.1, 0.0], [-0.3, 0.9]]), constraint=constraints.lower_cholesky
        )
        return dist.MultivariateNormal(real("loc", 0.3, 0.1), scale_tril=tril)

    def guide() -> None:
        z = pyro.sample("joint", q(), infer={"is_auxiliary": True})
        for i, name in enumerate(["z1", "z2"]):
            pyro.sample(name, dist.Delta(z[..., i]))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(2)
        z = q().loc + nodes @ q().scale_tril.T
        log_w = log_normal(z[:, 0], 0.0, 1.0) + log_normal(z[:, 1], z[:, 0], 0.7)
        log_w = log_w + log_normal(1.3, z[:, 1], 0.5) - q().log_prob(z)
        return iwae_loss(log_w, weights, num_particles)

    return Bound(Case(two_model, guide, tapped={"joint"}), exact, 0)


def nested_plates() -> Bound:
    """Two groups of two items: one weight for each group."""
    x = torch.tensor([[0.5, -1.2], [2.0, 0.3]])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(real("prior", 0.4), 1.0))
            with pyro.plate("items", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(u, 0.8))
                pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(real("u_loc", 0.2, 0.7)[:, None], positive("u_scale", 1.1)))
            with pyro.plate("items", 2, dim=-1):
                loc = real("z_loc", 0.3) + real("slope", 0.5) * u + 0.3 * x
                pyro.sample("z", dist.Normal(loc, positive("z_scale", 0.9)))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(3)
        p = {name: pyro.param(name) for name in pyro.get_param_store().keys()}
        total: Any = 0.0
        for group in range(2):
            u = p["u_loc"][group] + p["u_scale"] * nodes[:, 0]
            log_w = log_normal(u, p["prior"], 1.0) - log_normal(u, p["u_loc"][group], p["u_scale"])
            for item in range(2):
                loc = p["z_loc"] + p["slope"] * u + 0.3 * x[group, item]
                z = loc + p["z_scale"] * nodes[:, 1 + item]
                log_w = log_w + log_normal(z, u, 0.8) + log_normal(x[group, item], z, 0.6)
                log_w = log_w - log_normal(z, loc, p["z_scale"])
            total = total + iwae_loss(log_w, weights, num_particles)
        return total

    return Bound(Case(model, guide, (x,), tapped={"u", "z"}), exact, 2)


def global_and_local() -> Bound:
    """u outside of the plate, z_i within: one weight."""
    x = torch.tensor(CONJ_X[:2])

    def model(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(u, 0.8))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("u", dist.Normal(real("u_loc", 0.2), positive("u_scale", 1.1)))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(real("z_loc", 0.3, -0.6), positive("z_scale", 0.9, 0.7)))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(3)
        m, s = pyro.param("z_loc"), pyro.param("z_scale")
        u = pyro.param("u_loc") + pyro.param("u_scale") * nodes[:, :1]
        z = m + s * nodes[:, 1:]
        log_w = log_normal(u, 0.0, 1.0) - log_normal(u, pyro.param("u_loc"), pyro.param("u_scale"))
        local = log_normal(z, u, 0.8) + log_normal(x, z, 0.6) - log_normal(z, m, s)
        return iwae_loss(log_w.sum(-1) + local.sum(-1), weights, num_particles)

    return Bound(Case(model, guide, (x,), tapped={"u", "z"}), exact, 1)


def tempered() -> Bound:
    """hierarchical, with other scales in guide and model, and for each draw: below 1 for the
    one that enters the other's distribution, and above."""

    def model() -> None:
        with poutine.scale(scale=0.7):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
        with poutine.scale(scale=1.2):
            z2 = pyro.sample("z2", dist.Normal(z1, 0.7))
        pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.3))
        pyro.factor("constant", torch.tensor(-2.0))  # a loss that is not near zero

    def guide() -> None:
        with poutine.scale(scale=0.4):
            z1 = pyro.sample("z1", dist.Normal(real("m1", 0.3), positive("s1", 0.8)))
        loc = real("a", 0.2) + real("b", 0.6) * z1
        with poutine.scale(scale=2.5):
            pyro.sample("z2", dist.Normal(loc, positive("s2", 0.6)))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(2)
        m1, s1, a, b, s2 = (pyro.param(name) for name in ("m1", "s1", "a", "b", "s2"))
        z1 = m1 + s1 * nodes[:, 0]
        z2 = a + b * z1 + s2 * nodes[:, 1]
        log_p = 0.7 * log_normal(z1, 0.0, 1.0) + 1.2 * log_normal(z2, z1, 0.7)
        log_q = 0.4 * log_normal(z1, m1, s1) + 2.5 * log_normal(z2, a + b * z1, s2)
        log_w = log_p + log_normal(1.3, z2, 0.5) - 2.0 - log_q
        return iwae_loss(log_w, weights, num_particles)

    return Bound(Case(model, guide, tapped={"z1", "z2"}), exact, 0)


def tempered_elements() -> Bound:
    """Elements of one site with scales of their own, of which one is masked out."""
    x, scale = torch.tensor(CONJ_X[:3]), torch.tensor([0.5, 1.6, 1.0])
    mask = torch.tensor([True, True, False])

    def model(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(u, 0.8))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(real("u_loc", 0.2), positive("u_scale", 0.8)))
        with pyro.plate("data", 3), poutine.scale(scale=scale), poutine.mask(mask=mask):
            loc = real("z_loc", 0.3, -0.6, 0.4) + real("slope", 0.5) * u
            pyro.sample("z", dist.Normal(loc, positive("z_scale", 0.7, 0.6, 0.5)))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(3)
        # The masked element is drawn, and has no effect.
        m, s = pyro.param("z_loc")[:2], pyro.param("z_scale")[:2]
        u = pyro.param("u_loc") + pyro.param("u_scale") * nodes[:, :1]
        loc = m + pyro.param("slope") * u
        z = loc + s * nodes[:, 1:]
        log_w = log_normal(u, 0.0, 1.0) - log_normal(u, pyro.param("u_loc"), pyro.param("u_scale"))
        local = log_normal(z, u, 0.8) + log_normal(x[:2], z, 0.6)
        local = local - scale[:2] * log_normal(z, loc, s)
        return iwae_loss(log_w.sum(-1) + local.sum(-1), weights, num_particles)

    return Bound(Case(model, guide, (x,), tapped={"u", "z"}), exact, 1)


def subsampled_locals() -> Bound:
    """A latent outside of the plate, of which one of two items is taken: one weight, in which
    the log densities of the item count twice."""
    x = torch.tensor(CONJ_X[:2])

    def model(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 2, subsample_size=1) as i:
            z = pyro.sample("z", dist.Normal(u, 0.8))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        u = pyro.sample("u", dist.Normal(real("u_loc", 0.2), positive("u_scale", 0.6)))
        m, s = real("z_loc", 0.3, -0.6), positive("z_scale", 0.6, 0.5)
        with pyro.plate("data", 2, subsample_size=1) as i:
            pyro.sample("z", dist.Normal(m[i] + real("slope", 0.4) * u, s[i]))

    def exact(num_particles: int) -> torch.Tensor:
        nodes, weights = grid(2)
        m, s, slope = (pyro.param(name) for name in ("z_loc", "z_scale", "slope"))
        u = pyro.param("u_loc") + pyro.param("u_scale") * nodes[:, 0]
        log_w = log_normal(u, 0.0, 1.0) - log_normal(u, pyro.param("u_loc"), pyro.param("u_scale"))
        losses = []
        for i in range(2):
            loc = m[i] + slope * u
            z = loc + s[i] * nodes[:, 1]
            local = log_normal(z, u, 0.8) + log_normal(x[i], z, 0.6) - log_normal(z, loc, s[i])
            losses.append(iwae_loss(log_w + 2.0 * local, weights, num_particles))
        return sum(losses) / 2

    return Bound(Case(model, guide, (x,), tapped={"u", "z"}, subsamples=((0,), (1,))), exact, 1)


BOUNDS: Dict[str, Callable[[], Bound]] = {
    f.__name__: f
    for f in (
        items,
        subsampled_items,
        unplated_guide,
        hierarchical,
        full_rank,
        nested_plates,
        global_and_local,
        tempered,
        tempered_elements,
        subsampled_locals,
    )
}
