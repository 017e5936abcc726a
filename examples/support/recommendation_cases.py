# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``benchmarks/recommendations.py``: fourteen kinds that users have, on simulated data and digits."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple, Union

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_sample
from torch import nn

from models import mixture, vae
from support import mixed_models
from support.data import data_of, load_digits

F = nn.functional
#: An importance-weighted bound, and its number of particles.
BOUND = "RenyiELBO:alpha=0,num_particles=16,vectorize_particles=True,max_plate_nesting=1"


@dataclass
class Case:
    """
    :param str title: Model and guide in a few words.
    :param callable model: The model.
    :param callable guide: The guide. Default: ``AutoNormal``.
    :param args: Of both, or a function that draws them.
    :param str reference: Of the comparison. Default: its own choice.
    :param float seconds: CPU time of one training run.
    """

    title: str
    model: Callable
    guide: Optional[Callable] = None
    args: Union[Tuple[Any, ...], Callable] = ()
    reference: Optional[str] = None
    seconds: float = 4.0

    def __post_init__(self):
        self.guide = self.guide or AutoNormal(self.model)


def real(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value))


def hierarchical_poisson(num_groups=25, size=12):
    """Counts of groups, each with its own rate, and a covariate."""
    x = torch.randn(size, num_groups)
    counts = dist.Poisson((1.0 + 0.7 * torch.randn(num_groups) + 0.4 * x).exp()).sample()

    def model():
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", num_groups, dim=-1):
            base = pyro.sample("base", dist.Normal(centre, spread))
            with pyro.plate("rows", size, dim=-2):
                pyro.sample("counts", dist.Poisson((base + slope * x).exp()), obs=counts)

    return Case("Hierarchical Poisson regression", model)


def item_response(num_people=80, num_items=25):
    """Two parameters for each item, one for each person."""
    ability, difficulty = torch.randn(num_people), torch.randn(num_items, 1)
    answers = torch.bernoulli(torch.sigmoid((0.3 * torch.randn(num_items, 1)).exp() * (ability - difficulty)))

    def model():
        items, people = pyro.plate("items", num_items, dim=-2), pyro.plate("people", num_people, dim=-1)
        with items:
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        with people:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
            with items:
                pyro.sample("answers", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)

    return Case("Item response, two parameters", model)


def sparse_process(num_rows=200, num_inducing=12):
    """Classes of points by a Gaussian process with inducing points, of Pyro's contrib."""
    x = torch.rand(num_rows) * 6 - 3
    y = (torch.sin(2 * x) + 0.3 * torch.randn(num_rows) > 0).float()
    inducing = torch.linspace(-3, 3, num_inducing)
    process = gp.models.VariationalSparseGP(
        x, y, gp.kernels.RBF(1), Xu=inducing, likelihood=gp.likelihoods.Binary(), whiten=True, jitter=1e-4
    )
    return Case("Sparse Gaussian process, classes", process.model, process.guide)


def factorization(num_rows=60, num_columns=40, rank=3):
    """Ratings, of which half are missing."""
    ratings = torch.randn(num_rows, rank) @ torch.randn(rank, num_columns) + 0.3 * torch.randn(num_rows, num_columns)
    is_known = torch.rand(num_rows, num_columns) < 0.5

    def factors(name, size):
        with pyro.plate(f"plate_{name}", size):
            return pyro.sample(name, dist.Normal(torch.zeros(rank), 1.0).to_event(1))

    def model():
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        u, v = factors("u", num_rows), factors("v", num_columns)
        mean = torch.einsum("...ik,...jk->...ij", u, v)
        with pyro.plate("columns", num_columns, dim=-1), pyro.plate("rows", num_rows, dim=-2):
            with poutine.mask(mask=is_known):
                pyro.sample("ratings", dist.Normal(mean, noise), obs=ratings)

    return Case("Matrix factorization, half missing", model, AutoNormal(model, init_loc_fn=init_to_sample))


def mixture_of_four():
    values, _ = mixture.simulate(300)
    return Case("Mixture of Gaussians, 4 components", mixture.model, mixture.guide, (values,))


def hidden_markov():
    return Case("Hidden Markov model, 5 states", *mixed_models.hidden_markov())


def network(batch_size=64, width=30):
    """A Bayesian network with one hidden layer for the digits of scikit-learn, 64 pixels."""
    with data_of("scikit-learn"):
        from sklearn.datasets import load_digits as load
    images, labels = (torch.tensor(x) for x in load(return_X_y=True))
    images = images.float() / 16

    def layer(name, size_in, size):
        prior = dist.Normal(0.0, size_in**-0.5).expand([size, size_in])
        weight = pyro.sample(f"{name}_weight", prior.to_event(2))
        bias = pyro.sample(f"{name}_bias", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        return lambda x: F.linear(x, weight, bias)

    def model():
        first, second = layer("first", 64, width), layer("second", width, 10)
        with pyro.plate("rows", len(images), subsample_size=batch_size) as rows:
            logits = second(torch.tanh(first(images[rows])))
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels[rows])

    return Case("Bayesian network on digits", model, AutoNormal(model, init_scale=0.05), seconds=6.0)


