# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Models with discrete and continuous latents that carry their exact gradients.

Each is a function of the number of replicates: copies of the model side by side in a plate,
with parameters of their own, so that one gradient of all is as many independent gradients.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Callable, Dict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing import fakes
from torch import Tensor
from torch.nn.functional import one_hot

from tests.infer.rao_blackwell.quadrature import exact_loss
from tests.support.cases import Case

X = (0.5, -1.2, 2.0, 0.3, 1.1)


@dataclass(frozen=True)
class Problem:
    """
    :param make: the case, by the number of replicates.
    :param int nesting: number of dims for plates, with that of the replicates.
    :param dict rules: sizes of the quadrature, see :class:`.quadrature.Nodes`.
    :param int num: of replicates, for a test of the mean.
    """

    make: Callable[[int], Case]
    nesting: int = 2
    rules: Dict[str, int] = field(default_factory=dict)
    num: int = 1000

    @cached_property
    def exact(self) -> Dict[str, Tensor]:
        """By parameter, the gradient of one replicate."""
        with fresh_store(), torch.random.fork_rng():
            case = self.make(1)
            return first_row(gradient(lambda: exact_loss(case, self.nesting, self.rules), case))

    def draw(self, elbo: Any, num_burn_in: int = 0) -> Dict[str, Tensor]:
        """By parameter, independent gradients ``[num, *shape]``, by one call after a burn-in."""
        with fresh_store():
            case = self.make(self.num)
            for _ in range(num_burn_in + 1):
                rows = gradient(lambda: elbo.differentiable_loss(case.model, case.guide, *case.args), case)
            return rows


def fresh_store() -> Any:
    return pyro.get_param_store().scope()


def gradient(loss: Callable[[], Any], case: Case) -> Dict[str, Tensor]:
    parameters = case.parameters()
    grads = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads)}


def first_row(rows: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: row[0] for name, row in rows.items()}


def fixed(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are the same in every test."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double, device="cpu")
    return draws.to(torch.empty(0))


def parameter(num: int, name: str, value: Tensor, constraint: Any = constraints.real) -> Tensor:
    """A copy of the value for each replicate, ``[num, *shape of the value]``."""
    return pyro.param(name, lambda: value.expand(num, *value.shape).clone(), constraint=constraint)


def positive(num: int, name: str, value: Tensor) -> Tensor:
    return parameter(num, name, value, constraints.positive)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """The elements of ``[..., K]`` at indices that broadcast with ``[...]``."""
    return (table * one_hot(index.long(), table.shape[-1]).to(table)).sum(-1)


def replicates(num: int, dim: int) -> Any:
    return pyro.plate("replicates", num, dim=dim)


def data(size: int = 5, dim: int = -1) -> Any:
    return pyro.plate("data", size, dim=dim)


def case(model: Callable, guide: Callable, num: int) -> Case:
    return Case(model, guide, (num,))


# -- One plate, and sites that depend on each other both ways -------------------------


def chain(num: int) -> Case:
    """z -> y -> d: Gaussian, categorical, Bernoulli, in a plate of 5, scaled by 3 and masked."""
    x, mask = torch.tensor(X), torch.tensor([True, True, False, True, True])

    def model(num: int) -> None:
        loc = parameter(num, "locs", fixed(1, 6, seed=1))
        with poutine.scale(scale=3.0), poutine.mask(mask=mask), replicates(num, -2), data():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(logits=fixed(6, seed=2) + fixed(6, seed=3) * z.unsqueeze(-1)))
            d = pyro.sample("d", dist.Bernoulli(logits=0.8 * z + pick(fixed(6, seed=4), y)))
            pyro.sample("x", dist.Normal(z + pick(loc, y) + 1.5 * d, 0.9), obs=x)

    def guide(num: int) -> None:
        loc = parameter(num, "loc", 0.5 * fixed(5, seed=5))
        scale = positive(num, "scale", (0.3 * fixed(5, seed=6)).exp())
        bias = parameter(num, "bias", 0.7 * fixed(5, 6, seed=7))
        slope = parameter(num, "slope", 0.5 * fixed(5, 6, seed=8))
        on, by_z = parameter(num, "on", 0.7 * fixed(5, 6, seed=9)), parameter(num, "by_z", 0.5 * fixed(5, seed=10))
        with poutine.scale(scale=3.0), poutine.mask(mask=mask), replicates(num, -2), data():
            z = pyro.sample("z", dist.Normal(loc, scale))
            y = pyro.sample("y", dist.Categorical(logits=bias + slope * z.unsqueeze(-1)))
            pyro.sample("d", dist.Bernoulli(logits=pick(on, y) + by_z * z))

    return case(model, guide, num)


