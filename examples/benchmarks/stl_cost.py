# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by STLTrace_ELBO, as a multiple of Trace_ELBO's.

The losses take turns, call by call and without an optimizer. The table gives the ratio to
``Trace_ELBO``: its median over blocks of 16 calls, and the quartiles. Each block of the adaptive
loss holds one of its updates::

    python examples/benchmarks/stl_cost.py --json cost.json --csv cost.csv
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from common import (
    BLOCK,
    START_UP,
    Vae,
    gradient,
    make_parser,
    medians,
    ratios,
    schools,
    schools_with_mean,
    seconds,
    take_turns,
    write,
)
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
)
from tqdm import tqdm

from pyro_rb import STLTrace_ELBO
from support.command_line import restart, run, set_up

LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "c = 1": partial(STLTrace_ELBO, control_variate_scale=1.0),
    "c = 0.5": partial(STLTrace_ELBO, control_variate_scale=0.5),
    "adaptive": STLTrace_ELBO,
}


class FourSites(Vae):
    """Four groups of five latents from one small encoder."""

    def sample_code(self):
        prior = dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
        return torch.cat([pyro.sample(f"z{i}", prior) for i in range(4)], -1)

    def guide(self):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(self.images)):
            parts = self.encoder(self.images).chunk(8, -1)
            for i, (loc, log_scale) in enumerate(zip(parts[:4], parts[4:])):
                pyro.sample(f"z{i}", dist.Normal(loc, log_scale.exp()).to_event(1))


def cases():
    """Yields names with pairs of a model and a guide."""
    model = schools()
    yield "eight schools, AutoNormal", model, AutoNormal(model)
    yield "eight schools, AutoMultivariateNormal", model, AutoMultivariateNormal(model)
    guide = AutoHierarchicalNormalMessenger(schools_with_mean)
    yield "eight schools, AutoHierarchicalNormalMessenger", schools_with_mean, guide
    vae = Vae(batch_size=256)
    yield "VAE 784-400-20, batch 256", vae.model, vae.guide
    four = FourSites(batch_size=32)
    yield "four sites from one encoder, batch 32", four.model, four.guide


def measure(model, guide, num_blocks, block_size, start_up):
    """Ratios to Trace_ELBO by loss: the quartiles over blocks."""

    def step_of(elbo):
        return partial(gradient, elbo, model, guide)

    steps = {}
    for name, make in LOSSES.items():
        step = step_of(make())
        seconds(step, start_up)
        steps[name] = lambda step=step: step
    # The start-up is measured on a new object each time.
    steps["adaptive, start-up"] = lambda: step_of(STLTrace_ELBO())
    return ratios(take_turns(steps, num_blocks, block_size), "Trace_ELBO")


def main(args):
    set_up(args)
    results = {}
    for name, model, guide in tqdm(list(cases()), disable=args.smoke_test):
        restart(args.seed)
        Trace_ELBO().loss(model, guide)  # sets the guide up
        sizes = (1, 2, 1) if args.smoke_test else (args.num_blocks, BLOCK, START_UP)
        results[name] = measure(model, guide, *sizes)
        print(name, results[name])
    write(args, results, medians(results))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=40, help="blocks of 16 calls of each loss")
    run(main, parser)
