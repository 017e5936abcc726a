# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A mixture of Gaussians whose assignments are latent, by any loss of Pyro or pyro_rb.

Each item has a discrete latent variable, its component, and the guide has probabilities of its own
for each item. Trace_ELBO estimates their gradient by the score function, which is noisy;
RaoBlackwellTopK_ELBO sums the likeliest components; TraceEnum_ELBO sums all::

    python examples/models/mixture.py --loss Trace_ELBO RaoBlackwellTopK_ELBO TraceEnum_ELBO

The table gives the ELBO of an item in nats (summed exactly over components), the share of items
whose likeliest component is right, the locations found, and the seconds of training. The data are
simulated.
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from tqdm import trange

from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import make_parser, restart, run, set_up
from support.losses import add_loss_option, mark_for, train_each
from support.results import report
from support.training import Clock

LOCS, SCALE = (-4.0, -1.0, 1.5, 5.0), 0.7
WEIGHTS = (0.2, 0.3, 0.3, 0.2)
NUM_COMPONENTS = len(LOCS)


def simulate(num_items):
    """Values and components, ``[num_items]`` each."""
    components = dist.Categorical(torch.tensor(WEIGHTS)).sample((num_items,))
    return dist.Normal(torch.tensor(LOCS)[components], SCALE).sample(), components


def model(values):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((NUM_COMPONENTS,), 2.0)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([NUM_COMPONENTS]).to_event(1))
    with pyro.plate("items", len(values)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("values", dist.Normal(Vindex(locs)[..., component], scale), obs=values)


def guide(values):
    start = values.quantile(torch.linspace(0.1, 0.9, NUM_COMPONENTS))
    concentration = pyro.param(
        "concentration", lambda: torch.full((NUM_COMPONENTS,), 10.0), constraint=constraints.positive
    )
    loc = pyro.param("loc", lambda: start.clone())
    loc_scale = pyro.param(
        "loc_scale", lambda: torch.full((NUM_COMPONENTS,), 0.2), constraint=constraints.positive
    )
    log_scale = pyro.param("log_scale", lambda: torch.zeros(()))
    # Even odds at the start would draw all locations to the middle.
    logits = pyro.param("logits", lambda: -0.5 * (values.unsqueeze(-1) - start) ** 2)
    pyro.sample("weights", dist.Dirichlet(concentration))
    pyro.sample("scale", dist.LogNormal(log_scale, 0.1))
    pyro.sample("locs", dist.Normal(loc, loc_scale).to_event(1))
    with pyro.plate("items", len(values)):
        pyro.sample("component", dist.Categorical(logits=logits))


def evaluate(values, num_draws=200):
    """The ELBO of an item, in nats, by the sum over all components."""
    elbo = TraceEnum_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(model, config_enumerate(guide), values) / len(values)


def train(name, values, components, args):
    """A new guide by the loss of that name; a row of the table."""
    restart(args.seed)
    loss = make_loss(name)
    svi = SVI(model, mark_for(loss, guide), pyro.optim.Adam({"lr": args.lr}), loss=loss)
    clock = Clock()
    steps = trange(args.num_steps, desc=name, leave=False, disable=None)
    for step in steps:
        with clock:
            svi.step(values)
        if step % 100 == 0:
            steps.set_postfix(elbo=f"{evaluate(values, 1):.3f}")
    loc = pyro.param("loc").detach()
    rank = loc.argsort().argsort()  # components are numbered by location
    is_right = rank[pyro.param("logits").argmax(-1)] == components
    return {
        "loss": name,
        "ELBO": f"{evaluate(values):.3f}",
        "right": f"{100 * is_right.double().mean().item():.1f} %",
        "locations": ", ".join(f"{x:.2f}" for x in loc.sort().values.tolist()),
        "seconds": f"{clock.seconds:.1f}",
    }


def main(args):
    set_up(args, num_threads=None)
    if args.smoke_test:
        args.num_steps = 20
    values, components = simulate(args.num_items)
    rows = train_each(args.loss, train, values, components, args)
    report(args, rows, true_locations=", ".join(f"{x:.2f}" for x in LOCS))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "RaoBlackwellTopK_ELBO")
    parser.add_argument("--num-items", type=int, default=300, help="simulated values")
    parser.add_argument("--num-steps", type=int, default=1000, help="steps of training")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate of Adam")
    run(main, parser)
