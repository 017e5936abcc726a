# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Values that are no arguments, and are changed between steps: steps are those of SVI at once."""

import collections
import dataclasses
import sys
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_rb
from tests.compiled.training import assert_replayed, train

pytestmark = pytest.mark.slow
X = torch.tensor([0.5, -1.2, 2.0])
CHANGE = 6


def guide():
    m = pyro.param("m", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(m, s))


def observe(scale):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("x", dist.Normal(z, scale), obs=X)


@pytest.fixture
def helpers(monkeypatch):
    """A module of the user's."""
    module = types.ModuleType("helpers_of_the_user")
    module.__file__ = __file__
    code = "SCALE = 1.0\ndef get_scale():\n    return SCALE\nclass Config:\n    scale = 1.0"
    exec(compile(code, __file__, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class Base:
    scale = 1.0

    def __call__(self):
        observe(self.get_scale())

    def get_scale(self):
        return self.scale


class Inherits(Base):
    def get_scale(self):
        return super().get_scale()


class Net(PyroModule):
    scale = 1.0

    def forward(self):
        self.observe()

    def observe(self):
        observe(self.half + self.half)

    @property
    def half(self):
        return self.scale / 2


@dataclasses.dataclass(eq=True)
class Data:
    scale: float = 1.0

    def __call__(self):
        observe(self.scale)


class Slots:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


def of_class():
    class Config:
        scale = 1.0

    return lambda: observe(Config.scale), lambda value: setattr(Config, "scale", value)


def of_own_class(cls):
    def make():
        local = type("Local", (cls,), {"scale": 1.0})
        return local(), lambda value: setattr(local, "scale", value)

    return make


def of_instance(cls):
    """Where the class had one before."""

    def make():
        model = cls()
        return model, lambda value: setattr(model, "scale", value)

    return make


def of_slots():
    config = Slots()
    return lambda: observe(config.scale), lambda value: setattr(config, "scale", value)


def of_set():
    options = set()
    return lambda: observe(3.0 if "wide" in options else 1.0), lambda value: options.add("wide")


def of_messenger():
    scaling = poutine.scale(scale=1.0)

    def model():
        with scaling:
            observe(1.0)

    return model, lambda value: setattr(scaling, "scale", value)


def of_condition():
    data = {"x": X}

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z, 1.0))

    return poutine.condition(model, data), lambda value: data.update(x=X + value)


def of_distribution():
    prior = dist.Normal(torch.tensor(0.0), 1.0)

    def model():
        pyro.sample("z", prior)

    return model, lambda value: setattr(prior, "loc", torch.tensor(value))


def of_name():
    """One that the code does not have."""
    model = Base()
    name = "".join(["sc", "ale"])
    model.get_scale = lambda: getattr(model, name)
    model.scale = 1.0
    return model, lambda value: setattr(model, "scale", value)


def of_new_attribute_in_inner_code():
    class Model:
        def __call__(self):
            observe(max(getattr(self, "scale", 1.0) for _ in range(2)))

    model = Model()
    return model, lambda value: setattr(model, "scale", value)


def of_new_attribute():
    class Model:
        def __call__(self):
            observe(getattr(self, "scale", 1.0))

    model = Model()
    return model, lambda value: setattr(model, "scale", value)


def of_method():
    model = Base()
    return model, lambda value: setattr(model, "get_scale", lambda: value)


