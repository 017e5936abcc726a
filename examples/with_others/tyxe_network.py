# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
TyXe: a Bayesian network whose ``fit`` makes its loss itself.

If a package does not let you pass a loss, ``unittest.mock`` of the standard library can put another one under the name
that the package looks up, and put the old one back afterwards. Name the module that does the look-up, here
``tyxe.bnn``, and check that the name was used at all, as the script does::

    python examples/with_others/tyxe_network.py --loss TraceMeanField_ELBO R2G2_ELBO RaoBlackwell_ELBO
"""

from functools import partial
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import tyxe
from common import run
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_rb.diagnostics.run.losses import make_loss


def simulate(num_rows=100):
    x = torch.linspace(-2.0, 2.0, num_rows).unsqueeze(-1)
    return x, torch.sin(3.0 * x) + 0.2 * torch.randn(num_rows, 1)


def make_network(sizes, num_rows):
    pairs = zip(sizes, sizes[1:])
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
    return tyxe.VariationalBNN(
        nn.Sequential(*layers[:-1]),
        tyxe.priors.IIDPrior(dist.Normal(0.0, 1.0)),
        tyxe.likelihoods.HomoskedasticGaussian(num_rows, scale=0.2),
        partial(AutoNormal, init_scale=0.05),  # that of TyXe asks for an older Pyro
    )


def make(sizes=(1, 100, 1)):
    """Model, guide, and the arguments of both."""
    x, y = simulate()
    bnn = make_network(sizes, len(x))
    return bnn.model, bnn.guide, (x, y)


def train(name, args):
    x, y = simulate()
    bnn = make_network((1, 100, 1), len(x))
    batches = DataLoader(TensorDataset(x, y), len(x), shuffle=True)
    with mock.patch("tyxe.bnn.TraceMeanField_ELBO", side_effect=lambda *_: make_loss(name)) as patched:
        bnn.fit(batches, pyro.optim.Adam({"lr": args.lr}), args.num_steps)
    assert patched.called, "tyxe.bnn does not look up TraceMeanField_ELBO"
    return -TraceMeanField_ELBO(num_particles=100).loss(bnn.model, bnn.guide, x, y)


if __name__ == "__main__":
    run(__doc__, train, num_steps=1000, lr=0.01, losses=("TraceMeanField_ELBO", "R2G2_ELBO"))
