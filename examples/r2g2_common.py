# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the examples on R2G2_ELBO share: the network, the plain gradient, measurements, files."""

import argparse
import csv
import json
import sys
import time
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.util import set_rng_seed
from torch import nn

from pyro_rb.diagnostics import sample_gradients, stats


class BayesianMLP(PyroModule):
    """
    A regression network with Normal weights and biases, and noise that is learned.

    :param list sizes: of the layers, from the number of features to 1.
    :param int num_rows: of the whole training data.
    """

    def __init__(self, sizes, num_rows):
        super().__init__()
        layers = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            layer = PyroModule[nn.Linear](size_in, size_out)
            scale = (size_in + 1) ** -0.5
            layer.weight = PyroSample(dist.Normal(0.0, scale).expand([size_out, size_in]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, scale).expand([size_out]).to_event(1))
            layers.append(layer)
        self.layers = PyroModule[nn.ModuleList](layers)
        self.noise = PyroParam(torch.tensor(0.5), constraints.positive)
        self.num_rows = num_rows

    def forward(self, x, y=None):
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h if i == 0 else torch.relu(h))
        mean = pyro.deterministic("mean", h.squeeze(-1))
        with poutine.scale(scale=self.num_rows / len(x)), pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def plain_name(site):
    return site.replace(".", "_")


class MeanField(PyroModule):
    """
    The guide AutoNormal as one would write it by hand, for real sites outside of plates.

    The sites of AutoNormal are Delta distributions of auxiliary ones, for which Pyro has
    no KL divergence. These are Normal, so ``TraceMeanField_ELBO`` has an analytic one.

    :param AutoNormal auto: a guide that was called before; its parameters are copied.
    """

    def __init__(self, auto):
        super().__init__()
        self.event_dims = {}
        for name, site in auto.prototype_trace.iter_stochastic_nodes():
            self.event_dims[name] = site["fn"].event_dim
            loc, scale = (attrgetter(name)(m).detach().clone() for m in (auto.locs, auto.scales))
            setattr(self, f"loc_{plain_name(name)}", PyroParam(loc))
            setattr(self, f"scale_{plain_name(name)}", PyroParam(scale, auto.scale_constraint))

    def parts(self, name):
        return tuple(getattr(self, f"{part}_{plain_name(name)}") for part in ("loc", "scale"))

    def forward(self, *args, **kwargs):
        for name, event_dim in self.event_dims.items():
            pyro.sample(name, dist.Normal(*self.parts(name)).to_event(event_dim))


def make_guide(model, args, init_scale, init_loc_fn=init_to_sample):
    """An AutoNormal that is ready; its locations are draws of the prior by default."""
    guide = AutoNormal(model, init_loc_fn=init_loc_fn, init_scale=init_scale)
    guide(*args)
    return guide


def draw_gradients(loss, model, guide, args, num_samples, parts=("loc", "scale"), named=None):
    """
    Draws of the gradient, ``[num_samples, number of values]``, by part: the parameters
    that have it in their names; by default among those of the guide.
    """
    named = named or dict(guide.named_parameters())
    # The first steps of R2G2_ELBO find out what may not be projected.
    draws = sample_gradients(
        loss, model, guide, args, num_samples=num_samples, num_burn_in=2, seed=0, parameters=named
    )
    flat = {name: g.reshape(num_samples, -1) for name, g in draws.items()}
    return {part: torch.cat([g for name, g in flat.items() if part in name], -1) for part in parts}


def variance_ratio(above, below):
    """Of two sets of draws, and its standard error: how many draws below one above needs."""
    squares = [(g.double() - g.double().mean(0)).square().sum(-1) for g in (above, below)]
    return stats.ratio_of_means(*squares)


def seconds_of_steps(steps, num_rounds):
    """
    Median processor time of each of some functions, called in turn.

    :param dict steps: functions by name.
    """
    times = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def mean_and_error(values):
    """The mean of a few numbers, and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def cell(value, error, digits=2):
    """For a table, with as many digits as the error allows."""
    if np.isnan(error):
        return f"{value:.3g}"
    places = max(0, digits - 1 - int(np.floor(np.log10(max(error, 1e-12)))))
    return f"{value:.{min(places, 4)}f} ± {error:.{min(places, 4)}f}"


def make_parser(doc):
    """A parser with the options that all of these examples have."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0].strip())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="write JSON, CSV and a figure to this folder")
    parser.add_argument("--smoke-test", action="store_true", help="tiny sizes, for a few seconds")
    return parser


def start(args):
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    # Networks of the same names live side by side.
    pyro.settings.set(module_local_params=True)
    set_rng_seed(args.seed)


def save(args, stem, results, tables, draw):
    """
    Writes the results, unless no folder was asked for.

    :param dict results: goes to ``stem.json``, with the settings.
    :param dict tables: lists of rows by the ending of the stem of a CSV file.
    :param callable draw: takes a module ``matplotlib.pyplot``, returns a figure.
    """
    if args.out is None:
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit(
            'The figure needs matplotlib. Expected the extra "examples": '
            'pip install "pyro_rb[examples]".'
        ) from error
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data_dir", "smoke_test")}
    settings |= {"torch": torch.__version__, "pyro": pyro.__version__}
    settings |= {"python": sys.version.split()[0], "threads": torch.get_num_threads()}
    text = json.dumps({"settings": settings, **results}, indent=1)
    (out / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    for ending, rows in tables.items():
        with open(out / f"{stem}{ending}.csv", "w", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    figure = draw(plt)
    figure.savefig(out / f"{stem}.png", dpi=140)
    plt.close(figure)
