# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``overview.py``: simulated data, but for the eight schools."""

from typing import Any, Callable, Dict, NamedTuple, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_mean
from torch import Tensor
from torch.nn.functional import relu, softplus

from pyro_rb.diagnostics.cli.examples import EXAMPLES
from pyro_rb.diagnostics.run.losses import make_loss

SHARPNESS = 0.02  # of the classifier at the start: it has a preference, and is not sure


class Problem(NamedTuple):
    """
    :param callable make: Returns model, guide and their arguments.
    :param str loss: The loss of the figure.
    :param tuple others: Losses that are in the table as well.
    :param tuple exact: The loss without noise, for the curves of training, and what it does
        with the guide.
    """

    title: str
    make: Callable[[], Tuple[Callable, Callable, Tuple]]
    reference: str
    loss: str
    others: Tuple[str, ...]
    lr: float
    num_steps: int
    exact: Any = None


def crops() -> Tuple[Callable, Callable, Tuple]:
    """A regression with correlated coefficients, and a guide that can follow these."""
    pyro.set_rng_seed(0)
    clay = (torch.arange(120) % 2).float()
    rain = 0.5 * torch.randn(120) + 0.8 * clay
    crop = 1.0 - 0.6 * clay + 0.4 * rain + 0.7 * clay * rain + 0.3 * torch.randn(120)

    def model(inputs: Tensor, crop: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("fields", len(crop)):
            pyro.sample("crop", dist.Normal((inputs * weights).sum(-1), noise), obs=crop)

    inputs = torch.stack([torch.ones(120), clay, rain, clay * rain], -1)
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_mean, init_scale=0.1)
    return model, guide, (inputs, crop)


def schools() -> Tuple[Callable, Callable, Tuple]:
    example = EXAMPLES["eight_schools"]
    return example.model, AutoNormal(example.model), example.make_args()


def mixture(num_components: int = 300, num_dims: int = 16) -> Tuple[Callable, Callable, Tuple]:
    """Clusters in space; the guide is a linear classifier."""
    pyro.set_rng_seed(0)
    centres = 3.0 * torch.randn(num_components, num_dims)
    data = centres[torch.randint(num_components, (600,))] + torch.randn(600, num_dims)
    start = data[:num_components]

    def model(data: Tensor) -> None:
        locs = pyro.param("locs", lambda: start.clone())
        with pyro.plate("data", len(data)):
            label = pyro.sample("label", dist.Categorical(torch.ones(num_components)))
            pyro.sample("x", dist.Normal(locs[label], 1.0).to_event(1), obs=data)

    def guide(data: Tensor) -> None:
        weight = pyro.param("weight", lambda: SHARPNESS * start)
        bias = pyro.param("bias", lambda: -0.5 * SHARPNESS * start.square().sum(-1))
        with pyro.plate("data", len(data)):
            pyro.sample("label", dist.Categorical(logits=data @ weight.T + bias))

    return model, guide, (data,)


def network(width: int = 50) -> Tuple[Callable, Callable, Tuple]:
    """A Bayesian neural network with one hidden layer, on a batch of 20 rows."""
    pyro.set_rng_seed(0)
    inputs = torch.randn(20, 40)
    outputs = torch.tanh(inputs[:, 0] + inputs[:, 1]) + 0.1 * torch.randn(20)

    def model(inputs: Tensor, outputs: Tensor) -> None:
        h = inputs
        for layer, (fan_out, fan_in) in enumerate([(width, 40), (1, width)]):
            prior = dist.Normal(torch.zeros(fan_out, fan_in), fan_in**-0.5).to_event(2)
            h = torch.nn.functional.linear(relu(h) if layer else h, pyro.sample(f"w{layer}", prior))
        with pyro.plate("rows", len(inputs)):
            pyro.sample("y", dist.Normal(h.squeeze(-1), 0.3), obs=outputs)

    return model, AutoNormal(model, init_loc_fn=init_to_mean), (inputs, outputs)


def autoencoder(num_hidden: int = 32, num_codes: int = 4) -> Tuple[Callable, Callable, Tuple]:
    """One batch of an importance-weighted autoencoder."""
    pyro.set_rng_seed(0)
    codes = torch.randn(50, num_codes)
    images = torch.bernoulli((codes @ torch.randn(num_codes, 30)).sigmoid())
    decoder = torch.nn.Sequential(
        torch.nn.Linear(num_codes, num_hidden), torch.nn.Tanh(), torch.nn.Linear(num_hidden, 30)
    )
    encoder = torch.nn.Sequential(
        torch.nn.Linear(30, num_hidden), torch.nn.Tanh(), torch.nn.Linear(num_hidden, 2 * num_codes)
    )

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            code = pyro.sample("code", dist.Normal(torch.zeros(num_codes), 1.0).to_event(1))
            pyro.sample("image", dist.Bernoulli(logits=decoder(code)).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images)):
            loc, scale = encoder(images).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, softplus(scale)).to_event(1))

    return model, guide, (images,)


PROBLEMS: Dict[str, Problem] = {
    "mixture": Problem(
        "Mixture of 300 clusters,\ndiscrete labels",
        mixture,
        "Trace_ELBO",
        "RaoBlackwellTopK_ELBO:budget=4",
        others=("TraceGraph_ELBO", "TraceEnum_ELBO+config_enumerate"),
        lr=0.05,
        num_steps=500,
        exact=(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate),
    ),
    "crops": Problem(
        "Regression,\nfull-rank normal guide",
        crops,
        "Trace_ELBO",
        "STLTrace_ELBO",
        others=("STLTrace_ELBO:1.0",),
        lr=0.02,
        num_steps=1500,
        exact=(make_loss("Trace_ELBO:num_particles=1000,vectorize_particles=True"), lambda guide: guide),
    ),
    "network": Problem(
        "Bayesian neural network,\nAutoNormal",
        network,
        "Trace_ELBO",
        "R2G2_ELBO:local",
        others=("R2G2_ELBO", "TraceMeanField_ELBO", "STLTrace_ELBO:1.0", "STLTrace_ELBO"),
        lr=0.01,
        num_steps=1000,
    ),
    "autoencoder": Problem(
        "Autoencoder, importance-\nweighted, 16 particles",
        autoencoder,
        "RenyiELBO:alpha=0,num_particles=16,vectorize_particles=True",
        "DReG_ELBO:num_particles=16,vectorize_particles=True",
        others=("DReG_ELBO:num_particles=16,vectorize_particles=True,control_variate_scale=adaptive",),
        lr=0.005,
        num_steps=1000,
    ),
    "schools": Problem(
        "Eight schools,\nAutoNormal",
        schools,
        "Trace_ELBO",
        "STLTrace_ELBO",
        others=("STLTrace_ELBO:1.0",),
        lr=0.02,
        num_steps=1000,
    ),
}
