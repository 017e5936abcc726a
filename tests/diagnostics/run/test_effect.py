# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which coordinates count: of rows that few draws see, all."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_rb import compare
from pyro_rb.diagnostics.run.effect import find_effect
from pyro_rb.diagnostics.run.problem import prepared

NUM = 200
X = torch.linspace(-1.0, 1.0, NUM)


def model(size, index=None):
    with pyro.plate("rows", NUM if index is None else len(index), subsample_size=size) as i:
        i = i if index is None else index
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[i])


def guide(size, index=None):
    loc = pyro.param("loc", torch.zeros(NUM))
    unused = pyro.param("unused", torch.zeros(2))
    with pyro.plate("rows", NUM if index is None else len(index), subsample_size=size) as i:
        pyro.sample("z", dist.Normal(loc[i if index is None else index], 1.0))
    pyro.sample("u", dist.Normal(unused, 1.0).to_event(1), infer={"is_auxiliary": True})


@pytest.mark.parametrize("args", [(10,), lambda: (None, torch.randperm(NUM)[:10])], ids=["plate", "batches"])
def test_rows_that_no_draw_has_seen(args):
    with prepared(model, guide, args) as problem:
        loc, unused = find_effect(problem)
    assert loc.all() and not unused.any()


def test_bias_of_one_row_is_seen():
    class Biased(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            loss = super().loss_and_grads(*args, **kwargs)
            pyro.param("loc").grad[7] += 1000.0
            return loss

    options = {"num_samples": 30, "num_burn_in": 0, "train_steps": 0, "progress": False}
    result = compare(model, guide, {"biased": Biased()}, args=(10,), **options)
    (row,) = result.states[0].losses[1:]
    assert row.biased and row.bias_at == "loc[7]"
