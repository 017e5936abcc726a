# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by RaoBlackwellTopK_ELBO, against the enumeration of all values.

A digit of 28 x 28 pixels is somewhere on a canvas. The latent position is one of
K = rows x columns; at each position that is looked at, a variational autoencoder
encodes and decodes the window there. All losses take turns, in blocks of calls of
``loss_and_grads`` without an optimizer. The table gives the time of enumeration over that of each
loss, measured in turn (above 1, top-k is faster): the median over blocks and the quartiles. It also
gives the growth of memory at the first step::

    python examples/benchmarks/topk_cost.py --json cost.json --csv cost.csv
"""

import json
import multiprocessing
import resource
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import gradient, make_parser, quartiles, seconds, write
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from tqdm import tqdm

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from support.command_line import restart, run, set_up

WINDOW = 28
SIZES = {10: (2, 5), 100: (10, 10), 1000: (25, 40), 4624: (68, 68)}
LOSSES = {
    "enumeration": partial(TraceEnum_ELBO, max_plate_nesting=1),
    "k = 1": partial(RaoBlackwellTopK_ELBO, k=1, max_plate_nesting=1),
    "k = 5": partial(RaoBlackwellTopK_ELBO, k=5, max_plate_nesting=1),
    "budget = 4": partial(RaoBlackwellTopK_ELBO, budget=4, max_plate_nesting=1),
    "k = 1, reinforce+": partial(
        RaoBlackwellTopK_ELBO, k=1, baseline="reinforce+", max_plate_nesting=1
    ),
    "one draw": Trace_ELBO,
}


class MovingDigit:
    """
    :param int rows: positions along one side.
    :param int columns: along the other.
    :param int hidden: units of the hidden layers; they make an evaluation dear.
    """

    def __init__(self, rows, columns, hidden=256, batch_size=4):
        self.rows, self.columns, self.batch_size = rows, columns, batch_size
        height, width = rows + WINDOW - 1, columns + WINDOW - 1
        self.images = torch.rand(batch_size, height, width).round()
        mlp = partial(torch.nn.Sequential)
        pixels, relu = WINDOW * WINDOW, torch.nn.ReLU()
        self.where = mlp(
            torch.nn.Flatten(),
            torch.nn.Linear(height * width, 64),
            relu,
            torch.nn.Linear(64, rows * columns),
        )
        self.encoder = mlp(torch.nn.Linear(pixels, hidden), relu, torch.nn.Linear(hidden, 16))
        self.decoder = mlp(torch.nn.Linear(8, hidden), relu, torch.nn.Linear(hidden, pixels))

    def crop(self, position):
        """Windows ``[*position, 784]``, whose last dim of batch is that of the images."""
        offset = torch.arange(WINDOW, device=position.device)
        row = (position // self.columns)[..., None, None] + offset[:, None]
        column = (position % self.columns)[..., None, None] + offset
        image = torch.arange(self.batch_size, device=position.device)[:, None, None]
        return self.images[image, row, column].flatten(-2)

    def model(self):
        pyro.module("decoder", self.decoder)
        num = self.rows * self.columns
        with pyro.plate("data", self.batch_size):
            position = pyro.sample("position", dist.Categorical(self.images.new_ones(num)))
            code = pyro.sample("code", dist.Normal(self.images.new_zeros(8), 1.0).to_event(1))
            crop = self.crop(position)
            logits = self.decoder(code)
            # Relative to a background of pixels that are on with probability 1/2.
            pixels = dist.Bernoulli(logits=logits, validate_args=False)
            pyro.factor("pixels", pixels.log_prob(crop).sum(-1))

    def guide(self):
        pyro.module("where", self.where)
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", self.batch_size):
            q = dist.Categorical(logits=self.where(self.images))
            position = pyro.sample("position", q)
            loc, log_scale = self.encoder(self.crop(position)).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


def memory(make, model, guide):
    """Growth in MB, of a process of its own, while it makes a first step."""

    def run(connection):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gradient(make(), model, guide)
        connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    growth = receiver.recv()
    process.join()
    return round(growth, 1)


def measure(case, num_blocks, block, with_memory):
    """By loss: milliseconds of a step, its gain over enumeration with quartiles, memory."""
    guides = {name: case.guide for name in LOSSES}
    guides["enumeration"] = config_enumerate(case.guide)
    result = {name: {} for name in LOSSES}
    if with_memory:
        for name, make in LOSSES.items():
            result[name]["memory, MB"] = memory(make, case.model, guides[name])
    steps = {name: partial(gradient, make(), case.model, guides[name]) for name, make in LOSSES.items()}
    times = {name: [] for name in LOSSES}
    # Not call by call: memory goes back and forth between enumeration and the others.
    for _ in range(num_blocks):
        for name, step in steps.items():
            step()
            times[name].append(seconds(step, block) / block)
    base = np.array(times["enumeration"])
    for name, spent in times.items():
        result[name]["ms"] = round(1e3 * float(np.median(spent)), 2)
        result[name]["gain"] = quartiles(base / np.array(spent), digits=2)
    return result


def main(args):
    set_up(args)
    sizes = args.sizes or ([10, 100] if args.smoke_test else list(SIZES))
    results = {}
    for size in tqdm(sizes, disable=args.smoke_test):
        restart(args.seed)
        case = MovingDigit(*SIZES[size], hidden=args.hidden)
        Trace_ELBO().loss(case.model, case.guide)  # makes the parameters
        num_blocks = 1 if args.smoke_test else args.num_blocks
        # Blocks of about a second of enumeration.
        block = 1 if args.smoke_test else max(1, 1000 // (size + 50))
        with_memory = args.device == "cpu" and not args.smoke_test
        results[size] = measure(case, num_blocks, block, with_memory)
        print(size, json.dumps(results[size], indent=1))
    rows = [
        {
            "K": size,
            "enumeration, ms": row["enumeration"]["ms"],
            **{name: row[name]["gain"][0] for name in LOSSES if name != "enumeration"},
        }
        for size, row in results.items()
    ]
    write(args, results, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(SIZES), help="numbers K of positions")
    parser.add_argument("--hidden", type=int, default=256, help="units of the hidden layers")
    parser.add_argument("--num-blocks", type=int, default=20, help="blocks of steps of each loss")
    run(main, parser)
