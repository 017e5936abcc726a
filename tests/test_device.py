# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Losses and diagnostics follow the device of model and guide, whatever PyTorch's default is. Here that is "meta", whose
tensors have no numbers: what is made on the wrong device raises, or shows.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_rb

pytestmark = pytest.mark.slow
tensor = partial(torch.tensor, device="cpu", dtype=torch.get_default_dtype())
NUM_ITEMS = 6


def observe(loc):
    pyro.sample("x", dist.Normal(loc, tensor(1.0)), obs=torch.linspace(-1.0, 1.0, NUM_ITEMS, device="cpu"))


def normal(num=None):
    """Of one number, or of a vector."""
    start, scale = tensor(0.1 if num is None else [0.1] * num), tensor(0.7 if num is None else [0.7] * num)
    loc = pyro.param("loc", start)
    scale = pyro.param("scale", scale, constraint=dist.constraints.positive)
    return dist.Normal(loc, scale) if num is None else dist.Normal(loc, scale).to_event(1)


def continuous():
    def model():
        z = pyro.sample("z", dist.Normal(tensor(0.0), tensor(1.0)))
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            observe(z)

    return model, lambda: pyro.sample("z", normal())


def local():
    """With a mask, and locals of which each has its row."""

    def model():
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            z = pyro.sample("z", dist.Normal(tensor(0.0), tensor(1.0)))
            with poutine.mask(mask=torch.arange(NUM_ITEMS, device="cpu") > 1):
                observe(z)

    def guide():
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            pyro.sample("z", normal())

    return model, guide


def scaled():
    return map(partial(poutine.scale, scale=2.0), local())


def linear():
    """Weights that are used in part, so that part of them may be projected."""
    x = torch.linspace(0.0, 1.0, NUM_ITEMS * 8, device="cpu").reshape(NUM_ITEMS, 8)

    def model():
        w = pyro.sample("w", dist.Normal(tensor([0.0] * 9), tensor([1.0] * 9)).to_event(1))
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            observe(x @ w[:8] + w[8].exp())

    return model, lambda: pyro.sample("w", normal(9))


def discrete(fn):
    def make():
        values = torch.linspace(-1.0, 1.0, 10, device="cpu")

        def model():
            with pyro.plate("data", NUM_ITEMS, dim=-1):
                z = pyro.sample("z", fn(tensor([[0.4] * 10] * NUM_ITEMS)))
                observe(values[z.long()] + z)

        def guide():
            logits = pyro.param("logits", tensor([[0.1 * i for i in range(10)]] * NUM_ITEMS))
            with pyro.plate("data", NUM_ITEMS, dim=-1):
                pyro.sample("z", fn(logits))

        return model, guide

    return make


categorical = discrete(lambda logits: dist.Categorical(logits=logits))
bernoulli = discrete(lambda logits: dist.Bernoulli(logits=logits[..., 0]))
binomial = discrete(lambda logits: dist.Binomial(tensor(5.0), logits=logits[..., 0]))
poisson = discrete(lambda logits: dist.Poisson(logits[..., 1].sigmoid()))
negative_binomial = discrete(lambda logits: dist.NegativeBinomial(tensor(2.0), logits=logits[..., 0] - 2.0))
geometric = discrete(lambda logits: dist.Geometric(logits=logits[..., 0] + 1.0))


def mixed():
    """A global vector, and discrete locals."""

    def model():
        w = pyro.sample("w", dist.Normal(tensor([0.0] * 3), tensor([1.0] * 3)).to_event(1))
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=tensor([0.0] * 3)))
            observe(w[..., 0, None] + z)

    def guide():
        pyro.sample("w", normal(3))
        logits = pyro.param("logits", tensor([[0.1, 0.2, 0.3]] * NUM_ITEMS))
        with pyro.plate("data", NUM_ITEMS, dim=-1):
            pyro.sample("z", dist.Categorical(logits=logits))

    return model, guide


CASES = {
    "stl": (continuous, lambda: pyro_rb.STLTrace_ELBO()),
    "stl, adaptive": (scaled, lambda: pyro_rb.STLTrace_ELBO(control_variate_scale="adaptive")),
    "stl, particles": (local, lambda: pyro_rb.STLTrace_ELBO(num_particles=2, vectorize_particles=True)),
    "dreg": (continuous, lambda: pyro_rb.DReG_ELBO(3)),
    "dreg, adaptive": (continuous, lambda: pyro_rb.DReG_ELBO(3, control_variate_scale="adaptive")),
    "dreg, particles": (local, lambda: pyro_rb.DReG_ELBO(3, vectorize_particles=True)),
    "r2g2": (linear, lambda: pyro_rb.R2G2_ELBO()),
    "r2g2, local": (scaled, lambda: pyro_rb.R2G2_ELBO()),
    "topk": (categorical, lambda: pyro_rb.RaoBlackwellTopK_ELBO(k=3)),
    "topk, binomial": (binomial, lambda: pyro_rb.RaoBlackwellTopK_ELBO(k=2)),
    "topk, poisson": (poisson, lambda: pyro_rb.RaoBlackwellTopK_ELBO(k=2)),
    "topk, negative binomial": (negative_binomial, lambda: pyro_rb.RaoBlackwellTopK_ELBO(k=2)),
    "topk, geometric": (geometric, lambda: pyro_rb.RaoBlackwellTopK_ELBO(k=2)),
    "rao_blackwell": (mixed, lambda: pyro_rb.RaoBlackwell_ELBO()),
    "rao_blackwell, bernoulli": (bernoulli, lambda: pyro_rb.RaoBlackwell_ELBO()),
    "rao_blackwell, continuous": (linear, lambda: pyro_rb.RaoBlackwell_ELBO()),
}


