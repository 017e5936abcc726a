# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What goes wrong in one of two processes is skipped by both."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_rb import GradientGuard
from tests.support import ddp

pytestmark = pytest.mark.slow

BAD_STEPS = (2, 5)


class Model(PyroModule):
    def forward(self, data, kind):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if kind == "derivative":
            z = z + (0 * z).sqrt()
        if kind == "error":  # Normal refuses it
            z = z * math.nan
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))

    def forward(self, data, kind):
        pyro.sample("z", dist.Normal(self.loc, 0.3))


def train(rank, kind):
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(rank)
        guard = GradientGuard(Trace_ELBO(), on_bad="skip")
        parallel = DistributedDataParallel(guard(Model(), Guide()))
        optim = guard.watch(torch.optim.Adam(parallel.parameters(), lr=0.05))
        locs = []
        for step in range(1, 8):
            optim.zero_grad()
            is_bad = rank == 1 and step in BAD_STEPS
            parallel(torch.tensor([0.3, 0.7]), kind if is_bad else "").backward()
            optim.step()
            locs.append(parallel.module.guide.loc.item())
        return rank, locs, [(bad.step, bad.bad.kind) for bad in guard.bad_steps]


KINDS = {"derivative": "gradient", "error": "argument"}


def train_all(rank):
    return [train(rank, kind) for kind in KINDS]


@pytest.fixture(scope="module")
def trained():
    """By kind, what each of the processes returns, which take longer to start than to train."""
    return dict(zip(KINDS, zip(*ddp.run(train_all))))


@pytest.mark.parametrize("kind, cause", KINDS.items())
def test_both_processes_skip(trained, kind, cause):
    (_, locs, good), (_, same, bad) = sorted(trained[kind])
    assert locs == same and all(map(math.isfinite, locs))
    assert [step for step in range(2, 8) if locs[step - 1] == locs[step - 2]] == list(BAD_STEPS)
    # Only the process in which it happened can say what it was.
    assert bad == [(step, cause) for step in BAD_STEPS]
    assert good == [(step, "unknown") for step in BAD_STEPS]
