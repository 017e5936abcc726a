# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalMessenger
from torch import nn

from pyro_rb.diagnostics import compare, preserve_state


def model():
    pyro.sample("z", dist.LogNormal(0.0, 1.0))


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_generators_go_on_as_if_nothing_had_happened():
    pyro.set_rng_seed(3)
    expected = draws()
    pyro.set_rng_seed(3)
    with preserve_state():
        draws()
        pyro.set_rng_seed(7)
        draws()
    assert draws() == expected


def test_param_store():
    store = pyro.get_param_store()
    loc = pyro.param("loc", torch.tensor(1.0))
    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    leaves = dict(store.named_parameters())
    loc.grad = torch.tensor(5.0)
    with preserve_state():
        assert loc.grad is None
        with torch.no_grad():
            for leaf in leaves.values():
                leaf += 1
        loc.grad = torch.tensor(7.0)
        pyro.param("new", torch.zeros(2))
        del store["scale"]
    assert set(store) == {"loc", "scale"}
    assert store["loc"].item() == 1.0
    assert store["scale"].item() == pytest.approx(2.0)
    assert all(dict(store.named_parameters())[name] is leaf for name, leaf in leaves.items())
    assert loc.grad.item() == 5.0
    assert loc.unconstrained() is leaves["loc"]


def test_restores_after_an_exception():
    with pytest.raises(RuntimeError, match="in the block"):
        with preserve_state():
            pyro.param("new", torch.zeros(2))
            raise RuntimeError("in the block")
    assert not pyro.get_param_store()


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoNormalMessenger], ids=lambda make: make.__name__
)
def test_lazy_guide_is_uninitialized_again(make):
    guide = make(model)
    before = {name: value for name, value in vars(guide).items() if not name.startswith("_")}
    with preserve_state(model, guide):
        guide()
        assert pyro.get_param_store()
    assert not pyro.get_param_store()
    assert {k: v for k, v in vars(guide).items() if not k.startswith("_")} == before
    assert not list(guide.parameters())
    guide()  # it still works
    assert len(list(guide.parameters())) == 2


def test_lazy_guide_list_is_uninitialized_again():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(model))
    with preserve_state(model, guide):
        guide()
    assert guide.prototype_trace is None and guide[0].prototype_trace is None
    assert guide[0].model.__wrapped__ if hasattr(guide[0].model, "__wrapped__") else guide[0].model
    guide()
    assert len(list(guide.parameters())) == 2


