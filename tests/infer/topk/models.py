# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Models with discrete latents whose exact gradient Pyro can compute: by enumerating every
discrete site of the guide.

Each function makes a :class:`~tests.support.cases.Case`, in the default dtype.
"""

from typing import Any, Callable, Dict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from tests.support.cases import Case, positive, real

X = (0.5, -1.2, 2.0, 0.3)


def table(name: str, *shape: int, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    """A parameter of normal draws, the same at each call with the same name and shape."""

    def init() -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed + sum(map(ord, name)))
            return scale * torch.randn(shape)

    return pyro.param(name, init)


def fixed(*shape: int, seed: int = 0) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randn(shape)


def one_site(num: int = 6, learned: bool = True) -> Case:
    cost, prior = fixed(num), fixed(num, seed=1)

    def model() -> None:
        scale = positive("scale", 1.3) if learned else 1.3
        z = pyro.sample("z", dist.Categorical(logits=prior))
        pyro.sample("x", dist.Normal(cost[z], scale), obs=torch.tensor(0.7))

    def guide() -> None:
        pyro.sample("z", dist.Categorical(logits=table("logits", num)))

    return Case(model, guide)


def mixture(num: int = 5, kind: str = "Categorical") -> Case:
    """A plate, with learned weights and locations that depend on z."""
    x = torch.tensor(X)

    def model(x: torch.Tensor) -> None:
        logits, locs = table("weights", num), table("locs", num, scale=2.0)
        with pyro.plate("data", len(x)):
            if kind == "OneHotCategorical":
                z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
                loc = (z * locs).sum(-1)
            else:
                loc = locs[pyro.sample("z", dist.Categorical(logits=logits))]
            pyro.sample("x", dist.Normal(loc, 0.8), obs=x)

    def guide(x: torch.Tensor) -> None:
        logits = table("logits", len(x), num)
        with pyro.plate("data", len(x)):
            pyro.sample("z", getattr(dist, kind)(logits=logits))

    return Case(model, guide, (x,))


def dependent_sites() -> Case:
    """q(a) q(b | a) q(c), and a likelihood of all three, in a plate."""
    x, cost = torch.tensor(X), fixed(4, 3, 3)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=table("p_a", 4)))
            b = pyro.sample("b", dist.Categorical(logits=Vindex(table("p_b", 4, 3))[a]))
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(Vindex(cost)[a, b, c], 0.9), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=table("q_a", len(x), 4)))
            b = pyro.sample("b", dist.Categorical(logits=Vindex(table("q_b", 4, 3))[a]))
            pyro.sample("c", dist.Categorical(logits=table("q_c", len(x), 3)))
            assert b.shape[-1] in (1, len(x))

    return Case(model, guide, (x,))


def global_and_local() -> Case:
    """A discrete global, and locals in a plate that depend on it, in another order."""
    x, cost = torch.tensor(X), fixed(4, 3)

    def model(x: torch.Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(logits=table("p_g", 4)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(Vindex(cost)[g, z], 0.9), obs=x)

    def guide(x: torch.Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(logits=table("q_g", 4)))
        with pyro.plate("data", len(x)):
            logits = table("q_z", len(x), 3) + Vindex(table("q_gz", 4, 3))[g]
            pyro.sample("z", dist.Categorical(logits=logits))

    return Case(model, guide, (x,))


def nested_plates() -> Case:
    x, cost = fixed(3, 2, seed=5), fixed(4, 5, seed=6)

    def model() -> None:
        outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2)
        with outer:
            a = pyro.sample("a", dist.Categorical(logits=table("p_a", 4)))
            with inner:
                b = pyro.sample("b", dist.Categorical(logits=torch.zeros(5)))
                pyro.sample("x", dist.Normal(Vindex(cost)[a, b], 1.0), obs=x)

    def guide() -> None:
        outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2)
        with outer:
            pyro.sample("a", dist.Categorical(logits=table("q_a", 2, 4)))
            with inner:
                pyro.sample("b", dist.Categorical(logits=table("q_b", 3, 2, 5)))

    return Case(model, guide)


def sequential_plate() -> Case:
    cost = fixed(4, 6)

    def model() -> None:
        for i in pyro.plate("data", 4):
            z = pyro.sample(f"z_{i}", dist.Categorical(logits=table("p", 6)))
            pyro.sample(f"x_{i}", dist.Normal(cost[i][z], 0.8), obs=torch.tensor(X[i]))

    def guide() -> None:
        for i in pyro.plate("data", 4):
            pyro.sample(f"z_{i}", dist.Categorical(logits=table("logits", 4, 6)[i]))

    return Case(model, guide)


def markov(steps: int = 3) -> Case:
    cost = fixed(4)

    def model() -> None:
        z = 0
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(table("p", 4, 4))[z]))
            pyro.sample(f"x_{t}", dist.Normal(cost[z], 0.7), obs=torch.tensor(X[t]))

    def guide() -> None:
        z = 0
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(table("q", steps, 4, 4)[t])[z]))

    return Case(model, guide)


def subsampled_scaled_masked() -> Case:
    x, cost = torch.tensor(X), fixed(5)
    mask = torch.tensor([True, True, False, True])

    def plate() -> Any:
        return pyro.plate("data", 4, subsample_size=3)

    def model(x: torch.Tensor) -> None:
        with poutine.scale(scale=1.7), plate() as i, poutine.mask(mask=mask[i]):
            z = pyro.sample("z", dist.Categorical(logits=table("p", 5)))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(cost[z], 0.5), obs=x[i])

    def guide(x: torch.Tensor) -> None:
        with poutine.scale(scale=1.7), plate() as i, poutine.mask(mask=mask[i]):
            pyro.sample("z", dist.Categorical(logits=table("q", 4, 5)[i]))

    return Case(model, guide, (x,))


def scaled(scale: float = 7.0) -> Case:
    case = mixture()
    case.model, case.guide = (poutine.scale(f, scale) for f in (case.model, case.guide))
    return case


def model_enumeration() -> Case:
    """A site that the model sums out, downstream of the guide's."""
    x, locs = torch.tensor(X), fixed(5, 3)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=table("p_z", 5)))
            y = pyro.sample(
                "y", dist.Categorical(logits=Vindex(table("p_y", 5, 3))[z]), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(Vindex(locs)[z, y], 0.6), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=table("q_z", len(x), 5)))

    return Case(model, guide, (x,))


