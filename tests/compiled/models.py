# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models of many kinds: each function returns model, guide, and arguments by step."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools_model(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools(make_guide=AutoNormal):
    return schools_model, make_guide(schools_model), lambda i: (Y, SIGMA)


def schools_joint():
    return schools(AutoMultivariateNormal)


def schools_low_rank():
    return schools(AutoLowRankMultivariateNormal)


def schools_map():
    return schools(AutoDelta)


def conjugate(scale=1.0):
    """Hand-written, with a constrained parameter."""
    x = torch.tensor([0.5, -1.2, 2.0, 0.3])

    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        m = pyro.param("m", torch.zeros(4))
        s = pyro.param("s", torch.ones(4), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, s))

    return model, guide, lambda i: (x,)


def minibatch():
    """Subsampled by the plate."""
    x = torch.linspace(-1.0, 2.0, 12)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x[index])

    return model, AutoNormal(model), lambda i: (x,)


def mixture():
    """Discrete and continuous sites."""
    x = torch.tensor([-2.0, -1.8, 2.2, 1.9])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[..., z], 1.0), obs=x)

    def guide(x):
        m = pyro.param("m", torch.tensor([-0.5, 0.5]))
        pyro.sample("loc", dist.Normal(m, 0.3).to_event(1))
        with pyro.plate("data", len(x)):
            logits = pyro.param("logits", torch.zeros(4, 2))
            pyro.sample("z", dist.Categorical(logits=logits))

    return model, guide, lambda i: (x,)


def enumerated():
    model, guide, args = mixture()
    return model, pyro.infer.config_enumerate(guide), args


def logistic():
    torch.manual_seed(1)
    x, y = torch.randn(20, 3), (torch.rand(20) < 0.5).float()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            logits = torch.nn.functional.linear(x, w.unsqueeze(0)).squeeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", 0.3 * torch.ones(3), constraint=constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return model, guide, lambda i: (x, y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.log_sigma = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, y=None):
        mean = x @ self.weight.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean.squeeze(-1), self.log_sigma.exp()), obs=y)


def module():
    torch.manual_seed(1)
    x, y = torch.randn(6, 2), torch.randn(6)
    model = Regression()
    return model, AutoNormal(model), lambda i: (x, y)


def autoencoder(with_norm=False, dropout=0.0):
    """Amortized, with another minibatch at each step."""
    torch.manual_seed(1)
    data = torch.rand(40, 5)
    norm = [torch.nn.BatchNorm1d(4)] if with_norm else []
    encoder = torch.nn.Sequential(
        torch.nn.Linear(5, 4), *norm, torch.nn.Softplus(), torch.nn.Dropout(dropout), torch.nn.Linear(4, 4)
    )
    decoder = torch.nn.Linear(2, 5)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    model.encoder = encoder
    return model, guide, lambda i: (data[8 * (i % 5) : 8 * (i % 5) + 8],)