RVRS = {
    "global": (continuous, {}),
    "given T": (continuous, {"T": 1.0, "adaptation": "fixed"}),
    "local": (local, {"local_plate": "data"}),
    "local, kept": (local, {"local_plate": "data", "local_size": NUM_ITEMS}),
}


@pytest.fixture
def meta():
    before = torch.empty(0).device
    torch.set_default_device("meta")
    yield
    torch.set_default_device(before)


@pytest.mark.parametrize("name", CASES)
def test_default_device_does_not_matter(name, meta):
    make, make_loss = CASES[name]
    model, guide = make()
    svi = SVI(model, guide, Adam({"lr": 0.01}), make_loss())
    for _ in range(6):
        assert isinstance(svi.step(), float)
    for parameter in pyro.get_param_store().values():
        assert parameter.device.type == "cpu" and parameter.isfinite().all()


class Waits(TorchDispatchMode):
    """Counts operations for which Python would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
        return func(*args, **(kwargs or {}))


#: By how many of a step, where a loss has more than Trace_ELBO, which reads each log density.
MORE_WAITS = {"r2g2": 4.0, "topk, binomial": 2.0, "rao_blackwell, bernoulli": 1.0, "rao_blackwell, continuous": 1.0}


@pytest.mark.parametrize("name", CASES)
def test_python_waits_as_seldom_as_with_trace_elbo(name):
    def count(loss, num_steps=20):
        pyro.clear_param_store()
        svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
        for _ in range(40):  # a scale is learned, and how sites are used
            svi.step()
        with Waits() as waits:
            for _ in range(num_steps):
                svi.step()
        return waits.count / num_steps

    make, make_loss = CASES[name]
    model, guide = make()
    with pyro.validation_enabled(False):
        assert 0 < count(make_loss()) <= count(Trace_ELBO()) + MORE_WAITS.get(name, 0.0)


@pytest.mark.parametrize("name", RVRS)
def test_default_device_does_not_matter_to_rejection_sampling(name, meta):
    """Without steps, in which ``pyro.factor`` moves its argument to the default device."""
    make, options = RVRS[name]
    model, guide = make()
    with torch.device("cpu"):
        rvrs = pyro_rb.RVRSGuide(model, guide, num_samples=4, **options)
    draws, quantiles = rvrs.sample_posterior(3), rvrs.quantiles([0.1, 0.9])
    assert all(x.device.type == "cpu" and x.isfinite().all() for x in [*draws.values(), *quantiles.values()])
    assert math.isfinite(rvrs.elbo(16)[0])


@pytest.mark.parametrize("make", [linear, categorical, mixed])
def test_compare(make, meta):
    losses = ["STLTrace_ELBO", "TraceGraph_ELBO", "RaoBlackwell_ELBO", "RaoBlackwellTopK_ELBO", "R2G2_ELBO"]
    result = pyro_rb.compare(*make(), losses, num_samples=10, num_burn_in=2, train_steps=2, progress=False)
    assert result.settings["device"] == "cpu" and str(result)
    assert not [row for state in result.states for row in state.losses if row.error]


@pytest.mark.parametrize("make", [linear, categorical, mixed])
def test_check_unbiased(make, meta):
    pyro_rb.check_unbiased("RaoBlackwell_ELBO", *make(), num_samples=20)
    pyro_rb.check_unbiased("RaoBlackwell_ELBO", *make(), num_samples=20, method="independent", projections=3)


@pytest.mark.parametrize("make", [linear, mixed])
def test_noise(make, meta):
    assert math.isfinite(pyro_rb.measure_noise("RaoBlackwell_ELBO", *make(), num_samples=40).loss)


def test_guard(meta):
    model, guide = linear()
    loss = pyro_rb.GradientGuard(pyro_rb.STLTrace_ELBO())
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    assert math.isfinite(svi.step())
    pyro.param("loc").data.fill_(math.inf)
    with pytest.raises(pyro_rb.NonFiniteError, match="parameter 'loc'"):
        svi.step()
