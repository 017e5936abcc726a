# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A mixture of Gaussians whose assignments are latent, by any loss of Pyro or pyro_rb.

Each item has a discrete latent variable, its component, and the guide has probabilities of
its own for each. ``Trace_ELBO`` estimates their gradient by the score function, which is
noisy; ``RaoBlackwellTopK_ELBO`` sums the likeliest components; ``TraceEnum_ELBO`` sums all.
Compare the losses at the end::

    python examples/mixture.py --loss Trace_ELBO
    python examples/mixture.py --loss RaoBlackwellTopK_ELBO
    python examples/mixture.py --loss TraceEnum_ELBO

The data are simulated.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from tabulate import tabulate
from tqdm import trange

from pyro_rb.diagnostics.losses import make_loss

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


def main(args):
    torch.set_default_device(args.device)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    values, components = simulate(args.num_items)
    loss = make_loss(args.loss)
    # This loss sums over the sites that are marked.
    marked = config_enumerate(guide) if type(loss) is TraceEnum_ELBO else guide
    num_steps = 20 if args.smoke_test else args.num_steps
    svi = SVI(model, marked, pyro.optim.Adam({"lr": args.lr}), loss=loss)
    losses = []
    steps = trange(num_steps, disable=args.smoke_test)
    for step in steps:
        losses.append(svi.step(values))
        if step % 100 == 0:
            steps.set_postfix(loss=f"{losses[-1]:.1f}")
    order = pyro.param("loc").detach().argsort()
    found = order.argsort()[pyro.param("logits").argmax(-1)]
    weights = pyro.param("concentration").detach()[order]
    rows = zip(LOCS, pyro.param("loc").detach()[order].tolist(), WEIGHTS, (weights / weights.sum()).tolist())
    print(tabulate(rows, ["location", "found", "weight", "found"], floatfmt=".2f"))
    last = torch.tensor(losses[-max(1, num_steps // 10) :])
    share = (found == components).double().mean().item()
    print(f"{args.loss}: {100 * share:.1f}% of the items have the right component")
    print(f"loss for an item: {last.mean().item() / len(values):.4f}, mean of the last {len(last)} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--loss", default="RaoBlackwellTopK_ELBO", help="as Trace_ELBO:num_particles=4")
    parser.add_argument("--num-items", type=int, default=300)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.03, help="of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
