# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_rb.poutine import SharedSubsampleMessenger


def draw(name="data"):
    return pyro.plate(name, 1000, subsample_size=5).indices.tolist()


def test_all_runs_see_the_first_subsample():
    with SharedSubsampleMessenger():
        first, other = draw(), draw("other")
        assert (draw(), draw("other")) == (first, other)
        assert first != other
    with SharedSubsampleMessenger():
        assert draw() != first
    assert draw() != draw()


def test_other_sites_are_drawn_anew():
    def guide():
        with pyro.plate("data", 1000, subsample_size=5):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

    with SharedSubsampleMessenger():
        assert not torch.equal(guide(), guide())


def test_supplied_subsamples_are_left_alone():
    def given(*indices):
        return pyro.plate("data", 1000, subsample=torch.tensor(indices)).indices.tolist()

    with SharedSubsampleMessenger():
        assert given(1, 2) == [1, 2]
        assert given(3, 4) == [3, 4]

    with SharedSubsampleMessenger():
        trace = poutine.trace(draw).get_trace()
        draw()
        assert poutine.replay(draw, trace=trace)() == trace.nodes["_RETURN"]["value"]