def test_initialised_guide_keeps_its_tensors():
    guide = AutoNormal(model)
    guide()
    leaves = list(guide.parameters())
    values = [leaf.detach().clone() for leaf in leaves]
    with preserve_state(guide):
        guide()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(2).add_(1)
    assert all(a is b for a, b in zip(leaves, guide.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(leaves, values))
    assert guide.median()["z"].item() == pytest.approx(values[0].exp().item())


def test_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(model)
        with preserve_state(model, guide):
            guide()
            assert list(guide.parameters())
        assert not list(guide.parameters())
        guide()
        assert not pyro.get_param_store()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.linear = nn.Linear(2, 1)
        self.calls = []

    def model(self, x):
        self.calls.append(len(x))
        return self.linear(self.norm(x))

    forward = model


NET = Net()


def uses_a_global(x):
    return NET.model(x)


def through_a_helper(x):
    return uses_a_global(x)


class Holder:
    def __init__(self, net):
        self.net = net
        self.count = 0

    def model(self, x):
        self.count += 1
        return self.net.model(x)


def wrappers():
    net = Net()

    def closure(x):
        return net.model(x)

    holder = Holder(net)
    yield "method", net.model, net
    yield "closure", closure, net
    yield "partial", functools.partial(lambda n, x: n.model(x), net), net
    yield "handler", poutine.scale(closure, scale=2.0), net
    yield "handler of method", poutine.mask(net.model, mask=False), net
    yield "holder", holder.model, net
    yield "global", uses_a_global, NET
    yield "helper", through_a_helper, NET


class Slots:
    __slots__ = ("net",)


class Called:
    def __init__(self, net):
        self.nets = {"first": [net]}

    def __call__(self, x):
        return self.nets["first"][0].model(x)


@dataclasses.dataclass
class Parts:
    net: Net


class Shelf:
    net = Net()


REGISTRY = {"deep": (SimpleNamespace(parts=Parts(Net())),)}
PLAIN_CLASS = Shelf


def hidden_modules():
    net = Net()
    slots = Slots()
    slots.net = net
    yield "callable object", Called(net), net
    yield "dict", lambda x, nets={"a": net}: nets["a"].model(x), net
    yield "namespace in a tuple in a global dict", lambda x: REGISTRY["deep"][0].parts.net.model(x), (
        REGISTRY["deep"][0].parts.net
    )
    yield "slots", lambda x: slots.net.model(x), net
    yield "class attribute", lambda x: PLAIN_CLASS.net.model(x), Shelf.net
    yield "inner function", lambda x: (lambda: REGISTRY["deep"][0].parts.net.model(x))(), REGISTRY["deep"][0].parts.net


@pytest.mark.parametrize("name, run, net", list(hidden_modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_modules_are_found_where_they_hide(name, run, net):
    mean, weight = net.norm.running_mean.clone(), net.linear.weight.detach().clone()
    with preserve_state(run):
        run(torch.randn(5, 2))
        with torch.no_grad():
            net.linear.weight += 1
    assert torch.equal(net.norm.running_mean, mean) and torch.equal(net.linear.weight, weight)
    assert net.calls == [] and net.linear.weight.grad is None


@pytest.mark.parametrize("where", ["argument", "nowhere to be found", "registered only"])
def test_compare_puts_networks_back(where):
    net = Net()
    x = torch.randn(5, 2)

    def model(x, nets):
        found = nets["a"][0] if isinstance(nets, dict) else FINDER(nets)
        pyro.module("net", found)
        if where == "registered only":
            mean = torch.nn.functional.linear(x, found.linear.weight)[:, 0]
        else:
            mean = found(x)[:, 0]
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(z + mean, 1.0), obs=torch.ones(5))

    nets = {"a": [net]} if where == "argument" else hidden_number(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = compare(
        model, AutoNormal(poutine.block(model, hide=["y"])), "STLTrace_ELBO", args=(x, nets), train_steps=[0, 5],
        num_samples=4, num_burn_in=0, progress=False,
    )
    assert result.states[0].losses[0].loss != result.states[1].losses[0].loss
    assert "net$$$linear.weight" in result.parameters
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not pyro.get_param_store()


def hidden_number(net):
    """A number that leads to the module, which no search can follow."""
    _KEPT.append(weakref.ref(net))
    return len(_KEPT) - 1


_KEPT = []


def FINDER(number):
    return _KEPT[number]()


@pytest.mark.parametrize("name, function, net", list(wrappers()), ids=lambda v: v if isinstance(v, str) else "")
def test_modules_are_found_and_restored(name, function, net):
    net.train()
    net.calls.clear()
    x = torch.randn(5, 2)
    weight, grad = net.linear.weight, torch.ones(1, 2)
    weight.grad = grad
    value, mean = weight.detach().clone(), net.norm.running_mean.clone()
    with preserve_state(function):
        assert weight.grad is None
        function(x)
        assert net.calls == [5] and not torch.equal(net.norm.running_mean, mean)
        net.eval()
        with torch.no_grad():
            weight += 1
        net.extra = nn.Linear(1, 1)
        net.linear.bias = None
    assert net.training and net.norm.training
    assert net.calls == []
    assert not hasattr(net, "extra")
    assert net.linear.bias is not None
    assert net.linear.weight is weight and torch.equal(weight, value)
    assert weight.grad is grad
    assert torch.equal(net.norm.running_mean, mean)
    assert net.norm.num_batches_tracked == 0
    if name == "holder":
        assert function.__self__.count == 0


def test_graph_of_the_user_stays_usable():
    net = nn.Linear(2, 1)
    loss = net(torch.ones(2)).square().sum()
    with preserve_state(net):
        net(torch.zeros(2))
    loss.backward()  # fails if a parameter was written to


def test_unassigned_closure_variable():
    def recursive(n):
        return later(n)

    with preserve_state(recursive):
        pass

    def later(n):
        return n

    assert recursive(1) == 1
