# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
More models that carry their exact gradients: what Pyro's models and guides may be made of,
beside those of :mod:`.models`, of which the functions are.
"""

from typing import Any, Dict, Optional

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch.nn.functional import one_hot

from tests.infer.rao_blackwell.guides import GUIDES
from tests.infer.rao_blackwell.models import (
    Problem,
    X,
    case,
    data,
    fixed,
    parameter,
    pick,
    positive,
    replicates,
)
from tests.support.cases import Case

SUBSETS = ((0, 1), (0, 2), (1, 2))
OBSERVED = (True, False, True, True, False)


def subsampled(num: int, subset: Optional[int] = None) -> Case:
    """
    z -> y in a plate of 3 of which 2 are looked at. Without a subset, all three.

    :param int subset: which of :data:`SUBSETS`.
    """
    x = torch.tensor(X[:3])

    def items() -> Any:
        return pyro.plate("data", 3, subsample=None if subset is None else torch.tensor(SUBSETS[subset]), dim=-1)

    def model(num: int) -> None:
        with poutine.scale(scale=1.7), replicates(num, -2), items() as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=1) * z.unsqueeze(-1)))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z + pick(fixed(4, seed=2), y), 0.8), obs=x[i])

    def guide(num: int) -> None:
        loc, scale = parameter(num, "loc", 0.5 * fixed(3, seed=3)), positive(num, "scale", torch.full((3,), 0.8))
        bias = parameter(num, "bias", 0.7 * fixed(3, 4, seed=4))
        slope = parameter(num, "slope", 0.5 * fixed(3, 4, seed=5))
        with poutine.scale(scale=1.7), replicates(num, -2), items() as i:
            z = pyro.sample("z", dist.Normal(loc[:, i], scale[:, i]))
            pyro.sample("y", dist.Categorical(logits=bias[:, i] + slope[:, i] * z.unsqueeze(-1)))

    return case(model, guide, num)


def partly_observed(num: int) -> Case:
    """Labels and data of which some are missing, by ``obs_mask``."""
    x, labels, seen = torch.tensor(X), torch.tensor([2, 0, 1, 3, 0]), torch.tensor(OBSERVED)
    locs = 1.5 * fixed(4, seed=1)

    def model(num: int) -> None:
        with replicates(num, -2), data():
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=2)), obs=labels, obs_mask=seen)
            z = pyro.sample("z", dist.Normal(pick(locs, y), 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x, obs_mask=seen.flip(0))

    def guide(num: int) -> None:
        logits, loc = parameter(num, "logits", 0.7 * fixed(5, 4, seed=3)), parameter(num, "loc", fixed(5, 4, seed=4))
        scale, slope = positive(num, "scale", torch.full((5,), 0.8)), parameter(num, "slope", 0.5 * fixed(5, seed=5))
        with replicates(num, -2), data():
            with poutine.mask(mask=~seen):
                y = pyro.sample("y_unobserved", dist.Categorical(logits=logits))
            y = torch.where(seen, labels, y)
            z = pyro.sample("z", dist.Normal(pick(loc, y), scale))
            with poutine.mask(mask=~seen.flip(0)):
                pyro.sample("x_unobserved", dist.Normal(slope * z, scale))

    return case(model, guide, num)


def model_enumerated(num: int) -> Case:
    """z and k in the guide, and between them and the data a site that the model sums out."""
    x = torch.tensor(X)

    def model(num: int) -> None:
        table = parameter(num, "table", fixed(1, 4, 3, seed=1))
        with replicates(num, -2), data():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(4)))
            logits = torch.stack([pick(table[..., i], k) for i in range(3)], -1)
            logits = logits + z.unsqueeze(-1) * fixed(3)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + pick(fixed(3, seed=2), y), 0.8), obs=x)

    def guide(num: int) -> None:
        loc, scale = parameter(num, "loc", 0.5 * fixed(5, seed=3)), positive(num, "scale", torch.full((5,), 0.8))
        bias = parameter(num, "bias", 0.7 * fixed(5, 4, seed=4))
        slope = parameter(num, "slope", 0.5 * fixed(5, 4, seed=5))
        with replicates(num, -2), data():
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("k", dist.Categorical(logits=bias + slope * z.unsqueeze(-1)))

    return case(model, guide, num)


def config_enumerated(num: int) -> Case:
    """The same, with all of the model's sites marked."""
    made = model_enumerated(num)
    return case(config_enumerate(made.model), made.guide, num)


