# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Two processes under DistributedDataParallel, each with its rows: the gradient is the mean of those that one
process finds for the same rows by the same random numbers.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch.nn.parallel import DistributedDataParallel

from pyro_rb import DReG_ELBO, RaoBlackwell_ELBO, RVRSGuide
from tests.infer.rao_blackwell import test_ddp as mixed
from tests.support import ddp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.empty(0).device.type != "cpu", reason="the processes draw random numbers of the CPU"),
]

NUM_ROWS, NUM_FEATURES = 12, 3


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(2, NUM_FEATURES)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(NUM_FEATURES, 2)
        self.log_scale = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))


def rao_blackwell():
    return RaoBlackwell_ELBO(max_plate_nesting=1)(mixed.Model(), mixed.Guide())


def dreg():
    return DReG_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)(Model(), Guide())


def rejection():
    model = Model()
    return Trace_ELBO()(model, RVRSGuide(model, Guide(), local_plate="data"))


def gradients(rank, make, wrap=lambda elbo: elbo):
    """Of the third step, after two without an update."""
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(0)
        elbo = make()
        x = torch.randn(NUM_ROWS, NUM_FEATURES).chunk(ddp.NUM_PROCESSES)[rank]
        x = x[:, 0] if make is rao_blackwell else x
        parallel = wrap(elbo)
        pyro.set_rng_seed(1 + rank)
        for _ in range(3):
            elbo.zero_grad()
            parallel(x).backward()
        return {name: p.grad.tolist() for name, p in elbo.named_parameters()}


def in_parallel(rank, make):
    return gradients(rank, make, DistributedDataParallel)


@pytest.mark.parametrize("make", [rao_blackwell, dreg, rejection])
def test_equal_to_one_process(make):
    first, second = ddp.run(in_parallel, make)
    alone = [gradients(rank, make) for rank in range(ddp.NUM_PROCESSES)]
    assert first == second and first.keys() == alone[0].keys()
    for name, found in first.items():
        parts = [torch.tensor(one[name]) for one in alone]
        assert not torch.allclose(*parts)
        torch.testing.assert_close(torch.tensor(found), sum(parts) / len(parts), rtol=1e-4, atol=1e-5)
