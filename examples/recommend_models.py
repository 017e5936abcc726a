# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``recommendations.py``: of the kinds that users of Pyro have."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import mixture
import pyro
import pyro.distributions as dist
import rvrs_logistic
import torch
import vae
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.ops.indexing import Vindex

from pyro_rb.diagnostics.cli.examples import EXAMPLES
from utils.data import data_of, load_digits, load_mnist

ENUMERATED = "TraceEnum_ELBO+config_enumerate"
#: An importance-weighted bound, and its number of particles.
BOUND = "RenyiELBO:alpha=0,num_particles=16,vectorize_particles=True,max_plate_nesting=1"


@dataclass
class Case:
    """
    :param str title: Model and guide in a few words.
    :param callable make: Returns both, new.
    :param tuple args: Of both, in training.
    :param float lr: Of Adam.
    :param float seconds: CPU time of one training run.
    :param str objective: The loss that gives the value of the objective, as for ``make_loss``.
    :param int draws: How many of its values are averaged.
    :param tuple all_args: Of both, for the objective. Default: ``args``.
    :param str reference: Of the comparison. Default: its own choice.
    :param tuple losses: To compare. Default: its own choice.
    """

    title: str
    make: Callable[[], Tuple[Callable, Callable]]
    args: Tuple[Any, ...]
    lr: float
    seconds: float
    objective: str
    draws: int = 1
    all_args: Optional[Tuple[Any, ...]] = None
    reference: Optional[str] = None
    losses: Optional[Tuple[str, ...]] = None


def vectorized(loss, num_particles, max_plate_nesting=1):
    return f"{loss}:num_particles={num_particles},vectorize_particles=True,max_plate_nesting={max_plate_nesting}"


def shipped(name, make_guide, guide_name, lr=None):
    """A model that pyro_rb carries, with an autoguide."""
    example = EXAMPLES[name]
    return Case(
        title=f"{example.title.split('(')[0].strip()}, {guide_name}",
        make=lambda: (example.model, make_guide(example.model)),
        args=example.make_args(),
        lr=lr or example.learning_rate,
        seconds=4.0,
        objective=vectorized("Trace_ELBO", 10000),
    )


def small_flow(model):
    return AutoIAFNormal(model, hidden_dim=[20])


def logistic(make_guide, guide_name):
    """Breast cancer data, 569 rows of 30 features."""
    model = rvrs_logistic.make_model(*rvrs_logistic.load_data(569, seed=0))
    return Case(
        title=f"Logistic regression, {guide_name}",
        make=lambda: (model, make_guide(model)),
        args=(),
        lr=0.01,
        seconds=4.0,
        objective=vectorized("Trace_ELBO", 300),
    )


def assignments():
    """300 items of four Gaussian components."""
    pyro.set_rng_seed(0)
    values, _ = mixture.simulate(300)
    return Case(
        title="Mixture of Gaussians, 4 components",
        make=lambda: (mixture.model, mixture.guide),
        args=(values,),
        lr=0.03,
        seconds=4.0,
        objective=vectorized(ENUMERATED, 500),
    )


def positive(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value), constraint=constraints.positive)


def real(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value))


