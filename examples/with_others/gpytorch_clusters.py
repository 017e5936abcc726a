# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
gpytorch: series that belong to clusters, and a Gaussian process for each cluster.

The cluster labels of all series are one site, ``OneHotCategorical(...).to_event(1)``, as in gpytorch's tutorial on
clustered processes. Pyro's losses draw them; RaoBlackwell_ELBO sums their joint values::

    python examples/with_others/gpytorch_clusters.py --loss Trace_ELBO RaoBlackwell_ELBO
"""

from functools import partial

import gpytorch
import pyro
import pyro.distributions as dist
import torch
from common import run
from gpytorch_process import train


class Clusters(gpytorch.likelihoods.Likelihood):
    max_plate_nesting = 1

    def __init__(self, num_series, num_clusters):
        super().__init__()
        self.logits = torch.nn.Parameter(0.1 * torch.randn(num_series, num_clusters))
        self.raw_noise = torch.nn.Parameter(torch.tensor(0.0))

    def _sample(self, logits):
        return pyro.sample("clusters", dist.OneHotCategorical(logits=logits).to_event(1))

    def pyro_guide(self, functions, target):
        self._sample(self.logits)
        return super().pyro_guide(functions, target)

    def pyro_model(self, functions, target):
        clusters = self._sample(torch.zeros_like(self.logits))
        return super().pyro_model(functions, target, clusters=clusters)

    def forward(self, functions, clusters):
        loc = (functions.unsqueeze(-2) * clusters).sum(-1)
        return dist.Normal(loc, torch.nn.functional.softplus(self.raw_noise).sqrt()).to_event(1)


class Processes(gpytorch.models.PyroGP):
    def __init__(self, inducing_points, num_series, num_data, num_clusters=2):
        shape = torch.Size([num_clusters])
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(inducing_points), shape)
        one = gpytorch.variational.VariationalStrategy(self, inducing_points.unsqueeze(-1), distribution)
        strategy = gpytorch.variational.IndependentMultitaskVariationalStrategy(one, num_clusters)
        super().__init__(strategy, Clusters(num_series, num_clusters), num_data, name_prefix="processes")
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make():
    """Model, guide, and the arguments of both."""
    x = torch.linspace(0.0, 1.0, 100)
    phases = torch.tensor([0.0, 1.5, 0.0, 1.5])
    y = torch.sin(6.0 * x.unsqueeze(-1) + phases) + 0.2 * torch.randn(100, 4)
    processes = Processes(torch.linspace(0.0, 1.0, 16), y.shape[-1], len(x))
    return processes.model, processes.guide, (x, y)


if __name__ == "__main__":
    run(__doc__, partial(train, make=make), num_steps=300, lr=0.05, losses=("Trace_ELBO", "RaoBlackwell_ELBO"))
