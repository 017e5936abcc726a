# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_rb.poutine.densities import compute_score_parts


def model():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("outer", 3, dim=-2), pyro.plate("data", 4, subsample_size=2), poutine.scale(scale=2.0):
        with poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("weights", dist.Dirichlet(torch.ones(5)))
        pyro.sample("x", dist.Normal(torch.zeros(6), scale).to_event(1))


def shared():
    """One draw for all of a plate, another inside of an event, and a density of its own."""
    loc = pyro.param("loc", torch.arange(6.0))
    with pyro.plate("data", 4):
        pyro.sample("same", dist.Delta(loc[0], log_density=loc[1]))
        pyro.sample("part", dist.Delta(loc[2:], log_density=loc[2:].cos()))
        pyro.sample("event", dist.Delta(loc[:4, None].expand(4, 3), event_dim=1))


def handled():
    with poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, False, True, True])):
        shared()


def both_ways(guide):
    return compute_both(poutine.trace(guide).get_trace())


def compute_both(trace):
    pair = trace.copy(), trace.copy()
    for copied in pair:  # which has the very sites of the trace
        copied.nodes.update((name, site.copy()) for name, site in trace.nodes.items())
    pair[0].compute_score_parts()
    compute_score_parts(pair[1])
    return pair


def assert_equal(expected, actual):
    assert list(expected.nodes) == list(actual.nodes)
    for name, site in expected.nodes.items():
        if site["type"] != "sample":
            continue
        other = actual.nodes[name]
        for key in ("unscaled_log_prob", "log_prob", "log_prob_sum"):
            assert torch.equal(site[key], other[key]) and site[key].shape == other[key].shape, (name, key)
            assert site[key].dtype == other[key].dtype, (name, key)
        for part, of_other in zip(site["score_parts"], other["score_parts"]):
            assert torch.equal(torch.as_tensor(part), torch.as_tensor(of_other)), name


def of_other_types():
    numbers = torch.arange(2.0)
    with pyro.plate("two", 2):
        for i, dtype in enumerate([torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.cfloat]):
            pyro.sample(f"x_{i}", dist.Delta(numbers.to(dtype)))
            pyro.sample(f"y_{i}", dist.Delta(numbers.to(dtype), log_density=numbers))


@pytest.mark.parametrize("guide", [AutoNormal(model), AutoDelta(model), shared, handled, of_other_types])
def test_the_same_as_pyro(guide):
    guide()
    assert_equal(*both_ways(guide))


def test_deltas_are_not_compared(monkeypatch):
    monkeypatch.setattr(dist.Delta, "log_prob", lambda self, x: 1 / 0)
    for guide in (AutoNormal(model), shared):
        guide()
        compute_score_parts(poutine.trace(guide).get_trace())


def other_value(trace):
    trace.nodes["part"]["value"] = torch.zeros(4)


def other_part(trace):
    trace.nodes["part"]["value"] = pyro.param("loc")[1:5]


def turned_round(trace):
    trace.nodes["part"]["value"] = pyro.param("loc")[2:].flip(0)


def other_class(trace):
    class Shifted(dist.Delta):
        def log_prob(self, x):
            return super().log_prob(x) - 1.0

    trace.nodes["part"]["fn"] = Shifted(pyro.param("loc")[2:])


def wider_density(trace):
    value = pyro.param("loc")[2:]
    trace.nodes["part"].update(fn=dist.Delta(value, log_density=torch.zeros(3, 4)), value=value)


@pytest.mark.parametrize("change", [other_value, other_part, turned_round, other_class, wider_density])
def test_values_that_were_not_drawn(change):
    def guide():
        shared()

    trace = poutine.trace(guide).get_trace()
    change(trace)
    expected, actual = compute_both(trace)
    assert_equal(expected, actual)
    if change is not wider_density:
        assert not torch.equal(actual.nodes["part"]["log_prob"], pyro.param("loc")[2:].cos())


def test_the_warnings_of_pyro():
    def guide():
        pyro.sample("z", dist.Delta(torch.zeros(2), log_density=torch.tensor([0.0, math.inf])).to_event(1))
        with pyro.plate("two", 2):
            pyro.sample("x", dist.Delta(torch.zeros(2), log_density=torch.tensor([0.0, math.inf])))

    trace = poutine.trace(guide).get_trace()
    for name in ("x", "z"):
        one = trace.copy()
        one.nodes.pop("x" if name == "z" else "z")
        with pytest.warns(UserWarning, match=f"inf: log_prob_sum at site '{name}'"):
            compute_score_parts(one)


def test_the_warnings_of_pyro_in_gradients():
    loc = torch.zeros(2, requires_grad=True)
    trace = poutine.trace(lambda: pyro.sample("z", dist.Delta(loc, log_density=loc).to_event(1))).get_trace()
    compute_score_parts(trace)
    with pytest.warns(UserWarning, match="NaN: backward log_prob_sum at site 'z'"):
        trace.nodes["z"]["log_prob_sum"].backward(torch.tensor(math.nan))
