# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_rb import DReG_ELBO, RaoBlackwell_ELBO, STLTrace_ELBO
from tests.infer.flows import FLOWS, exact_scores, modules_of, stir

DIM = 4


@pytest.fixture(autouse=True)
def double(request):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def log_joint(z):
    z = z.double()
    return -(z.square().sum(-1) + (z.prod(-1) - 1.0).square() + (z[..., 0] * z[..., 1:].sum(-1)).sin())


def make(flow, batch=(), mask=None):
    """A model, and a guide of one flow."""
    modules = modules_of(flow)

    def model():
        z = pyro.sample("z", fn.mask(False)) if mask is None else pyro.sample("z", fn.mask(False))
        pyro.factor("x", log_joint(z).sum())

    fn = dist.TransformedDistribution(dist.Normal(torch.zeros(DIM), 1.0), flow)

    def guide():
        pyro.module("flow", modules)
        pyro.sample("z", fn)

    return model, guide, list(modules.parameters())


def gradient(loss, model, guide, parameters, seed=1):
    pyro.set_rng_seed(seed)
    for p in parameters:
        p.grad = None
    value = loss.loss_and_grads(model, guide)
    return value, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def assert_close(actual, expected, tolerance=1e-10):
    scale = max(g.abs().max() for g in expected) + 1.0
    assert max((a - b).abs().max() for a, b in zip(actual, expected)) < tolerance * scale


@pytest.mark.parametrize("c", [1.0, 0.4])
@pytest.mark.parametrize("name", FLOWS)
def test_exact(name, c):
    flow = FLOWS[name](DIM)
    flow = stir(flow if isinstance(flow, list) else [flow])
    model, guide, parameters = make(flow)
    value, plain = gradient(Trace_ELBO(), model, guide, parameters)
    pyro.set_rng_seed(1)
    scores = exact_scores(guide, parameters)
    loss = STLTrace_ELBO(control_variate_scale=c)
    found, actual = gradient(loss, model, guide, parameters)
    (row,) = loss.report()
    assert row.treatment.startswith("path gradient") and "solved by" in row.reason
    assert found == pytest.approx(value, rel=1e-12)
    assert_close(actual, [g - c * s for g, s in zip(plain, scores["z"])])
    assert max(s.abs().max() for s in scores["z"]) > 0.1
