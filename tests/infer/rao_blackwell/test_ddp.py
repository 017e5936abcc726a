# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""``elbo(model, guide)`` under DistributedDataParallel, with two processes and a discrete site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.nn.parallel import DistributedDataParallel

from pyro_rb import RaoBlackwell_ELBO
from tests.infer.rao_blackwell.models import pick
from tests.support import ddp

pytestmark = pytest.mark.slow

DATA = torch.tensor([0.5, -1.2, 2.0, 0.3, 1.1, -0.4, 0.9, 1.6])
LOCS = torch.tensor([-1.0, 0.0, 0.5, 2.0])


class Model(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(4)))
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + pick(LOCS, y), 0.5), obs=x)


class Guide(PyroModule):
    """
    q(y | x) has logits v x + b, and q(z | x, y) = N(w (x - m_y), exp(s)). The posterior has
    v = .8 m, b = -.4 m^2 but for a constant, w = .8 and exp(2 s) = .2.
    """

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 4)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        logits = self.linear(x.unsqueeze(-1))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal(self.weight * (x - pick(LOCS, y)), self.log_scale.exp()))


def train(rank):
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(rank)
        elbo = RaoBlackwell_ELBO(max_plate_nesting=1)(Model(), Guide())
        parallel = DistributedDataParallel(elbo)
        optim = torch.optim.Adam(parallel.parameters(), lr=0.1)
        x = DATA.chunk(ddp.NUM_PROCESSES)[rank]
        for _ in range(200):
            optim.zero_grad()
            parallel(x).backward()
            optim.step()
        return {name: p.tolist() for name, p in elbo.named_parameters()}


def test_two_processes_reach_the_posterior_together():
    first, second = ddp.run(train)
    assert first == second
    assert first["guide.weight"] == pytest.approx(0.8, abs=0.01)
    assert first["guide.log_scale"] == pytest.approx(0.5 * torch.tensor(0.2).log().item(), abs=0.01)
    slopes, biases = (torch.tensor(first[f"guide.linear.{name}"]).flatten() for name in ("weight", "bias"))
    torch.testing.assert_close(slopes - slopes[0], 0.8 * (LOCS - LOCS[0]), atol=0.02, rtol=0)
    torch.testing.assert_close(biases - biases[0], -0.4 * (LOCS**2 - LOCS[0] ** 2), atol=0.02, rtol=0)
