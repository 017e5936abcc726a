# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models with discrete and continuous sites, of ``papers/rao_blackwell`` and its benchmark."""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.ops.indexing import Vindex
from torch import nn

from models.ss_vae import SemiSupervisedVae
from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO
from pyro_rb.diagnostics.cli.examples import EXAMPLES
from support.data import load_mnist
from support.several_draws import LeaveOneOut

F = nn.functional


@dataclass
class Problem:
    """
    :param str title: in a few words.
    :param callable make: returns model and guide, new.
    :param callable batch: of the arguments of both, by the number of the step.
    :param tuple steps: of training, before variances are measured.
    :param float lr: of Adam, before that.
    :param int nesting: of plates.
    :param dict losses: by name, what makes them; beside the usual ones of :func:`losses`.
    :param tuple without: names of usual losses that do not apply.
    :param str part: in the names of the parameters whose gradient's variance counts.
    """

    title: str
    make: Callable[[], Tuple[Callable, Callable]]
    batch: Callable[[int], Tuple] = lambda step: ()
    steps: Tuple[int, int] = (100, 1000)
    lr: float = 0.01
    nesting: int = 1
    losses: Dict[str, Callable] = field(default_factory=dict)
    without: Tuple[str, ...] = ()
    part: str = ""

    def single(self) -> Dict[str, Callable[[], Any]]:
        """Losses with one treatment for all sites."""
        enumerates = {"max_plate_nesting": self.nesting, "strict_enumeration_warning": False}
        usual = {
            "Trace_ELBO": Trace_ELBO,
            "TraceEnum_ELBO": partial(TraceEnum_ELBO, **enumerates),
            "STLTrace_ELBO": partial(STLTrace_ELBO, control_variate_scale="adaptive"),
            "R2G2_ELBO": R2G2_ELBO,
            "RaoBlackwellTopK_ELBO": partial(RaoBlackwellTopK_ELBO, budget=3, **enumerates),
        }
        return {name: make for name, make in {**usual, **self.losses}.items() if name not in self.without}

    def ours(self) -> Dict[str, Callable[[], Any]]:
        default = partial(RaoBlackwell_ELBO, max_plate_nesting=self.nesting)
        found = {"RaoBlackwell_ELBO": default}
        if "TraceEnum_ELBO" not in self.without:
            found["RaoBlackwell_ELBO, budget 3"] = partial(default, budget=3)
            found["RaoBlackwell_ELBO, all values"] = partial(default, k=1000)  # no site has as many
        if "4 particles" in self.losses:
            particles = {"num_particles": 4, "vectorize_particles": True}
            found["RaoBlackwell_ELBO, independent draws"] = default
            found["RaoBlackwell_ELBO, 4 draws"] = partial(default, draws=4)
            found["RaoBlackwell_ELBO, 4 particles"] = partial(default, draws=1, **particles)
        return found

    def objective(self, model: Callable, guide: Callable, draws: int = 30) -> float:
        """The loss, with the same random numbers at each call; discrete sites are summed out."""
        elbo: Any = Trace_ELBO()
        if "TraceEnum_ELBO" not in self.without:
            elbo, guide = self.single()["TraceEnum_ELBO"](), config_enumerate(guide)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return sum(elbo.loss(model, guide, *self.batch(0)) for _ in range(draws)) / draws


def positive(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value), constraint=constraints.positive)


def mark(name, guide):
    """The guide, with what the sites have to say to a loss."""
    if "independent draws" in name:
        return poutine.infer_config(guide, lambda site: {"antithetic": False})
    return config_enumerate(guide) if name == "TraceEnum_ELBO" else guide


# -- Digits -----------------------------------------------------------------------------------

NUM_IMAGES, BATCH_SIZE = 2000, 100


@lru_cache(maxsize=None)
def digits():
    (images, labels), _ = load_mnist(None, NUM_IMAGES, 1, seed=0)
    return images, labels


def digit_batch(step):
    index = (step * BATCH_SIZE + torch.arange(BATCH_SIZE)) % NUM_IMAGES
    return tuple(values[index] for values in digits())


def mixed_batch(step):
    """One in ten has labels; the first has none."""
    images, labels = digit_batch(step)
    return (images, labels) if step % 10 == 1 else (images,)


def semi_supervised():
    vae = SemiSupervisedVae(digits()[0].shape[1], style_size=8, width=128, aux_weight=50.0)
    return vae.model, vae.guide


def small_batch(step):
    images, _ = digit_batch(step)
    return (shrink(images),)


def shrink(images):
    """Binary images of 28 x 28 pixels, as some of 14 x 14."""
    return (F.avg_pool2d(images.reshape(-1, 1, 28, 28), 2) > 0.4).flatten(1).float()


def binary_autoencoder(num_bits=200):
    """Their codes of bits, as one site."""
    encoder = nn.Linear(196, num_bits)
    decoder = nn.Sequential(nn.Linear(num_bits, 200), nn.Tanh(), nn.Linear(200, 196))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((num_bits,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide


# -- A mixture, a regression and a hidden Markov model, of simulated data ----------------------


def mixture(num=300, size=30):
    """Learned means, and an offset of each point."""
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    means = 5.0 * torch.randn(size, 2, generator=generator)
    x = means[torch.arange(num) % size] + 0.8 * torch.randn(num, 2, generator=generator)
    start = means + torch.randn(size, 2, generator=generator)

    def model():
        means = pyro.sample("means", dist.Normal(torch.zeros(size, 2), 5.0).to_event(2))
        with pyro.plate("points", num):
            y = pyro.sample("y", dist.Categorical(torch.ones(size)))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(Vindex(means)[y] + z, 0.4).to_event(1), obs=x)

    def guide():
        loc = pyro.param("loc", lambda: start.clone())
        pyro.sample("means", dist.Normal(loc, positive("scale", torch.full((size, 2), 0.3))).to_event(2))
        square = (x.unsqueeze(1) - start).square().sum(-1)
        logits = pyro.param("logits", lambda: -0.1 * square)
        z_loc = pyro.param("z_loc", lambda: torch.zeros(num, 2))
        with pyro.plate("points", num):
            pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal(z_loc, positive("z_scale", torch.full((num, 2), 0.3))).to_event(1))

    return model, guide


