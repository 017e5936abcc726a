# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""``elbo(model, guide)`` under DistributedDataParallel, with two processes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.nn.parallel import DistributedDataParallel

from pyro_rb import STLTrace_ELBO
from tests.support import ddp

pytestmark = pytest.mark.slow

DATA = torch.tensor([0.5, -1.2, 2.0, 0.3, 1.1, -0.4, 0.9, 1.6])


class Model(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Guide(PyroModule):
    """q(z | x) = N(w x + b, exp(s)); the posterior has w = .8, b = 0, exp(2 s) = .2."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        loc = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()))


def train(rank, scale):
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(rank)
        elbo = STLTrace_ELBO(control_variate_scale=scale)(Model(), Guide())
        parallel = DistributedDataParallel(elbo)
        optim = torch.optim.Adam(parallel.parameters(), lr=0.05)
        x = DATA.chunk(ddp.NUM_PROCESSES)[rank]
        for _ in range(300):
            optim.zero_grad()
            parallel(x).backward()
            optim.step()
        return {name: p.tolist() for name, p in elbo.named_parameters()}


SCALES = 1.0, "adaptive"


def train_all(rank):
    return [train(rank, scale) for scale in SCALES]


@pytest.fixture(scope="module")
def trained():
    """By scale, the parameters in each of the processes, which take longer to start than to train."""
    return dict(zip(SCALES, zip(*ddp.run(train_all))))


@pytest.mark.parametrize("scale", SCALES)
def test_two_processes_reach_the_posterior_together(trained, scale):
    first, second = trained[scale]
    assert first == second
    assert first["guide.linear.weight"][0][0] == pytest.approx(0.8, abs=0.01)
    assert first["guide.linear.bias"][0] == pytest.approx(0.0, abs=0.01)
    assert first["guide.log_scale"] == pytest.approx(0.5 * torch.tensor(0.2).log().item(), abs=0.01)