def outliers(num_rows=200, num_groups=10):
    """A hierarchical regression in which each row may be an outlier."""
    pyro.set_rng_seed(1)
    groups, x = torch.randint(num_groups, (num_rows,)), torch.randn(num_rows)
    is_outlier = torch.rand(num_rows) < 0.15
    y = torch.randn(num_groups)[groups] + 1.5 * x + torch.randn(num_rows) * (0.5 + 3.5 * is_outlier)

    def model():
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(2.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        share = pyro.sample("share", dist.Beta(1.0, 4.0))
        with pyro.plate("groups", num_groups):
            base = pyro.sample("base", dist.Normal(centre, spread))
        with pyro.plate("rows", num_rows):
            outlier = pyro.sample("outlier", dist.Bernoulli(share))
            mean = base[..., groups] + slope * x
            pyro.sample("y", dist.Normal(mean, noise + 4.0 * outlier), obs=y)

    def make():
        continuous = AutoNormal(poutine.block(model, hide=["outlier", "y"]))

        def guide():
            continuous()
            with pyro.plate("rows", num_rows):
                logits = real("logits", torch.zeros(num_rows))
                pyro.sample("outlier", dist.Bernoulli(logits=logits))

        return model, guide

    return Case(
        title="Hierarchical regression with outliers",
        make=make,
        args=(),
        lr=0.02,
        seconds=4.0,
        objective=vectorized(ENUMERATED, 500),
    )


def change_point(num_years=150):
    """Counts whose rate changes in an unknown year."""
    pyro.set_rng_seed(2)
    years = torch.arange(num_years)
    counts = dist.Poisson(torch.where(years < 60, 3.0, 2.0)).sample()

    def model():
        early = pyro.sample("early", dist.LogNormal(0.0, 1.0))
        late = pyro.sample("late", dist.LogNormal(0.0, 1.0))
        year = pyro.sample("year", dist.Categorical(torch.ones(num_years)))
        with pyro.plate("years", num_years):
            pyro.sample("counts", dist.Poisson(torch.where(years < year, early, late)), obs=counts)

    def guide():
        for name in ("early", "late"):
            pyro.sample(name, dist.LogNormal(real(f"{name}_loc", 0.0), positive(f"{name}_scale", 0.2)))
        pyro.sample("year", dist.Categorical(logits=real("logits", torch.zeros(num_years))))

    return Case(
        title="Poisson counts with a change point, 150 values",
        make=lambda: (model, guide),
        args=(),
        lr=0.02,
        seconds=4.0,
        objective=vectorized(ENUMERATED, 15),
    )


def matching(num_items=100, num_values=1000, size=8):
    """Noisy copies of entries of a table: which entry, and how much noise?"""
    pyro.set_rng_seed(3)
    entries = torch.randn(num_values, size)
    data = entries[torch.randint(num_values, (num_items,))] + 0.5 * torch.randn(num_items, size)

    def model():
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", num_items):
            entry = pyro.sample("entry", dist.Categorical(torch.ones(num_values)))
            pyro.sample("data", dist.Normal(entries[entry], noise.unsqueeze(-1)).to_event(1), obs=data)

    def guide():
        pyro.sample("noise", dist.LogNormal(real("noise_loc", 0.0), positive("noise_scale", 0.1)))
        with pyro.plate("items", num_items):
            logits = real("logits", torch.zeros(num_items, num_values))
            pyro.sample("entry", dist.Categorical(logits=logits))

    return Case(
        title="Matching 100 items to 1000 entries",
        make=lambda: (model, guide),
        args=(),
        lr=0.05,
        seconds=5.0,
        objective=f"{ENUMERATED}:max_plate_nesting=1",
        draws=2,
    )


def topics(num_topics=8, num_words=40, num_documents=20, size=30):
    """Latent Dirichlet allocation with a topic for each word."""
    pyro.set_rng_seed(4)
    words = dist.Dirichlet(torch.full((size,), 0.1)).sample((num_topics,))
    mix = dist.Dirichlet(torch.full((num_topics,), 0.3)).sample((num_documents,))
    data = dist.Categorical(words[dist.Categorical(mix).sample((num_words,))]).sample()

    def plates():
        return pyro.plate("documents", num_documents, dim=-1), pyro.plate("words", num_words, dim=-2)

    def model():
        documents, positions = plates()
        prior = dist.Dirichlet(torch.full((num_topics, size), 0.2)).to_event(1)
        vocabulary = pyro.sample("vocabulary", prior)
        with documents:
            shares = pyro.sample("shares", dist.Dirichlet(torch.full((num_topics,), 0.5)))
            with positions:
                topic = pyro.sample("topic", dist.Categorical(shares))
                pyro.sample("word", dist.Categorical(Vindex(vocabulary)[..., topic, :]), obs=data)

    def guide():
        documents, positions = plates()
        start = lambda: torch.ones(num_topics, size) + torch.rand(num_topics, size)  # noqa: E731
        alpha = pyro.param("vocabulary_alpha", start, constraint=constraints.positive)
        pyro.sample("vocabulary", dist.Dirichlet(alpha).to_event(1))
        with documents:
            alpha = positive("shares_alpha", torch.ones(num_documents, num_topics))
            pyro.sample("shares", dist.Dirichlet(alpha))
            with positions:
                logits = real("logits", torch.zeros(num_words, num_documents, num_topics))
                pyro.sample("topic", dist.Categorical(logits=logits))

    return Case(
        title="Topics of words (LDA), 8 topics",
        make=lambda: (model, guide),
        args=(),
        lr=0.03,
        seconds=4.0,
        objective=vectorized(ENUMERATED, 20, max_plate_nesting=2),
    )


def network(batch_size=20, width=30, remark="AutoNormal", losses=None):
    """A Bayesian network with one hidden layer for the digits of scikit-learn, 64 pixels."""
    with data_of("scikit-learn"):
        from sklearn.datasets import load_digits as load
    images, labels = (torch.tensor(x) for x in load(return_X_y=True))
    images = images.float() / 16

    def layer(name, size_in, size):
        prior = dist.Normal(0.0, size_in**-0.5).expand([size, size_in])
        weight = pyro.sample(f"{name}_weight", prior.to_event(2))
        bias = pyro.sample(f"{name}_bias", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    def model(batch_size):
        first, second = layer("first", 64, width), layer("second", width, 10)
        with pyro.plate("rows", len(images), subsample_size=batch_size) as rows:
            logits = second(torch.tanh(first(images[rows])))
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels[rows])

    return Case(
        title=f"Bayesian network on digits, {remark}",
        make=lambda: (model, AutoNormal(model, init_scale=0.05)),
        args=(batch_size,),
        lr=0.003,
        seconds=6.0,
        objective="Trace_ELBO",
        draws=5,
        all_args=(None,),
        losses=losses,
    )


class Vae(vae.Vae):
    """That of ``vae.py``, on a few images of all at each step."""

    def model(self, images, batch_size):
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(images), subsample_size=batch_size) as rows:
            prior = dist.Normal(images.new_zeros(self.code_size), 1.0).to_event(1)
            code = pyro.sample("code", prior)
            pixels = dist.Bernoulli(logits=self.decoder(code), validate_args=False)
            pyro.sample("pixels", pixels.to_event(1), obs=images[rows])

    def guide(self, images, batch_size):
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(images), subsample_size=batch_size) as rows:
            loc, log_scale = self.encoder(images[rows]).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


