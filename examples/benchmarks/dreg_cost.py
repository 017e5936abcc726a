# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by DReG_ELBO, as a multiple of RenyiELBO's.

The losses take turns, call by call and without an optimizer. The table gives the ratio to
``RenyiELBO``: its median over blocks of 16 calls, and the quartiles. On a CPU the time is that of
one thread of the processor, which other programs do not stretch::

    python examples/benchmarks/dreg_cost.py --json cost.json --csv cost.csv
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
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
)
from tqdm import tqdm

from pyro_rb.infer import DReG_ELBO
from support.command_line import restart, run, set_up

BASE = "RenyiELBO"


class TwoLevels(Vae):
    """A guide q(z2) q(z1 | z2): a draw depends on a draw."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        self.bridge = torch.nn.Linear(20, 40)

    def sample_code(self):
        prior = dist.Normal(torch.zeros(20), torch.ones(20)).to_event(1)
        z2 = pyro.sample("z2", prior)
        return pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))

    def guide(self):
        pyro.module("encoder", self.encoder)
        pyro.module("bridge", self.bridge)
        with pyro.plate("data", len(self.images)):
            loc, log_scale = self.encoder(self.images).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.bridge(z2).chunk(2, -1)
            pyro.sample("z1", dist.Normal(loc, (0.1 * log_scale).exp()).to_event(1))


def cases(batch_sizes=(64, 16)):
    """Yields names with a model, a guide, and the number of particles."""
    model = schools()
    for num_particles in (2, 64):
        yield "eight schools, AutoNormal", model, AutoNormal(model), num_particles
    yield "eight schools, AutoMultivariateNormal", model, AutoMultivariateNormal(model), 8
    guide = AutoHierarchicalNormalMessenger(schools_with_mean)
    yield "eight schools, AutoHierarchicalNormalMessenger", schools_with_mean, guide, 8
    for num_particles, batch_size in zip((8, 64), batch_sizes):
        vae = Vae(batch_size)
        yield f"VAE 784-400-20, batch {batch_size}", vae.model, vae.guide, num_particles
    two = TwoLevels(batch_sizes[0])
    yield f"VAE of two levels, batch {batch_sizes[0]}", two.model, two.guide, 8


def losses(num_particles, max_plate_nesting):
    """Yields names with a loss, and whether it is called by ``differentiable_loss``."""
    options = {"num_particles": num_particles, "max_plate_nesting": max_plate_nesting}
    options["vectorize_particles"] = True
    yield BASE, RenyiELBO(**options), False
    yield "c = 1", DReG_ELBO(**options), False
    yield "c = 0.5", DReG_ELBO(control_variate_scale=0.5, **options), False
    yield "adaptive", DReG_ELBO(control_variate_scale="adaptive", **options), False
    yield "c = 1, differentiable_loss", DReG_ELBO(**options), True


def measure(model, guide, num_particles, num_blocks, block_size, start_up):
    """Ratios to RenyiELBO by loss: the quartiles over blocks."""
    steps = {}
    for name, elbo, differentiable in losses(num_particles, max_plate_nesting=1):
        step = partial(gradient, elbo, model, guide, differentiable)
        seconds(step, start_up)
        steps[name] = lambda step=step: step
    return ratios(take_turns(steps, num_blocks, block_size), BASE)


def main(args):
    set_up(args)
    results = {}
    sizes, todo = (args.num_blocks, BLOCK, START_UP), cases()
    if args.smoke_test:
        sizes, todo = (1, 2, 1), cases((4, 2))
    for name, model, guide, num_particles in tqdm(list(todo), disable=args.smoke_test):
        restart(args.seed)
        RenyiELBO().loss(model, guide)  # sets the guide up
        name = f"{name}, K = {num_particles}"
        results[name] = measure(model, guide, num_particles, *sizes)
        print(name, results[name])
    write(args, results, medians(results))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=20, help="blocks of 16 calls of each loss")
    run(main, parser)
