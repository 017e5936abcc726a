# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What the examples of RVRSGuide share: training, ELBOs with a standard error, and output.
"""

import argparse
import csv
import json
import math
import os
import tempfile
import time
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb.infer import RVRSGuide

#: Draws evaluated at a time.
CHUNK = 2000


def make_parser(doc):
    """
    :param str doc: of the script; the first paragraph becomes the description.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0].strip())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write results and figures to this folder")
    parser.add_argument("--smoke-test", action="store_true")
    return parser


def fit(model, guide, loss=None, *, num_steps, lr, desc, look=None, every=1):
    """
    Trains by Adam, with a learning rate that falls to a hundredth of ``lr``.

    :param loss: default: ``Trace_ELBO()``.
    :param look: called after every ``every`` steps, with their number; not timed.
    :return: CPU time in seconds.
    """
    options = {"lr": lr, "lrd": 0.01 ** (1 / num_steps), "clip_norm": math.inf}
    loss = Trace_ELBO() if loss is None else loss
    svi = SVI(model, guide, pyro.optim.ClippedAdam(options), loss)
    start = time.process_time()
    for step in tqdm(range(1, num_steps + 1), desc=desc, leave=False):
        svi.step()
        if look is not None and step % every == 0:
            now = time.process_time()
            look(step)
            start += time.process_time() - now
    return time.process_time() - start


def log_weights(model, guide, num_samples, max_plate_nesting=1):
    """``log p - log q`` of draws of a guide of Pyro, ``[num_samples]``."""
    chunks = []
    with torch.no_grad():
        for _ in range(math.ceil(num_samples / CHUNK)):
            x, _, _ = vectorized_importance_weights(
                model,
                guide,
                num_samples=min(CHUNK, num_samples),
                max_plate_nesting=max_plate_nesting,
            )
            chunks.append(x)
    return torch.cat(chunks).double()


def elbo(model, guide, num_samples, max_plate_nesting=1):
    """
    :param guide: an RVRSGuide, or a guide of Pyro.
    :return: the ELBO, and its standard error.
    """
    if isinstance(guide, RVRSGuide):
        return guide.elbo(num_samples)
    return mean(log_weights(model, guide, num_samples, max_plate_nesting))


def mean(x):
    """The mean of draws, and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


@torch.no_grad()
def log_joint(model, values, max_plate_nesting=1):
    """
    Log density of the model at many values of its latents, ``[num]``.

    :param dict values: each ``[num, *ones, *event]``, with a one for each plate dim.
    """
    num = len(next(iter(values.values())))
    with pyro.plate("values", num, dim=-1 - max_plate_nesting):
        trace = poutine.trace(poutine.condition(model, values)).get_trace()
    trace.compute_log_prob()
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return sum(s["log_prob"].expand((num,) + s["log_prob"].shape[1:]).reshape(num, -1).sum(-1) for s in sites)


def report(args, name, rows, figure=None, **more):
    """
    Prints the table, and writes it as csv and, with the settings, as JSON.

    :param args: of the command line.
    :param str name: of the files, without suffix.
    :param list rows: dicts of cells.
    :param figure: of matplotlib, or None.
    :param more: put into the JSON file.
    """
    print(tabulate(rows, headers="keys"))
    for key, value in more.items():
        print(f"{key}: {value}")
    with tempfile.TemporaryDirectory() as scratch:
        if args.out is None and not args.smoke_test:
            return
        out = Path(scratch if args.out is None else args.out)
        out.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        settings.update(threads=torch.get_num_threads(), cores=os.cpu_count())
        results = {"settings": settings, **more, "rows": rows}
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        with open(out / f"{name}.csv", "w") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=120)