def sequential_plate(num: int) -> Case:
    """z -> y for each item, in a loop."""

    def model(num: int) -> None:
        with replicates(num, -1):
            for i in pyro.plate("data", 3):
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
                y = pyro.sample(f"y_{i}", dist.Categorical(logits=fixed(4, seed=1) * z.unsqueeze(-1)))
                pyro.sample(f"x_{i}", dist.Normal(z + pick(fixed(4, seed=2), y), 0.8), obs=torch.tensor(X[i]))

    def guide(num: int) -> None:
        loc, scale = parameter(num, "loc", 0.5 * fixed(3, seed=3)), positive(num, "scale", torch.full((3,), 0.8))
        slope = parameter(num, "slope", 0.5 * fixed(3, 4, seed=5))
        with replicates(num, -1):
            for i in pyro.plate("data", 3):
                z = pyro.sample(f"z_{i}", dist.Normal(loc[:, i], scale[:, i]))
                pyro.sample(f"y_{i}", dist.Categorical(logits=slope[:, i] * (1 + z).unsqueeze(-1)))

    return case(model, guide, num)


def hidden_markov(num: int) -> Case:
    """Three steps of a chain of discrete states in ``markov``, and a common shift of the data."""
    locs = 1.5 * fixed(3, seed=1)

    def model(num: int) -> None:
        moves = parameter(num, "moves", fixed(3, 3, seed=2))
        with replicates(num, -1):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            s: Any = torch.tensor(0)
            for t in pyro.markov(range(3)):
                logits = torch.stack([pick(moves[..., i], s) for i in range(3)], -1)
                s = pyro.sample(f"s_{t}", dist.Categorical(logits=logits))
                pyro.sample(f"x_{t}", dist.Normal(shift + pick(locs, s), 0.8), obs=torch.tensor(X[t]))

    def guide(num: int) -> None:
        loc, scale = parameter(num, "loc", torch.tensor(0.3)), positive(num, "scale", torch.tensor(0.7))
        table = parameter(num, "table", 0.7 * fixed(3, 3, 3, seed=3))
        slope = parameter(num, "slope", 0.5 * fixed(3, seed=4))
        with replicates(num, -1):
            shift = pyro.sample("shift", dist.Normal(loc, scale))
            s: Any = torch.tensor(0)
            for t in pyro.markov(range(3)):
                logits = torch.stack([pick(table[:, t, :, i], s) for i in range(3)], -1)
                s = pyro.sample(f"s_{t}", dist.Categorical(logits=logits + slope * shift.unsqueeze(-1)))

    return case(model, guide, num)


def switching(num: int, steps: Any) -> Case:
    """
    Two steps of a chain of switches and Gaussian states.

    :param steps: ``pyro.markov``, or ``iter`` for the same without its dims.
    """

    def model(num: int) -> None:
        with replicates(num, -1):
            s: Any = torch.tensor(0.0)
            z: Any = torch.tensor(0.0)
            for t in steps(range(2)):
                s = pyro.sample(f"s_{t}", dist.Bernoulli(logits=2.0 * s - 1.0))
                z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z + s, 0.7 + 0.5 * s))
                pyro.sample(f"x_{t}", dist.Normal(z, 0.8), obs=torch.tensor(X[t]))

    def guide(num: int) -> None:
        on, loc = parameter(num, "on", 0.7 * fixed(2, seed=1)), parameter(num, "loc", fixed(2, seed=2))
        slope, scale = parameter(num, "slope", 0.5 * fixed(2, seed=3)), positive(num, "scale", torch.full((2,), 0.8))
        with replicates(num, -1):
            s: Any = torch.tensor(0.0)
            z: Any = torch.tensor(0.0)
            for t in steps(range(2)):
                s = pyro.sample(f"s_{t}", dist.Bernoulli(logits=on[:, t] + s))
                z = pyro.sample(f"z_{t}", dist.Normal(loc[:, t] + slope[:, t] * z + 0.5 * s, scale[:, t]))

    return case(model, guide, num)


