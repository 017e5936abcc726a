# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by a loss in a GradientGuard, as a multiple of that of the loss alone.

Both take turns, in blocks of 16 calls of ``loss_and_grads`` without an optimiser. Given are
the median over blocks of the ratio of neighbouring blocks, and the quartiles. A bad step is
one whose gradient is NaN; its time holds the search for the first bad number::

    python examples/benchmarks/guard_cost.py --json cost.json --csv cost.csv
"""

import argparse
import csv
import json
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from stl_cost import BLOCK, Vae, seconds
from tqdm import tqdm

from pyro_rb import GradientGuard, STLTrace_ELBO
from pyro_rb.diagnostics.models import (
    EIGHT_SCHOOLS_EFFECTS,
    EIGHT_SCHOOLS_ERRORS,
    eight_schools,
)


def bad_schools(effects, errors):
    """The eight schools, with a term of value 0 whose derivative is not finite."""
    eight_schools(effects, errors)
    extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
    pyro.factor("root", (0 * extra).sqrt())


def cases():
    """Yields names with losses, models and guides, and whether steps are bad."""
    data = torch.tensor(EIGHT_SCHOOLS_EFFECTS), torch.tensor(EIGHT_SCHOOLS_ERRORS)
    schools, bad = partial(eight_schools, *data), partial(bad_schools, *data)
    guide = AutoNormal(schools)
    yield "eight schools, AutoNormal, Trace_ELBO", Trace_ELBO, schools, guide, False
    yield "eight schools, AutoNormal, STLTrace_ELBO", STLTrace_ELBO, schools, guide, False
    vae = Vae()
    yield "VAE 784-400-20, batch 256, Trace_ELBO", Trace_ELBO, vae.model, vae.guide, False
    yield "eight schools, bad steps, Trace_ELBO", Trace_ELBO, bad, AutoNormal(bad), True


def measure(make_loss, model, guide, num_blocks, is_bad):
    losses = make_loss(), GradientGuard(make_loss(), on_bad="skip", max_skipped=10**9)
    times = [[], []]
    for block in range(num_blocks + 1):  # the first one warms up
        for loss, column in zip(losses, times):
            column.append(seconds(loss, model, guide, 1 if is_bad else BLOCK))
    assert losses[1].num_skipped == (losses[1].num_steps if is_bad else 0)
    base, guarded = np.array(times)[:, 1:]
    quartiles = np.quantile(guarded / base, [0.5, 0.25, 0.75])
    return [round(float(q), 3) for q in quartiles]


def main(args):
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    results = {}
    for name, make_loss, model, guide, is_bad in tqdm(list(cases()), disable=args.smoke_test):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        Trace_ELBO().loss(model, guide)  # sets the guide up
        num_blocks = 1 if args.smoke_test else args.num_blocks
        results[name] = measure(make_loss, model, guide, num_blocks, is_bad)
        print(name, results[name])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    if args.csv:
        with open(args.csv, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["", "median", "lower quartile", "upper quartile"])
            writer.writerows([name, *row] for name, row in results.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--num-blocks", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write medians and quartiles to this file")
    parser.add_argument("--csv", help="write the table to this file")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
