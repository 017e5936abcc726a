# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian linear regression with an interaction, by any loss of Pyro or pyro_rb.

The question is that of Pyro's tutorial on the subject: does rugged terrain hold wealth back,
and is that different in Africa? The data are simulated, so that the answer is known. The
table puts the posterior beside the truth and beside least squares::

    python examples/bayesian_regression.py --loss STLTrace_ELBO:adaptive
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoMultivariateNormal
from tabulate import tabulate
from tqdm import trange

from pyro_rb.diagnostics.losses import make_loss

TRUTH = {"intercept": 9.2, "africa": -1.9, "ruggedness": -0.2, "both": 0.4}
NOISE = 0.9


def simulate(num_countries):
    """Features ``[num_countries, 4]``, the first of them 1, and log wealth ``[num_countries]``."""
    africa = torch.bernoulli(torch.full((num_countries,), 0.3))
    ruggedness = dist.Gamma(1.2, 1.0).sample((num_countries,))
    features = torch.stack([torch.ones(num_countries), africa, ruggedness, africa * ruggedness], -1)
    wealth = dist.Normal(features @ torch.tensor(list(TRUTH.values())), NOISE).sample()
    return features, wealth


def model(features, wealth=None):
    scale = torch.tensor([10.0, 3.0, 3.0, 3.0])
    weights = pyro.sample("weights", dist.Normal(0.0, scale).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("countries", len(features)):
        pyro.sample("wealth", dist.Normal(features @ weights, noise), obs=wealth)


def main(args):
    torch.set_default_device(args.device)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    features, wealth = simulate(args.num_countries)
    guide = AutoMultivariateNormal(model)
    num_steps = 20 if args.smoke_test else args.num_steps
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optim, loss=make_loss(args.loss))
    steps = trange(num_steps, disable=args.smoke_test)
    for step in steps:
        loss = svi.step(features, wealth)
        if step % 100 == 0:
            steps.set_postfix(loss=f"{loss:.1f}")
    draws = Predictive(model, guide=guide, num_samples=2000, return_sites=["weights"])(features)
    draws = draws["weights"].reshape(-1, len(TRUTH))
    least_squares = torch.linalg.lstsq(features, wealth.unsqueeze(-1)).solution.squeeze(-1)
    rows = zip(TRUTH, TRUTH.values(), draws.mean(0).tolist(), draws.std(0).tolist(), least_squares.tolist())
    print(tabulate(rows, ["", "truth", "posterior", "+/-", "least squares"], floatfmt=".2f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--loss", default="STLTrace_ELBO:adaptive", help="as Trace_ELBO:num_particles=4")
    parser.add_argument("--num-countries", type=int, default=170)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=0.03, help="of Adam; a tenth of it at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
