# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian linear regression with an interaction, by any loss of Pyro or pyro_rb.

The question is that of Pyro's tutorial on the subject: does rugged terrain hold wealth back,
and is that different in Africa? The data are simulated, so that the answer is known. For each loss
the table gives the ELBO in nats, the posterior of the coefficients and the seconds of training.
The last rows are least squares and the truth::

    python examples/models/bayesian_regression.py --loss Trace_ELBO STLTrace_ELBO
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from tqdm import trange

from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import make_parser, restart, run, set_up
from support.losses import add_loss_option, train_each
from support.results import report
from support.training import Clock

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
        mean = (features * weights).sum(-1)
        pyro.sample("wealth", dist.Normal(mean, noise), obs=wealth)


def evaluate(guide, data, num_draws=1000):
    """The ELBO, in nats."""
    elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(model, guide, *data)


def train(name, data, args):
    """A new guide by the loss of that name; a row of the table."""
    restart(args.seed)
    guide = AutoMultivariateNormal(model)
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.1 ** (1 / args.num_steps)})
    svi = SVI(model, guide, optim, loss=make_loss(name))
    clock = Clock()
    steps = trange(args.num_steps, desc=name, leave=False, disable=None)
    for step in steps:
        with clock:
            svi.step(*data)
        if step % 100 == 0:
            steps.set_postfix(elbo=f"{evaluate(guide, data, 10):.1f}")
    # The coefficients are Normal in this guide; 84.13% of a Normal are below one deviation above its mean.
    mean, upper = guide.quantiles([0.5, 0.8413])["weights"]
    posterior = [f"{m:.2f} ± {u - m:.2f}" for m, u in zip(mean.tolist(), upper.tolist())]
    elbo = evaluate(guide, data)
    return {"": name, "ELBO": f"{elbo:.2f}", **dict(zip(TRUTH, posterior)), "seconds": f"{clock.seconds:.1f}"}


def main(args):
    set_up(args, num_threads=None)
    if args.smoke_test:
        args.num_steps = 20
    features, wealth = data = simulate(args.num_countries)
    least_squares = torch.linalg.lstsq(features, wealth.unsqueeze(-1)).solution.squeeze(-1)
    rows = train_each(args.loss, train, data, args)
    for name, values in (("least squares", least_squares.tolist()), ("truth", TRUTH.values())):
        cells = [f"{value:.2f}" for value in values]
        rows.append({"": name, "ELBO": "", **dict(zip(TRUTH, cells)), "seconds": ""})
    report(args, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "STLTrace_ELBO")
    parser.add_argument("--num-countries", type=int, default=170, help="rows of simulated data")
    parser.add_argument("--num-steps", type=int, default=3000, help="steps of training")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate of Adam; a tenth of it at the end")
    run(main, parser)
