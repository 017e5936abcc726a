# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a model changes besides tensors in place is changed once a step, as in plain SVI: its steps are eager."""

import collections

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from tests.compiled.test_guards import X, assert_eager, guide, observe
from tests.compiled.training import assert_replayed

pytestmark = pytest.mark.slow


class Mean(torch.nn.Module):
    """Replaces a buffer, an attribute and items."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.scale, self.log, self.options = 1.0, [0.0], {"factor": 1.0}

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * z
        self.scale += 0.1
        self.log.append(self.log[-1] + 0.1)
        self.options["factor"] *= 1.1
        with poutine.scale(scale=self.options.pop("factor") + self.log[-1]):
            observe(z + self.mean, x, self.scale)
        self.options["factor"] = 1.0 + self.log[-1]


def variable():
    beta, last = 1.0, None

    def model(x):
        nonlocal beta, last
        beta *= 1.1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z if last is None else z + last, x, beta)
        last = z.detach()

    return model


class Counts:
    """Changes an attribute of its class, one that the class had before, and a set."""

    factor, scale = 1.0, 1.0

    def __init__(self):
        self.seen = {0.0}
        Counts.factor = 1.0

    def __call__(self, x):
        Counts.factor *= 1.1
        self.scale += 0.1
        self.seen.add(float(len(self.seen)))
        with poutine.scale(scale=Counts.factor + len(self.seen)):
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, self.scale)


@pytest.mark.parametrize("make_model", [Mean, variable, Counts])
def test_what_is_replaced(make_model):
    assert_eager(lambda: (make_model(), lambda x: guide(), lambda i: (X,)), "changes at each run")


def scaled(x):
    x.mul_(0.5)  # here
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_argument_in_place(is_fresh):
    """Also as it is left by the last step."""

    def make():
        x = 4.0 * X
        return scaled, lambda x: guide(), lambda i: (x.clone() if is_fresh else x,)

    assert "# here" in assert_eager(make, "changes an argument in place.*Expected a copy of the argument")


def test_copy_of_argument_in_place():
    assert_replayed(Trace_ELBO, lambda: (lambda x: scaled(x.clone()), lambda x: guide(), lambda i: (X,)))


def recurrent(state):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z + state["h"])
    state["h"] = 0.5 * (state["h"] + z.detach())


def appended(state):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z + state[-1])
    state.append(z.detach())
    state.pop(0)


@pytest.mark.parametrize("model, state", [(recurrent, {"h": torch.zeros(())}), (appended, [torch.zeros(()), 1.0])])
def test_item_of_an_argument(model, state):
    def make():
        own = state.copy()
        return model, lambda x: guide(), lambda i: (own,)

    assert_eager(make, "replace an item of a list or dict that is an argument.*changed in place")


class Batch(dict):
    def __init__(self, x):
        super().__init__(x=x)


@pytest.mark.parametrize("kind", [Batch, lambda x: collections.defaultdict(list, x=x)])
def test_dict_of_another_class(kind):
    def model(batch):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), batch["x"])

    assert_replayed(Trace_ELBO, lambda: (model, lambda batch: guide(), lambda i: (kind(i + X),)))