def beside_a_chain(num: int, steps: Any) -> Case:
    """
    Two steps of a chain of switches, and sites outside of it: one that the guide draws after
    the chain, and the model before, and one that the model sums out.

    :param steps: as of :func:`switching`.
    """

    def model(num: int) -> None:
        with replicates(num, -1):
            e = pyro.sample("e", dist.Categorical(logits=fixed(3, seed=1)))
            s: Any = torch.tensor(0.0)
            for t in steps(range(2)):
                s = pyro.sample(f"s_{t}", dist.Bernoulli(logits=2.0 * s - 1.0))
                pyro.sample(f"x_{t}", dist.Normal(s + e, 0.8), obs=torch.tensor(X[t]))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(e + 2.0 * c, 0.8), obs=torch.tensor(1.3))

    def guide(num: int) -> None:
        on, slope = parameter(num, "on", 0.7 * fixed(2, seed=2)), parameter(num, "slope", 0.5 * fixed(2, seed=3))
        logits = parameter(num, "logits", 0.7 * fixed(3, seed=4))
        with replicates(num, -1):
            s: Any = torch.tensor(0.0)
            for t in steps(range(2)):
                s = pyro.sample(f"s_{t}", dist.Bernoulli(logits=on[:, t] + slope[:, t] * s))
            pyro.sample("e", dist.Categorical(logits=logits))

    return case(model, guide, num)


def sequential(num: int) -> Case:
    """A Bernoulli site that the guide enumerates sequentially, then z, then y."""
    locs = fixed(4, seed=1)

    def model(num: int) -> None:
        with replicates(num, -1):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal(b, 1.0))
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=2)))
            pyro.sample("x", dist.Normal(z + b + pick(locs, y), 0.8), obs=torch.tensor(1.3))

    def guide(num: int) -> None:
        on, scale = parameter(num, "on", torch.tensor(0.4)), positive(num, "scale", torch.tensor(0.8))
        loc, logits = parameter(num, "loc", fixed(2, seed=3)), parameter(num, "logits", 0.7 * fixed(4, seed=4))
        slope = parameter(num, "slope", 0.5 * fixed(4, seed=5))
        with replicates(num, -1):
            b = pyro.sample("b", dist.Bernoulli(logits=on), infer={"enumerate": "sequential"})
            z = pyro.sample("z", dist.Normal(pick(loc, b), scale))
            pyro.sample("y", dist.Categorical(logits=logits + slope * (z + b).unsqueeze(-1)))

    return case(model, guide, num)


def designs(num: int) -> Case:
    """A global switch between three designs of a linear regression."""
    x, y = fixed(3, 4, 12, seed=1), fixed(4, seed=2)

    def model(num: int) -> None:
        with replicates(num, -2):
            w = pyro.sample("w", dist.Normal(torch.zeros(12), 1.5).to_event(1))
            g = pyro.sample("g", dist.Categorical(logits=torch.zeros(3)))
            design = torch.einsum("...k,kni->...ni", one_hot(g.squeeze(-1), 3).to(x), x)
            with data(4):
                pyro.sample("y", dist.Normal((w @ design.mT).squeeze(-2), 0.8), obs=y)

    def guide(num: int) -> None:
        loc, scale = parameter(num, "loc", 0.3 * fixed(1, 12, seed=4)), positive(num, "scale", torch.full((1, 12), 0.5))
        logits = parameter(num, "logits", 0.5 * fixed(1, 3, seed=6))
        with replicates(num, -2):
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))
            pyro.sample("g", dist.Categorical(logits=logits))

    return case(model, guide, num)


STRUCTURES: Dict[str, Problem] = {
    "partly_observed": Problem(partly_observed, rules={"z": 60, "x_unobserved": 4}),
    "model_enumerated": Problem(model_enumerated, rules={"z": 60}),
    "config_enumerated": Problem(config_enumerated, rules={"z": 60}),
    "sequential_plate": Problem(sequential_plate, 1, {f"z_{i}": 60 for i in range(3)}),
    "hidden_markov": Problem(hidden_markov, 1, {"shift": 60}),
    "designs": Problem(designs, rules={"w": 0}),
    "sequential": Problem(sequential, 1, {"z": 60}),
    **GUIDES,
}