def discrete_then_continuous() -> Case:
    """A reparameterized draw that depends on the discrete one."""
    x, locs = torch.tensor(X), fixed(5)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(5)))
            z = pyro.sample("z", dist.Normal(locs[y], 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=table("q_y", len(x), 5)))
            pyro.sample("z", dist.Normal(table("loc", 5)[y], positive("scale", 0.8)))

    return Case(model, guide, (x,))


def continuous_then_discrete() -> Case:
    x, locs = torch.tensor(X), fixed(5)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(5)))
            pyro.sample("x", dist.Normal(z + locs[y], 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(real("loc", 0.3), positive("scale", 0.8)))
            logits = table("a", 5) + table("b", 5) * z.unsqueeze(-1)
            pyro.sample("y", dist.Categorical(logits=logits))

    return Case(model, guide, (x,))


def binomial() -> Case:
    x = torch.tensor(X)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Binomial(7, positive("p", 0.4)))
            pyro.sample("x", dist.Normal(0.4 * z, 0.7), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Binomial(7, logits=table("logits", len(x))))

    return Case(model, guide, (x,))


def bernoullis() -> Case:
    """Three coins as one site, in event form and in a plate, and a masked one."""

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.3 * torch.ones(3)).to_event(1))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.6))
            pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=torch.tensor([0.0, 1.0, 2.0]))

    def guide() -> None:
        pyro.sample("a", dist.Bernoulli(logits=table("q_a", 3)).to_event(1), infer={"topk": 0})
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=table("q_b", 3)))

    return Case(model, guide)


# By name; in each the exact gradient is what TraceEnum_ELBO makes of the enumerated guide.
ENUMERABLE: Dict[str, Callable[[], Case]] = {
    "one_site": one_site,
    "mixture": mixture,
    "one_hot": lambda: mixture(kind="OneHotCategorical"),
    "dependent_sites": dependent_sites,
    "global_and_local": global_and_local,
    "nested_plates": nested_plates,
    "sequential_plate": sequential_plate,
    "markov": markov,
    "scaled": scaled,
    "model_enumeration": model_enumeration,
    "binomial": binomial,
}
# Here it has the randomness of a subsample or of a continuous draw.
NOISY: Dict[str, Callable[[], Case]] = {
    "subsampled_scaled_masked": subsampled_scaled_masked,
    "discrete_then_continuous": discrete_then_continuous,
    "continuous_then_discrete": continuous_then_discrete,
    "bernoullis": bernoullis,
}
ALL = {**ENUMERABLE, **NOISY}


def enumerated(case: Case) -> Case:
    """The same, with all of its discrete guide sites enumerated by Pyro."""
    return Case(case.model, config_enumerate(case.guide), case.args)


def gradient(elbo: Any, case: Case) -> Dict[str, torch.Tensor]:
    parameters = case.parameters()
    loss = elbo.differentiable_loss(case.model, case.guide, *case.args)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), grads)
    }


def exact_gradient(case: Case) -> Dict[str, torch.Tensor]:
    elbo = TraceEnum_ELBO(strict_enumeration_warning=False)
    return gradient(elbo, enumerated(case))
