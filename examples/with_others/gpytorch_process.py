# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
gpytorch: counts whose log rate is a Gaussian process.

``gpytorch.models.PyroGP`` brings model and guide; only the loss changes. gpytorch's own tutorial passes
``retain_graph=True`` to Pyro's loss; those of pyro_rb take it as well::

    python examples/with_others/gpytorch_process.py --loss Trace_ELBO STLTrace_ELBO RaoBlackwell_ELBO
"""

import gpytorch
import pyro
import pyro.distributions as dist
import torch
from common import run
from pyro.infer import SVI, Trace_ELBO

from pyro_rb.diagnostics.run.losses import make_loss, with_options


class Poisson(gpytorch.likelihoods.Likelihood):
    def forward(self, log_rate, **kwargs):
        return dist.Poisson(log_rate.exp())


class Process(gpytorch.models.PyroGP):
    def __init__(self, inducing_points, num_data):
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(inducing_points))
        strategy = gpytorch.variational.VariationalStrategy(self, inducing_points, distribution)
        super().__init__(strategy, Poisson(), num_data, name_prefix="process")
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make():
    """Model, guide, and the arguments of both."""
    x = torch.linspace(0.0, 4.0, 200)
    y = dist.Poisson((torch.sin(3.0 * x) + 1.0).exp()).sample()
    process = Process(torch.linspace(0.0, 4.0, 16), len(x))
    return process.model, process.guide, (x, y)


def train(name, args, make=make):
    model, guide, data = make()
    loss = make_loss(with_options(name, "Trace_ELBO:retain_graph=True"))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), loss)
    for _ in range(args.num_steps):
        svi.step(*data)
    return -Trace_ELBO(num_particles=100).loss(model, guide, *data)


if __name__ == "__main__":
    run(__doc__, train, num_steps=500, lr=0.02)