class ConvolutionalVae(vae.Vae):
    """That of ``models/vae.py`` for 8 x 8 pixels, with convolutions."""

    @staticmethod
    def network(size_in, width, size_out):
        if size_in == 64:
            return nn.Sequential(
                nn.Unflatten(-1, (1, 8, 8)),
                nn.Conv2d(1, width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(1),
                nn.Linear(16 * width, size_out),
            )
        return nn.Sequential(
            nn.Linear(size_in, 16 * width),
            nn.ReLU(),
            nn.Unflatten(-1, (width, 4, 4)),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Flatten(1),
        )


def batches(images, size):
    return lambda: (images[torch.randint(len(images), (size,))],)


def convolutional():
    images = load_digits(None, seed=0)[0]
    networks = ConvolutionalVae(64, 8, 16)
    args = batches(images, 100)
    return Case("Convolutional autoencoder on digits", networks.model, networks.guide, args, seconds=6.0)


def horseshoe(num_rows=100, num_columns=40):
    """Five of forty coefficients are not zero."""
    x = torch.randn(num_rows, num_columns)
    y = x[:, :5] @ torch.tensor([2.0, -1.5, 1.0, -1.0, 0.7]) + 0.5 * torch.randn(num_rows)

    def model():
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        overall = pyro.sample("overall", dist.HalfCauchy(0.1))
        with pyro.plate("columns", num_columns):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            size = pyro.sample("size", dist.Normal(0.0, 1.0))
        mean = torch.einsum("ij,...j->...i", x, size * local * overall)
        with pyro.plate("rows", num_rows):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return Case("Horseshoe regression", model)


def survival(num_rows=200, num_columns=5):
    """Weibull times, of which a third are censored."""
    x = torch.randn(num_rows, num_columns)
    scale = (x @ torch.linspace(-0.5, 0.5, num_columns)).exp()
    time, end = dist.Weibull(scale, 1.5).sample(), dist.Exponential(0.5).sample((num_rows,))
    is_seen, time = time <= end, torch.min(time, end)

    def model():
        shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(num_columns), 1.0).to_event(1))
        hazard = (time / torch.einsum("ij,...j->...i", x, weights).exp()) ** shape
        with pyro.plate("rows", num_rows):
            log_density = shape.log() + hazard.log() - time.log()
            pyro.factor("time", torch.where(is_seen, log_density, torch.zeros(())) - hazard)

    return Case("Survival times, censored", model)


def semi_supervised():
    model, guide = mixed_models.semi_supervised()
    images, _ = mixed_models.digits()
    return Case("Semi-supervised autoencoder, no labels", model, guide, batches(images, 100), seconds=6.0)


def state_space(num_steps=100):
    """Stochastic volatility: a random walk of the log variance."""
    walk = 0.15 * torch.randn(num_steps).cumsum(0)
    returns = torch.randn(num_steps) * (0.5 * walk).exp()

    def model():
        step = pyro.sample("step", dist.HalfNormal(0.5))
        start = pyro.sample("start", dist.Normal(0.0, 1.0))
        shocks = pyro.sample("shocks", dist.Normal(torch.zeros(num_steps), 1.0).to_event(1))
        walk = start.unsqueeze(-1) + step.unsqueeze(-1) * shocks.cumsum(-1)
        with pyro.plate("steps", num_steps):
            pyro.sample("returns", dist.Normal(0.0, (0.5 * walk).exp()), obs=returns)

    return Case("State space, stochastic volatility", model, AutoDiagonalNormal(model))


def zero_inflated(num_rows=200):
    """Counts with too many zeros, and for each row whether it is one of these."""
    x = torch.randn(num_rows)
    is_zero = torch.rand(num_rows) < 0.3
    counts = dist.Poisson((0.8 + 0.6 * x).exp()).sample() * ~is_zero

    def model():
        base = pyro.sample("base", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        share = pyro.sample("share", dist.Beta(1.0, 2.0))
        with pyro.plate("rows", num_rows):
            zero = pyro.sample("zero", dist.Bernoulli(share))
            rate = (base + slope * x).exp() * (1 - zero) + 1e-3 * zero
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    continuous = AutoNormal(poutine.block(model, hide=["zero", "counts"]))

    def guide():
        continuous()
        with pyro.plate("rows", num_rows):
            pyro.sample("zero", dist.Bernoulli(logits=real("logits", torch.where(counts > 0, -3.0, 0.0))))

    return Case("Zero-inflated counts", model, guide)


def importance_weighted():
    images = load_digits(None, seed=0)[0][:100]
    networks = vae.Vae(64, 8, 50)
    return Case("Importance-weighted autoencoder", networks.model, networks.guide, (images,), BOUND)


#: By name, a function that makes the case.
CASES: Dict[str, Callable[[], Case]] = {
    "hierarchical_poisson": hierarchical_poisson,
    "item_response": item_response,
    "sparse_process": sparse_process,
    "factorization": factorization,
    "network": network,
    "convolutional": convolutional,
    "horseshoe": horseshoe,
    "survival": survival,
    "state_space": state_space,
    "importance_weighted": importance_weighted,
    "mixture": mixture_of_four,
    "hidden_markov": hidden_markov,
    "semi_supervised": semi_supervised,
    "zero_inflated": zero_inflated,
}
