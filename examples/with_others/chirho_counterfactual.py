# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
chirho: the effect of a treatment, by an intervention in a model that was fitted.

The model is fitted like any other model of Pyro, so only the loss changes. Then chirho's ``do`` and its
counterfactual worlds run on the fitted guide. The table also gives the effect of the treatment, which is 1.5 in the
simulated data::

    python examples/with_others/chirho_counterfactual.py --loss Trace_ELBO STLTrace_ELBO
"""

import pyro
import pyro.distributions as dist
import torch
from chirho.counterfactual.handlers import MultiWorldCounterfactual
from chirho.indexed.ops import IndexSet, gather
from chirho.interventional.handlers import do
from common import run
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_rb.diagnostics.run.losses import make_loss


def model(x, treated=None, y=None):
    """Whoever has a large ``x`` is treated more often, and has a larger ``y`` anyway."""
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 2.0))
    pull = pyro.sample("pull", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x), dim=-1):
        treated = pyro.sample("treated", dist.Bernoulli(logits=pull * x), obs=treated)
        return pyro.sample("y", dist.Normal(base + slope * x + effect * treated, noise), obs=y)


def simulate(num_rows=300):
    x = torch.randn(num_rows)
    treated = torch.bernoulli(torch.sigmoid(2.0 * x))
    return x, treated, 0.5 + x + 1.5 * treated + 0.7 * torch.randn(num_rows)


def find_effect(guide, x):
    """The mean difference of the worlds with and without treatment."""

    def worlds(x):
        actions = {"treated": (torch.zeros(()), torch.ones(()))}
        with MultiWorldCounterfactual(first_available_dim=-2), do(actions=actions):
            y = model(x)
            none, all = (gather(y, IndexSet(treated={world})) for world in (1, 2))
        return pyro.deterministic("difference", (all - none).mean())

    draws = Predictive(worlds, guide=guide, num_samples=100, return_sites=["difference"])(x)
    return draws["difference"].mean().item()


def make():
    """Model, guide, and the arguments of both."""
    return model, AutoMultivariateNormal(model), simulate()


def train(name, args):
    _, guide, data = make()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), make_loss(name))
    for _ in range(args.num_steps):
        svi.step(*data)
    print(f"{name}: the effect of the treatment is {find_effect(guide, data[0]):.2f}")
    return -Trace_ELBO(num_particles=100).loss(model, guide, *data)


if __name__ == "__main__":
    run(__doc__, train, num_steps=1000, lr=0.02)