def regression(num: int) -> Case:
    """Linear weights, a switch of five values for each row, and a LogNormal scale."""
    x, y, steps = fixed(4, 12, seed=1), fixed(4, seed=2), 1.5 * fixed(5, seed=3)

    def model(num: int) -> None:
        with replicates(num, -2):
            w = pyro.sample("w", dist.Normal(torch.zeros(12), 1.5).to_event(1))
            tau = pyro.sample("tau", dist.LogNormal(0.2, 0.7))
            with data(4):
                s = pyro.sample("s", dist.Categorical(logits=torch.zeros(5)))
                f = (w @ x.mT).squeeze(-2)
                pyro.sample("y", dist.Normal(f + pick(steps, s), tau), obs=y)

    def guide(num: int) -> None:
        loc = parameter(num, "loc", 0.3 * fixed(1, 12, seed=4))
        scale = positive(num, "scale", 0.5 * (0.3 * fixed(1, 12, seed=5)).exp())
        log_tau = parameter(num, "log_tau", torch.full((1,), 0.4))
        tau_scale = positive(num, "tau_scale", torch.full((1,), 0.15))
        logits = parameter(num, "logits", 0.7 * fixed(4, 5, seed=6))
        with replicates(num, -2):
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))
            pyro.sample("tau", dist.LogNormal(log_tau, tau_scale))
            with data(4):
                pyro.sample("s", dist.Categorical(logits=logits))

    return case(model, guide, num)


def score_function(num: int, **infer: Any) -> Case:
    """A Gamma, a vector of bits, and a Gaussian."""
    x = fixed(3, seed=1)

    def model(num: int) -> None:
        with replicates(num, -1):
            g = pyro.sample("g", dist.Gamma(3.0, 2.0))
            b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = 1.5 * b + z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, g.rsqrt().unsqueeze(-1)).to_event(1), obs=x)

    def guide(num: int) -> None:
        a, rate = positive(num, "a", torch.tensor(2.5)), positive(num, "rate", torch.tensor(2.0))
        logits = parameter(num, "logits", fixed(3, seed=2))
        loc, scale = parameter(num, "loc", torch.tensor(0.4)), positive(num, "scale", torch.tensor(0.8))
        with replicates(num, -1):
            pyro.sample("g", fakes.NonreparameterizedGamma(a, rate), infer=infer)
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1), infer=infer)
            pyro.sample("z", dist.Normal(loc, scale))

    return case(model, guide, num)


def discrete_first(num: int) -> Case:
    """y -> z -> d: a Gaussian between a categorical and a Bernoulli site."""
    x, locs = torch.tensor(X), 1.5 * fixed(4, seed=1)

    def model(num: int) -> None:
        prior = parameter(num, "prior", fixed(1, 4, seed=2))
        with replicates(num, -2), data():
            y = pyro.sample("y", dist.Categorical(logits=prior))
            z = pyro.sample("z", dist.Normal(pick(locs, y), 1.0))
            d = pyro.sample("d", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(z - d, 0.8), obs=x)

    def guide(num: int) -> None:
        logits = parameter(num, "logits", 0.7 * fixed(5, 4, seed=3))
        loc = parameter(num, "loc", fixed(1, 4, seed=4))
        scale = positive(num, "scale", (0.3 * fixed(1, 4, seed=5)).exp())
        slope = parameter(num, "slope", 0.5 * fixed(5, seed=6))
        with replicates(num, -2), data():
            y = pyro.sample("y", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(pick(loc, y), pick(scale, y)))
            pyro.sample("d", dist.Bernoulli(logits=slope * z + 0.3))

    return case(model, guide, num)


def nested(num: int) -> Case:
    """An outer categorical, and in an inner plate a Gaussian and a Bernoulli that depend on it."""
    x, locs = fixed(3, 2, seed=1), fixed(4, seed=2)

    def model(num: int) -> None:
        with replicates(num, -3), data(2):
            a = pyro.sample("a", dist.Categorical(logits=fixed(4, seed=3)))
            with pyro.plate("inner", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(pick(locs, a), 1.0))
                b = pyro.sample("b", dist.Bernoulli(logits=z))
                pyro.sample("x", dist.Normal(z + b, 0.8), obs=x)

    def guide(num: int) -> None:
        logits = parameter(num, "logits", 0.7 * fixed(1, 2, 4, seed=4))
        loc = parameter(num, "loc", fixed(3, 2, 4, seed=5))
        scale = positive(num, "scale", torch.full((3, 2), 0.8))
        slope = parameter(num, "slope", 0.5 * fixed(3, 2, seed=6))
        with replicates(num, -3), data(2):
            a = pyro.sample("a", dist.Categorical(logits=logits))
            with pyro.plate("inner", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(pick(loc, a), scale))
                pyro.sample("b", dist.Bernoulli(logits=slope * z + 0.2))

    return case(model, guide, num)


PROBLEMS: Dict[str, Problem] = {
    "chain": Problem(chain, rules={"z": 60}),
    "regression": Problem(regression, rules={"w": 0, "tau": 30}),
    "score_function": Problem(score_function, 1, {"g": 300, "b": 0, "z": 10}, 4000),
    "discrete_first": Problem(discrete_first, rules={"z": 60}),
    "nested": Problem(nested, 3, {"z": 60}),
}
