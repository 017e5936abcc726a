# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""``elbo(model, guide)`` under DistributedDataParallel, with two processes."""

import socket
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.nn import PyroModule
from torch.nn.parallel import DistributedDataParallel

from pyro_rb import STLTrace_ELBO

DATA = torch.tensor([0.5, -1.2, 2.0, 0.3, 1.1, -0.4, 0.9, 1.6])
NUM_PROCESSES = 2
TIMEOUT = 120  # seconds; they take about 10


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


def train(rank, port, scale, queue):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=NUM_PROCESSES,
    )
    try:
        with pyro.settings.context(module_local_params=True):
            pyro.set_rng_seed(rank)
            elbo = STLTrace_ELBO(scale)(Model(), Guide())
            parallel = DistributedDataParallel(elbo)
            optim = torch.optim.Adam(parallel.parameters(), lr=0.05)
            x = DATA.chunk(NUM_PROCESSES)[rank]
            for _ in range(300):
                optim.zero_grad()
                parallel(x).backward()
                optim.step()
            queue.put({name: p.tolist() for name, p in elbo.named_parameters()})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("scale", [1.0, "adaptive"])
def test_two_processes_reach_the_posterior_together(scale):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    args = (port, scale, queue)
    processes = torch.multiprocessing.start_processes(
        train, args, NUM_PROCESSES, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT
    # Returns at the end of each process, and raises what it raised.
    while not processes.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes were not done after {TIMEOUT} s")
    first, second = queue.get(), queue.get()
    assert first == second
    assert first["guide.linear.weight"][0][0] == pytest.approx(0.8, abs=0.01)
    assert first["guide.linear.bias"][0] == pytest.approx(0.0, abs=0.01)
    assert first["guide.log_scale"] == pytest.approx(0.5 * torch.tensor(0.2).log().item(), abs=0.01)