def autoencoder(title, images, seconds, objective, batch_size=100, width=100, code_size=8, **options):
    def make():
        networks = Vae(images.shape[1], code_size, width)
        return networks.model, networks.guide

    return Case(
        title=title,
        make=make,
        args=(images, batch_size),
        lr=1e-3,
        seconds=seconds,
        objective=objective,
        all_args=(images, None),
        **options,
    )


def elbo_of_digits():
    (images, _), _ = load_mnist(None, 2000, 1, seed=0)
    return autoencoder("Variational autoencoder, 2000 digits", images, 7.0, "Trace_ELBO")


def bound_of_digits():
    """Without subsampling, with which ``RenyiELBO`` has another objective than ``DReG_ELBO``."""
    images = load_digits(None, seed=0)[0][:100]
    title = "Importance-weighted autoencoder, 100 digits"
    return autoencoder(title, images, 4.0, BOUND, batch_size=None, width=50, reference=BOUND)


#: By name, a function that makes the case.
CASES: Dict[str, Callable[[], Case]] = {
    "schools": lambda: shipped("eight_schools", AutoNormal, "AutoNormal"),
    "change_point": change_point,
    "logistic": lambda: logistic(AutoDiagonalNormal, "AutoDiagonalNormal"),
    "network": network,
    # The comparison leaves it to users to say that rows are independent.
    "network_local": lambda: network(remark="local mode named", losses=("R2G2_ELBO:local",)),
    "outliers": outliers,
    "vae": elbo_of_digits,
    "matching": matching,
    "iwae": bound_of_digits,
    "schools_full": lambda: shipped("eight_schools", AutoMultivariateNormal, "AutoMultivariateNormal"),
    "mixture": assignments,
    "logistic_full": lambda: logistic(AutoMultivariateNormal, "AutoMultivariateNormal"),
    "topics": topics,
    "baseball": lambda: shipped("baseball", AutoNormal, "AutoNormal"),
    "schools_flow": lambda: shipped("eight_schools", small_flow, "AutoIAFNormal", lr=0.005),
}
