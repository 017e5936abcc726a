# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of other kinds, for models that carry their exact gradients."""

from typing import Dict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from tests.infer.rao_blackwell.models import (
    Problem,
    X,
    case,
    data,
    fixed,
    parameter,
    pick,
    replicates,
)
from tests.support.cases import Case


def switch_model(num: int) -> None:
    """A global Gaussian and a categorical site for each row."""
    x, locs = torch.tensor(X), 1.5 * fixed(4, seed=1)
    with replicates(num, -2):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.5))
        with data():
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=2)))
            pyro.sample("x", dist.Normal(z + pick(locs, y), 0.8), obs=x)


def auto_guide_list(num: int, by_hand: bool = False) -> Case:
    """An AutoNormal for z, and for y a guide by hand or an AutoDiscreteParallel."""
    guide = AutoGuideList(switch_model)
    guide.append(AutoNormal(poutine.block(switch_model, expose=["z"]), init_scale=0.8))

    def discrete(num: int) -> None:
        logits = parameter(num, "logits", 0.7 * fixed(5, 4, seed=3))
        with guide.plates["replicates"], guide.plates["data"]:
            pyro.sample("y", dist.Categorical(logits=logits))

    # For a sum over some values only, the guide must not ask for all.
    guide.append(discrete if by_hand else AutoDiscreteParallel(poutine.block(switch_model, expose=["y"])))
    guide(num)
    with torch.no_grad():
        guide[0].locs.z.fill_(0.4)
    return case(switch_model, guide, num)


class Encoder(nn.Module):
    """Makes of each x the mean of z, and logits of y; as many of them as there are replicates."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.6 * fixed(1, 5, seed=4).repeat(num, 1))
        self.bias = nn.Parameter(0.6 * fixed(1, 5, seed=5).repeat(num, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bias[:, None] + self.weight[:, None] * x.unsqueeze(-1))


def local_model(num: int) -> None:
    """A Gaussian and a categorical site for each row."""
    x, locs = torch.tensor(X), 1.5 * fixed(4, seed=1)
    with replicates(num, -2), data():
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=2)))
        pyro.sample("x", dist.Normal(z + pick(locs, y), 0.8), obs=x)


def amortized(num: int) -> Case:
    encoder = Encoder(num)

    def guide(num: int) -> None:
        pyro.module("encoder", encoder)
        out = encoder(torch.tensor(X))
        with replicates(num, -2), data():
            z = pyro.sample("z", dist.Normal(out[..., 0], 0.8))
            pyro.sample("y", dist.Categorical(logits=out[..., 1:] * (1 + z.unsqueeze(-1))))

    return case(local_model, guide, num)


class ModuleGuide(PyroModule):
    def __init__(self, num: int) -> None:
        super().__init__()
        self.encoder = Encoder(num)
        self.scale = PyroParam(torch.full((num, 1), 0.8), dist.constraints.positive)

    def forward(self, num: int) -> None:
        out = self.encoder(torch.tensor(X))
        with replicates(num, -2), data():
            y = pyro.sample("y", dist.Categorical(logits=2 * out[..., 1:]))
            pyro.sample("z", dist.Normal(out[..., 0] + 0.3 * y, self.scale))


def module_guide(num: int) -> Case:
    return case(local_model, ModuleGuide(num), num)


GUIDES: Dict[str, Problem] = {
    "auto_guide_list": Problem(auto_guide_list, rules={"z_unconstrained": 20}),
    "auto_guide_list_by_hand": Problem(lambda num: auto_guide_list(num, True), rules={"z_unconstrained": 20}),
    "amortized": Problem(amortized, rules={"z": 60}),
    "module_guide": Problem(module_guide, rules={"z": 60}),
}
