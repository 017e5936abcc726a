# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the benchmarks share: networks, steps that are timed in turn, and files of results."""

import json
from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_rb.diagnostics.cli.examples import (
    EIGHT_SCHOOLS_EFFECTS,
    EIGHT_SCHOOLS_ERRORS,
    eight_schools,
)
from support import command_line
from support.results import write_table
from support.training import now

BLOCK = 16
START_UP = 50


def make_parser(doc, csv=True, **options):
    """The options of the examples, and files for the results."""
    parser = command_line.make_parser(doc, out=False, **options)
    parser.add_argument("--json", help="write all results to this file")
    if csv:
        parser.add_argument("--csv", help="write a table to this file")
    return parser


def write(args, results, rows=None):
    """
    :param results: for ``--json``.
    :param list rows: dicts of cells, for ``--csv``.
    """
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    if rows is not None and args.csv:
        write_table(args.csv, rows)


def medians(results):
    """Rows of a table of :func:`ratios`, without the quartiles."""
    return [
        {"": name, **{key: cell[0] if isinstance(cell, list) else cell for key, cell in row.items()}}
        for name, row in results.items()
    ]


def quartiles(values, digits=3):
    """The median, and the quartiles."""
    return [round(float(q), digits) for q in np.quantile(values, [0.5, 0.25, 0.75])]


def ratios(times, base, digits=3):
    """
    Milliseconds of the base, and the quartiles of the ratios of others to it.

    :param dict times: seconds by name, ``[num_blocks]``.
    """
    result = {f"{base}, ms": round(1e3 * float(np.median(times[base])), 3)}
    for name, values in times.items():
        if name != base:
            result[name] = quartiles(np.array(values) / np.array(times[base]), digits)
    return result


def take_turns(steps, num_blocks, block_size):
    """
    Mean seconds of a call in each block, ``[num_blocks]``, by name. Within a block calls take turns,
    each time with another one first, so that what else the machine does falls on all alike.

    :param dict steps: by name, a function that is called before each block and returns what is timed.
    """
    times = {name: [] for name in steps}
    for _ in range(num_blocks):
        calls = [(name, make()) for name, make in steps.items()]
        block = dict.fromkeys(steps, 0.0)
        for turn in range(block_size):
            first = turn % len(calls)
            for name, call in calls[first:] + calls[:first]:
                block[name] += seconds(call) / block_size
        for name, mean in block.items():
            times[name].append(mean)
    return times


def seconds(call, num_calls=1):
    """Of all calls, by :func:`support.training.now`."""
    start = now()
    for _ in range(num_calls):
        call()
    return now() - start


def gradient(elbo, model, guide, differentiable=False):
    """A gradient without an optimizer, by one or the other entrance of a loss."""
    with pyro.poutine.trace(param_only=True) as capture:
        if differentiable:
            elbo.differentiable_loss(model, guide).backward()
        else:
            elbo.loss_and_grads(model, guide)
    for site in capture.trace.nodes.values():
        site["value"].unconstrained().grad = None


def schools():
    """The eight schools, without arguments."""
    return partial(eight_schools, torch.tensor(EIGHT_SCHOOLS_EFFECTS), torch.tensor(EIGHT_SCHOOLS_ERRORS))


def schools_with_mean():
    """The hierarchical guide needs priors with a mean; a HalfCauchy has none."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(25.0))
    errors = torch.tensor(EIGHT_SCHOOLS_ERRORS)
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        effect = dist.Normal(mu + tau * eta, errors)
        pyro.sample("effect", effect, obs=torch.tensor(EIGHT_SCHOOLS_EFFECTS))


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
            pixels = dist.Bernoulli(logits=self.decoder(self.sample_code()), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=self.images)

    def sample_code(self):
        return pyro.sample("z", dist.Normal(torch.zeros(20), torch.ones(20)).to_event(1))

    def guide(self):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(self.images)):
            loc, log_scale = self.encoder(self.images).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