def regression(num=40, size=100, values=5):
    """Weights, a switch between offsets for each row, and the scale of the noise."""
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    x = torch.randn(num, size, generator=generator) / size**0.5
    offsets = torch.linspace(-4.0, 4.0, values)
    y = x @ torch.randn(size, generator=generator) + offsets[torch.arange(num) % values]
    y = y + 0.5 * torch.randn(num, generator=generator)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", num):
            s = pyro.sample("s", dist.Categorical(torch.ones(values)))
            pyro.sample("y", dist.Normal(x @ w + offsets[s], noise), obs=y)

    def guide():
        loc = pyro.param("loc", lambda: torch.zeros(size))
        pyro.sample("w", dist.Normal(loc, positive("scale", torch.full((size,), 0.3))).to_event(1))
        pyro.sample("noise", dist.LogNormal(pyro.param("log_noise", torch.tensor(0.0)), positive("noise_scale", 0.2)))
        logits = pyro.param("logits", lambda: torch.zeros(num, values))
        with pyro.plate("rows", num):
            pyro.sample("s", dist.Categorical(logits=logits))

    return model, guide


def hidden_markov(num=20, steps=5, size=5):
    """Discrete states, and emissions whose means are latent."""
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    means = torch.linspace(-4.0, 4.0, size)
    states = torch.randint(size, (num, steps), generator=generator).sort(1).values
    x = means[states] + torch.randn(num, steps, generator=generator)
    moves = (torch.eye(size) + 0.3).log()

    def model():
        means = pyro.sample("means", dist.Normal(torch.zeros(size), 5.0).to_event(1))
        with pyro.plate("sequences", num):
            s = torch.tensor(0)
            for t in pyro.markov(range(steps)):
                s = pyro.sample(f"s_{t}", dist.Categorical(logits=moves[s]))
                pyro.sample(f"x_{t}", dist.Normal(means[s], 1.0), obs=x[:, t])

    def guide():
        loc = pyro.param("loc", lambda: torch.linspace(-2.0, 2.0, size))
        pyro.sample("means", dist.Normal(loc, positive("scale", torch.full((size,), 0.3))).to_event(1))
        table = pyro.param("table", lambda: torch.zeros(num, steps, size, size))
        item = torch.arange(num)
        with pyro.plate("sequences", num):
            s = torch.tensor(0)
            for t in pyro.markov(range(steps)):
                s = pyro.sample(f"s_{t}", dist.Categorical(logits=Vindex(table)[item, t, s]))

    return model, guide


# -- Continuous sites only ----------------------------------------------------------------------


def network(has_norm=False, num=100, width=100):
    """A Bayesian network 1-100-1, with and without BatchNorm behind the first layer."""
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    x = torch.linspace(-2.0, 2.0, num).unsqueeze(-1)
    y = (3.0 * x.squeeze(-1)).sin() + 0.2 * torch.randn(num, generator=generator)
    shapes = {"w1": (width, 1), "b1": (width,), "w2": (1, width), "b2": (1,)}

    def model():
        w1, b1, w2, b2 = (
            pyro.sample(name, dist.Normal(torch.zeros(shape), shape[-1] ** -0.5 if name == "w2" else 1.0).to_event())
            for name, shape in shapes.items()
        )
        h = F.linear(x, w1, b1)
        h = F.batch_norm(h, None, None, training=True) if has_norm else h
        f = F.linear(h.relu(), w2, b2).squeeze(-1)
        with pyro.plate("rows", num):
            pyro.sample("y", dist.Normal(f, 0.2), obs=y)

    return model, AutoNormal(model, init_scale=0.1, init_loc_fn=init_to_sample)


def schools():
    example = EXAMPLES["eight_schools"]
    model = partial(example.model, *example.make_args())
    return model, AutoNormal(model)


NO_SUM = ("TraceEnum_ELBO", "RaoBlackwellTopK_ELBO")
LOCAL = {"R2G2_ELBO, local": partial(R2G2_ELBO, pre_activations="local")}
PARTICLES = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
PROBLEMS = {
    "semi-supervised": Problem("semi-supervised autoencoder", semi_supervised, mixed_batch, (100, 1200), 1e-3),
    "mixture": Problem("mixture of 30 clusters", mixture, steps=(20, 600), lr=0.02),
    "regression": Problem("regression with switches", regression, steps=(50, 1000)),
    "binary": Problem(
        "binary autoencoder",
        binary_autoencoder,
        small_batch,
        (50, 600),
        1e-3,
        losses={
            "4 particles": partial(Trace_ELBO, **PARTICLES),
            "leave-one-out by hand, 4 particles": partial(LeaveOneOut, 4),
        },
        without=(*NO_SUM, "STLTrace_ELBO", "R2G2_ELBO"),
        part="encoder",
    ),
    "network": Problem("Bayesian network", network, losses=LOCAL, without=NO_SUM),
    "network with BatchNorm": Problem("Bayesian network with BatchNorm", partial(network, True), without=NO_SUM),
    "schools": Problem("eight schools", schools, without=NO_SUM),
    "hidden Markov": Problem("hidden Markov model", hidden_markov, steps=(50, 600)),
}
