# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by STLTrace_ELBO, as a multiple of Trace_ELBO's.

All losses take turns, in blocks of 16 calls of ``loss_and_grads`` without an
optimiser, so that each block of the adaptive loss holds one of its updates. Given
are the median over blocks of the ratio to the block of ``Trace_ELBO`` beside it, and
the quartiles::

    python examples/benchmarks/stl_cost.py --json cost.json --csv cost.csv
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
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from tqdm import tqdm

from pyro_rb import STLTrace_ELBO
from pyro_rb.diagnostics.models import (
    EIGHT_SCHOOLS_EFFECTS,
    EIGHT_SCHOOLS_ERRORS,
    eight_schools,
)

BLOCK = 16
START_UP = 50
LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "c = 1": partial(STLTrace_ELBO, 1.0),
    "c = 0.5": partial(STLTrace_ELBO, 0.5),
    "adaptive": partial(STLTrace_ELBO, "adaptive"),
}


class Vae:
    """784-400-20-400-784 with a batch of 256 random images."""

    def __init__(self, batch_size=256):
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


class FourSites(Vae):
    """Four groups of five latents from one small encoder."""

    def __init__(self):
        super().__init__(batch_size=32)

    def model(self):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(self.images)):
            prior = dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
            z = torch.cat([pyro.sample(f"z{i}", prior) for i in range(4)], -1)
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=self.images)

    def guide(self):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(self.images)):
            parts = self.encoder(self.images).chunk(8, -1)
            for i, (loc, log_scale) in enumerate(zip(parts[:4], parts[4:])):
                pyro.sample(f"z{i}", dist.Normal(loc, log_scale.exp()).to_event(1))


def schools_with_mean():
    """The hierarchical guide needs priors with a mean; a HalfCauchy has none."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(25.0))
    errors = torch.tensor(EIGHT_SCHOOLS_ERRORS)
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        effect = dist.Normal(mu + tau * eta, errors)
        pyro.sample("effect", effect, obs=torch.tensor(EIGHT_SCHOOLS_EFFECTS))


def linear_gaussian(dim):
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(dim))


def cases():
    """Yields names with pairs of a model and a guide."""
    effects = torch.tensor(EIGHT_SCHOOLS_EFFECTS)
    schools = partial(eight_schools, effects, torch.tensor(EIGHT_SCHOOLS_ERRORS))
    yield "eight schools, AutoNormal", schools, AutoNormal(schools)
    yield "eight schools, AutoMultivariateNormal", schools, AutoMultivariateNormal(schools)
    guide = AutoHierarchicalNormalMessenger(schools_with_mean)
    yield "eight schools, AutoHierarchicalNormalMessenger", schools_with_mean, guide
    vae = Vae()
    yield "VAE 784-400-20, batch 256", vae.model, vae.guide
    four = FourSites()
    yield "four sites from one encoder, batch 32", four.model, four.guide
    for dim in (5, 20, 50):
        model = partial(linear_gaussian, dim)
        yield f"AutoIAFNormal, {dim} dimensions", model, AutoIAFNormal(model, hidden_dim=[64])


def seconds(elbo, model, guide, num_steps):
    start = time.perf_counter()
    for _ in range(num_steps):
        with pyro.poutine.trace(param_only=True) as capture:
            elbo.loss_and_grads(model, guide)
        for site in capture.trace.nodes.values():
            site["value"].unconstrained().grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model, guide, num_blocks, block_size, start_up):
    """Ratios to Trace_ELBO by loss: the quartiles over blocks."""
    elbos = {name: make() for name, make in LOSSES.items()}
    for elbo in elbos.values():
        seconds(elbo, model, guide, start_up)
    elbos["adaptive, start-up"] = None
    times = {name: [] for name in elbos}
    for _ in range(num_blocks):
        for name, elbo in elbos.items():
            # The start-up is measured on a new object each time.
            elbo = elbo or STLTrace_ELBO("adaptive")
            times[name].append(seconds(elbo, model, guide, block_size) / block_size)
    base = np.array(times["Trace_ELBO"])
    result = {"Trace_ELBO, ms": round(1e3 * float(np.median(base)), 3)}
    for name in list(times)[1:]:
        quartiles = np.quantile(np.array(times[name]) / base, [0.5, 0.25, 0.75])
        result[name] = [round(float(q), 3) for q in quartiles]
    return result


def main(args):
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    results = {}
    for name, model, guide in tqdm(list(cases()), disable=args.smoke_test):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        Trace_ELBO().loss(model, guide)  # sets the guide up
        sizes = (1, 2, 1) if args.smoke_test else (args.num_blocks, BLOCK, START_UP)
        results[name] = measure(model, guide, *sizes)
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
    parser.add_argument("--num-blocks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write medians and quartiles to this file")
    parser.add_argument("--csv", help="write medians to this file")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
