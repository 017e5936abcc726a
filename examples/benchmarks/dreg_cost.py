# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by DReG_ELBO, as a multiple of RenyiELBO's.

The losses take turns, call by call and without an optimiser. Given are the median over
blocks of 16 calls of the ratio to ``RenyiELBO``, and the quartiles. On a CPU the time is
that of one thread of the processor, which other programs do not stretch::

    python examples/benchmarks/dreg_cost.py --json cost.json --csv cost.csv
"""

import argparse
import csv
import json
import time
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
)
from tqdm import tqdm

from pyro_rb.diagnostics.models import (
    EIGHT_SCHOOLS_EFFECTS,
    EIGHT_SCHOOLS_ERRORS,
    eight_schools,
)
from pyro_rb.infer import DReG_ELBO

BLOCK = 16
START_UP = 50
BASE = "RenyiELBO"


class Vae:
    """784-400-20-400-784 on random images."""

    def __init__(self, batch_size):
        self.images = torch.rand(batch_size, 784).round()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(784, 400), torch.nn.Softplus(), torch.nn.Linear(400, 40)
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(20, 400), torch.nn.Softplus(), torch.nn.Linear(400, 784)
        )

    def model(self):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(self.images)):
            prior = dist.Normal(torch.zeros(20), torch.ones(20)).to_event(1)
            z = pyro.sample("z", prior)
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=self.images)

    def guide(self):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(self.images)):
            loc, log_scale = self.encoder(self.images).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class TwoLevels(Vae):
    """A guide q(z2) q(z1 | z2): a draw depends on a draw."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        self.bridge = torch.nn.Linear(20, 40)

    def model(self):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(self.images)):
            prior = dist.Normal(torch.zeros(20), torch.ones(20)).to_event(1)
            z2 = pyro.sample("z2", prior)
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=self.decoder(z1), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=self.images)

    def guide(self):
        pyro.module("encoder", self.encoder)
        pyro.module("bridge", self.bridge)
        with pyro.plate("data", len(self.images)):
            loc, log_scale = self.encoder(self.images).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.bridge(z2).chunk(2, -1)
            pyro.sample("z1", dist.Normal(loc, (0.1 * log_scale).exp()).to_event(1))


def schools_with_mean():
    """The hierarchical guide needs priors with a mean; a HalfCauchy has none."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(25.0))
    errors = torch.tensor(EIGHT_SCHOOLS_ERRORS)
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        effect = dist.Normal(mu + tau * eta, errors)
        pyro.sample("effect", effect, obs=torch.tensor(EIGHT_SCHOOLS_EFFECTS))


def cases(batch_sizes=(64, 16)):
    """Yields names with a model, a guide, and the number of particles."""
    effects = torch.tensor(EIGHT_SCHOOLS_EFFECTS)
    schools = partial(eight_schools, effects, torch.tensor(EIGHT_SCHOOLS_ERRORS))
    for num_particles in (2, 64):
        yield "eight schools, AutoNormal", schools, AutoNormal(schools), num_particles
    yield "eight schools, AutoMultivariateNormal", schools, AutoMultivariateNormal(schools), 8
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
    yield BASE, RenyiELBO(vectorize_particles=True, **options), False
    yield "c = 1", DReG_ELBO(**options), False
    yield "c = 0.5", DReG_ELBO(control_variate_scale=0.5, **options), False
    yield "adaptive", DReG_ELBO(control_variate_scale="adaptive", **options), False
    yield "c = 1, differentiable_loss", DReG_ELBO(**options), True


def seconds(elbo, differentiable, model, guide, num_steps):
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    for _ in range(num_steps):
        with pyro.poutine.trace(param_only=True) as capture:
            if differentiable:
                elbo.differentiable_loss(model, guide).backward()
            else:
                elbo.loss_and_grads(model, guide)
        for site in capture.trace.nodes.values():
            site["value"].unconstrained().grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(model, guide, num_particles, num_blocks, block_size, start_up):
    """Ratios to RenyiELBO by loss: the quartiles over blocks."""
    elbos = list(losses(num_particles, max_plate_nesting=1))
    for _, elbo, differentiable in elbos:
        seconds(elbo, differentiable, model, guide, start_up)
    times = {name: [] for name, _, _ in elbos}
    for _ in range(num_blocks):
        block = dict.fromkeys(times, 0.0)
        for turn in range(block_size):
            first = turn % len(elbos)
            for name, elbo, differentiable in elbos[first:] + elbos[:first]:
                block[name] += seconds(elbo, differentiable, model, guide, 1) / block_size
        for name, mean in block.items():
            times[name].append(mean)
    base = np.array(times[BASE])
    result = {f"{BASE}, ms": round(1e3 * float(np.median(base)), 3)}
    for name in list(times)[1:]:
        quartiles = np.quantile(np.array(times[name]) / base, [0.5, 0.25, 0.75])
        result[name] = [round(float(q), 3) for q in quartiles]
    return result


def main(args):
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    results = {}
    blocks, block_size, start_up = args.num_blocks, BLOCK, START_UP
    todo = list(cases())
    if args.smoke_test:
        blocks, block_size, start_up = 1, 2, 1
        todo = list(cases((4, 2)))
    for name, model, guide, num_particles in tqdm(todo, disable=args.smoke_test):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        RenyiELBO().loss(model, guide)  # sets the guide up
        name = f"{name}, K = {num_particles}"
        results[name] = measure(model, guide, num_particles, blocks, block_size, start_up)
        print(name, results[name])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    if args.csv:
        with open(args.csv, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = list(next(iter(results.values())))
            writer.writerow(["", *columns])
            for name, row in results.items():
                cells = [row[c][0] if isinstance(row[c], list) else row[c] for c in columns]
                writer.writerow([name, *cells])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-blocks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write medians and quartiles to this file")
    parser.add_argument("--csv", help="write medians to this file")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
