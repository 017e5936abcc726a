# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Looks at values that only depend on what goes into a graph are what it takes for granted, at each step."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_rb
from pyro_rb import STLTrace_ELBO
from tests.compiled.test_guards import X, assert_eager, guide, observe
from tests.compiled.training import assert_equal, assert_replayed, train

pytestmark = pytest.mark.slow

LIMIT = torch.tensor(1.0)


def branch(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if x.sum() < 5.0 else 2.0 * z, x)


def branch_by_parameter(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if pyro.param("s") > 0.5 else 2.0 * z, x)


def number(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale=1.0 + abs(x[0].item()))


def count(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in range(int((x.abs() > 1.0).sum())):
        pyro.factor(f"factor_{i}", -z.square())
    observe(z, x)


def as_list(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=1.0 + abs(x.tolist()[1]))


def as_array(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=float(x.numpy().std()))


def constant(x):
    """Which no operation of the graph uses."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if LIMIT > 0.5 else 2.0 * z, x, scale=1.0 + LIMIT.item())


def equal(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(2.0 * z if torch.equal(x, X) else z, x)


def close(x):
    assert torch.allclose(x, x + 1e-9)
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def as_text(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale=1.0 + float(f"{x[0]:.1f}"))


def index(x):
    """By a number that is a tensor."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.ones(3)
    observe(z[torch.tensor(0)] + x[torch.tensor(1)], x)


def missing(x):
    """Rows by masks, of data and of a draw."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.arange(3.0)
    keep = x > -1.0
    observe(z[keep] + x.unique().numel(), x[keep])


def as_string(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale=1.0 + len(str(x.sum())))


def numbers(x):
    """Which torch.tensor copies without an operation."""
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.tensor([x[0], x[1]]).sum(), x)


def foreign(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.from_dlpack(x).sum(), x)


def copied(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + copy.deepcopy(x).sum(), x)


def sections(x):
    """Which C++ reads without an operation."""
    places = x.abs().round().long()
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.arange(9.0).tensor_split(places)[1].sum(), x)


def packed(x):
    """Sequences whose lengths are numbers in a tensor."""
    lengths = x.abs().round().long() + 1
    rows = torch.linspace(0.0, 1.0, 42).reshape(3, 7, 2)
    rows = torch.nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
    rows, found = torch.nn.utils.rnn.pad_packed_sequence(GRU(rows)[0], batch_first=True)
    assert (found == lengths).all()
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + rows.sum((1, 2)), x)


GRU = torch.nn.GRU(2, 1, batch_first=True).requires_grad_(False)
CONSTANT = [branch_by_parameter, constant, close, index]
MODELS = [branch, number, count, as_list, as_array, as_text, missing, equal]
COPIED = [as_string, numbers, foreign, copied, sections, packed]
MODELS += COPIED


@pytest.mark.parametrize("model", [*MODELS, *CONSTANT])
def test_same_value(model):
    loss = assert_replayed(Trace_ELBO, lambda: (model, lambda x: guide(), lambda i: (X,)), 40)
    assert loss.report()[-1].treatment == "replayed"


@pytest.mark.parametrize("model", MODELS)
def test_other_value_now_and_then(model):
    """Such a step is eager, and the others are not."""

    def make():
        return model, lambda x: guide(), lambda i: (X if i % 13 else 3.0 * X,)

    loss = assert_replayed(STLTrace_ELBO, make, 60, num_graphs=2)
    assert all(graph.misses <= 5 for program in loss._programs.values() for graph in program.graphs)


@pytest.mark.parametrize("model", [number, as_list, as_array, numbers, foreign])
def test_value_that_keeps_changing(model):
    def make():
        return model, lambda x: guide(), lambda i: ((1.0 + 0.01 * i) * X,)

    message = assert_eager(make, "A graph is made for one value, and others keep coming up", 40)
    assert __file__ in message and "observe(" in message


def test_constant_that_changes_in_place():
    """Is noticed at the next step, not at the next comparison, and another graph is made."""

    def run(loss):
        LIMIT.fill_(1.0)
        return train(loss, lambda: (constant, lambda x: guide(), args), 30)

    def args(i):
        LIMIT.fill_(1.0 if i < 12 else 0.3)
        return (X,)

    try:
        expected = run(Trace_ELBO())
        loss = pyro_rb.compile(Trace_ELBO(), "replay")
        assert_equal(run(loss), expected)
        assert loss.num_graphs == 1
        assert loss.report()[-1].treatment == "replayed"
    finally:
        LIMIT.fill_(1.0)


def test_parameter_that_crosses_a_limit():
    def make():
        return branch_by_parameter, lambda x: guide(), lambda i: (cross(i), X)[1:]

    def cross(i):
        if i:
            with torch.no_grad():
                value = pyro.get_param_store().get_state()["params"]["s"]
                value.fill_(0.0 if i % 10 else -2.0)

    assert_replayed(Trace_ELBO, make, 40)


def test_distribution_that_was_made_outside():
    """Has been told to look at whether draws are valid."""
    prior = dist.Normal(torch.zeros(3), 1.0, validate_args=True).expand([2, 3]).to_event(2)
    assert prior.base_dist._validate_args

    def model():
        z = pyro.sample("z", prior)
        observe(z.sum(0))

    def wide():
        loc = pyro.param("loc", torch.zeros(2, 3))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))

    assert_replayed(Trace_ELBO, lambda: (model, wide, lambda i: ()))
