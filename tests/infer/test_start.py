# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Runs that are made again leave no trace in running means, and random numbers go on where they were."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO
from pyro_rb.infer.start import Start

X = torch.linspace(-1.0, 1.0, 24).reshape(6, 4)


class Model(nn.Module):
    """A layer, and labels whose values are looked at."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        pyro.module("norm", self.norm)
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 4), 1.0).to_event(2))
        rows = F.linear(self.norm(x), w).squeeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(rows, 1.0 + z), obs=x[:, 0])


def guide(x):
    loc = pyro.param("loc", torch.zeros(1, 4))
    pyro.sample("w", dist.Normal(loc, 0.5).to_event(2))
    with pyro.plate("data", len(x), dim=-1):
        logits = pyro.param("logits", torch.zeros(6, 3))
        pyro.sample("z", dist.Categorical(logits=logits))


def running_means(loss, num_steps=9):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Model()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), loss)
    for i in range(num_steps):
        svi.step(X + i)
    return dict(model.norm.named_buffers())


@pytest.mark.parametrize(
    "loss",
    [
        R2G2_ELBO(pre_activations="auto"),
        R2G2_ELBO(),
        RaoBlackwellTopK_ELBO(k=2, max_plate_nesting=1),
        RaoBlackwell_ELBO(max_plate_nesting=1),
    ],
    ids=["local", "shared", "topk", "one loss"],
)
def test_running_means_are_those_of_trace_elbo(loss):
    actual, expected = running_means(loss), running_means(Trace_ELBO())
    assert expected["num_batches_tracked"] == 9
    torch.testing.assert_close(actual, expected)


def test_start():
    norm, lazy = nn.BatchNorm1d(4), nn.LazyBatchNorm1d()
    buffer, start = norm.running_mean, Start(has_all=True)
    with start.watch():
        first = torch.rand(3)
        norm(X), lazy(X)
        norm.running_mean = buffer + 1.0  # replaced
    after = norm.running_mean
    with start.aside():
        assert norm.running_mean is buffer and not buffer.any() and torch.equal(torch.rand(3), first)
        norm(X)
    assert norm.running_mean is after
    start.go_back()
    assert norm.running_mean is buffer and not buffer.any() and norm.num_batches_tracked == 0
    norm(X + 1.0)  # is not watched any more
    assert norm.num_batches_tracked == 1
