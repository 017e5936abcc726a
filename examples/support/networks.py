# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A Bayesian network and its guides."""

from operator import attrgetter

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import kl_divergence
from torch.nn.functional import linear


class BayesianMLP(PyroModule):
    """
    A regression network with Normal weights and biases, and noise that is learned.

    :param list sizes: of the layers, from the number of features to 1.
    :param int num_rows: of the whole training data.
    """

    def __init__(self, sizes, num_rows):
        super().__init__()
        layers = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            layer = PyroModule[nn.Linear](size_in, size_out)
            scale = (size_in + 1) ** -0.5
            layer.weight = PyroSample(dist.Normal(0.0, scale).expand([size_out, size_in]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, scale).expand([size_out]).to_event(1))
            layers.append(layer)
        self.layers = PyroModule[nn.ModuleList](layers)
        self.noise = PyroParam(torch.tensor(0.5), constraints.positive)
        self.num_rows = num_rows

    def forward(self, x, y=None):
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h if i == 0 else torch.relu(h))
        mean = pyro.deterministic("mean", h.squeeze(-1))
        with poutine.scale(scale=self.num_rows / len(x)), pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def plain_name(site):
    return site.replace(".", "_")


class MeanField(PyroModule):
    """
    The guide AutoNormal as one would write it by hand, for real sites outside of plates.

    The sites of AutoNormal are Delta distributions of auxiliary ones, for which Pyro has
    no KL divergence. These are Normal, so ``TraceMeanField_ELBO`` has an analytic one.

    :param AutoNormal auto: a guide that was called before; its parameters are copied.
    """

    def __init__(self, auto):
        super().__init__()
        self.event_dims = {}
        for name, site in auto.prototype_trace.iter_stochastic_nodes():
            self.event_dims[name] = site["fn"].event_dim
            loc, scale = (attrgetter(name)(m).detach().clone() for m in (auto.locs, auto.scales))
            setattr(self, f"loc_{plain_name(name)}", PyroParam(loc))
            setattr(self, f"scale_{plain_name(name)}", PyroParam(scale, auto.scale_constraint))

    def parts(self, name):
        return tuple(getattr(self, f"{part}_{plain_name(name)}") for part in ("loc", "scale"))

    def forward(self, *args, **kwargs):
        for name, event_dim in self.event_dims.items():
            pyro.sample(name, dist.Normal(*self.parts(name)).to_event(event_dim))


class LocalByHand(PyroModule):
    """
    Local reparameterization of Kingma, Salimans and Welling (2015): a model that draws
    pre-activations itself, for a guide without sites.
    """

    def __init__(self, model, guide):
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, x, y):
        divergence, h = 0.0, x
        for i, layer in enumerate(self.model.layers):
            parts = [self.guide.parts(f"layers.{i}.{name}") for name in ("weight", "bias")]
            prior = dist.Normal(0.0, (layer.in_features + 1) ** -0.5)
            divergence = divergence + sum(kl_divergence(dist.Normal(*q), prior).sum() for q in parts)
            (loc, scale), (bias_loc, bias_scale) = parts
            h = h if i == 0 else torch.relu(h)
            variance = linear(h.square(), scale.square(), bias_scale.square())
            h = linear(h, loc, bias_loc) + variance.sqrt() * torch.randn_like(variance)
        pyro.factor("divergence", -divergence)
        with poutine.scale(scale=self.model.num_rows / len(x)), pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(h.squeeze(-1), self.model.noise), obs=y)


def make_guide(model, args, init_scale, init_loc_fn=init_to_sample):
    """An AutoNormal that is ready; its locations are draws of the prior by default."""
    guide = AutoNormal(model, init_loc_fn=init_loc_fn, init_scale=init_scale)
    guide(*args)
    return guide


def draw_layers(guide, num_layers, num_draws):
    """Weights and biases of each layer of a :class:`BayesianMLP`, drawn from a :class:`MeanField`."""
    names = [[f"layers.{i}.{part}" for part in ("weight", "bias")] for i in range(num_layers)]
    return [[dist.Normal(*guide.parts(name)).sample((num_draws,)) for name in layer] for layer in names]


def predict(layers, x):
    """Means for rows ``x`` by each of the draws of :func:`draw_layers`, ``[num_draws, num_rows]``."""
    h = x.expand(len(layers[0][1]), -1, -1)
    for i, (weight, bias) in enumerate(layers):
        h = torch.baddbmm(bias.unsqueeze(1), h if i == 0 else torch.relu(h), weight.mT)
    return h.squeeze(-1)