def of_site():
    """A prior that reads an attribute."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.width = 1.0
            self.z = PyroSample(lambda self: dist.Normal(0.0, self.width))

        def forward(self):
            z = getattr(self, "z")
            with pyro.plate("data", len(X)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    model = Model()
    return model, lambda value: setattr(model, "width", value)


KINDS = {
    "method": of_method,
    "prior of a module": of_site,
    "new attribute": of_new_attribute,
    "new attribute, in inner code": of_new_attribute_in_inner_code,
    "class": of_class,
    "own class": of_own_class(Base),
    "own class of a module": of_own_class(Net),
    "inherited": of_own_class(Inherits),
    "instance": of_instance(Base),
    "instance of a module": of_instance(Net),
    "dataclass": of_instance(Data),
    "slots": of_slots,
    "set": of_set,
    "messenger": of_messenger,
    "condition": of_condition,
    "distribution": of_distribution,
    "name": of_name,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found(kind):
    def make():
        model, change = KINDS[kind]()
        return model, guide, lambda i: change(3.0) or () if i == CHANGE else ()

    assert_replayed(Trace_ELBO, make, num_graphs=2)


@pytest.mark.parametrize("kind", ["variable", "function", "class"])
def test_module_of_the_user(kind, helpers):
    def make():
        helpers.SCALE = helpers.Config.scale = 1.0

        def model():
            if kind == "variable":
                observe(helpers.SCALE)
            elif kind == "function":
                observe(helpers.get_scale())
            else:
                observe(helpers.Config.scale)

        def args(i):
            if i == CHANGE:
                helpers.SCALE = helpers.Config.scale = 3.0
            return ()

        return model, guide, args

    assert_replayed(Trace_ELBO, make, num_graphs=2)


@pytest.mark.parametrize("kind", ["forward hook", "backward hook"])
def test_hook_of_a_layer(kind):
    """Set between steps."""

    def make():
        pyro.set_rng_seed(0)
        layer = nn.Tanh()

        def model():
            pyro.sample("x", dist.Normal(layer(pyro.sample("z", dist.Normal(0.0, 1.0))), 1.0), obs=X[0])

        def args(i):
            if i == CHANGE and kind == "forward hook":
                layer.register_forward_hook(lambda module, inputs, output: 2 * output)
            elif i == CHANGE:
                layer.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
            return ()

        return model, guide, args

    assert_replayed(Trace_ELBO, make, num_graphs=2)


def test_attributes_that_the_model_does_not_use():
    """A trainer may write down what it likes."""

    class Trainer:
        def __init__(self):
            self.history, self.scale = [], 1.0

        def model(self):
            observe(self.scale)

        def log(self, i):
            self.history.append(i)
            self.step = i
            return ()

    def make():
        trainer = Trainer()
        return trainer.model, guide, trainer.log

    assert_replayed(Trace_ELBO, make, num_graphs=1)


def test_attributes_of_a_loss():
    class Scaled(Trace_ELBO):
        factors = [1.0]

        def loss_and_grads(self, model, guide, *args):
            return super().loss_and_grads(*(poutine.scale(fn, self.factors[0]) for fn in (model, guide)), *args)

    def make():
        Scaled.factors[0] = 1.0

        def args(i):
            if i == CHANGE:
                Scaled.factors[0] = 3.0
            return ()

        return lambda: observe(1.0), guide, args

    assert_replayed(Scaled, make, num_graphs=2)


def test_nothing_is_read_that_runs_code():
    """Properties, sites that a class declares, and class methods stay as they are."""

    class Model(PyroModule):
        @PyroSample
        def z(self):
            return dist.Normal(0.0, 1.0)

        @property
        def trainer(self):
            raise RuntimeError("no trainer")

        @property
        def weights(self):
            return torch.ones(1)

        @classmethod
        def likelihood(cls, z):
            return dist.Normal(z, 1.0)

        def forward(self):
            z = getattr(self, "z") * getattr(self, "weights")
            if getattr(self, "is_never", False):
                getattr(self, "trainer")
            with pyro.plate("data", len(X)):
                pyro.sample("x", getattr(self, "likelihood")(z), obs=X)

    before = dict(vars(Model))
    assert_replayed(Trace_ELBO, lambda: (Model(), guide, lambda i: ()))
    assert before.items() <= vars(Model).items()


def test_counter_of_the_library(recwarn):
    """``Counter.update`` adds up."""
    counts = collections.Counter()

    def model():
        counts["calls"] += 1
        observe(1.0)

    train(pyro_rb.compile(Trace_ELBO(), "replay"), lambda: (model, guide, lambda i: ()))
    assert "counts['calls'] changes at each run" in str(recwarn[0].message)
    assert counts == {"calls": 12}
