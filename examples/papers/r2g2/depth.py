# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance of the plain gradient over that of R2G2_ELBO, for Bayesian networks of several depths.

Networks have ReLU and AutoNormal, and all layers have one width. Locations are drawn as He et al.
(2015) initialize weights; standard deviations are ``s / sqrt(width)``. Parameters are held
fixed; both gradients have the analytic KL divergence. Above 1, R2G2_ELBO is better::

    python examples/papers/r2g2/depth.py --out depth
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.diagnostics.show.palette import INK
from support.command_line import make_parser, run, set_up
from support.gradients import draw_gradients, variance_ratio
from support.networks import BayesianMLP, MeanField, make_guide
from support.results import make_panels, write_results

LOSSES = {"shared": R2G2_ELBO, "local": partial(R2G2_ELBO, pre_activations="local")}


def init_as_he(site):
    """Values for weights, and zeros for biases."""
    shape = site["fn"].event_shape
    return torch.zeros(shape) if len(shape) == 1 else torch.randn(shape) * (2 / shape[-1]) ** 0.5


def measure(depth, s, net, args):
    """The ratios of one network, by part and loss."""
    pyro.set_rng_seed(1000 * args.seed + net)
    batch = torch.randn(args.batch_size, args.width), torch.randn(args.batch_size)
    model = BayesianMLP([args.width] * depth + [1], args.batch_size)
    guide = make_guide(model, batch, s * args.width**-0.5, init_as_he)
    plain = draw_gradients(TraceMeanField_ELBO(), model, MeanField(guide), batch, args.num_samples)
    ratios = {}
    for name, make in LOSSES.items():
        draws = draw_gradients(make(), model, guide, batch, args.num_samples)
        for part in draws:
            ratios[f"{part}, {name}"] = variance_ratio(plain[part], draws[part])[0]
    return ratios


def draw(results):
    figure, axes = make_panels(1, 2, size=(4, 3.4), sharey=True)
    for ax, part in zip(axes, ("loc", "scale")):
        for name, color in zip(LOSSES, ("C0", "C1")):
            for s, style in zip(sorted({r["s"] for r in results}), ("o-", "s--", "^:", "v-.")):
                rows = [r for r in results if r["s"] == s]
                mean, error = np.array([geometric(r["ratios"][f"{part}, {name}"]) for r in rows]).T
                label = f"{name}, s = {s}"
                depths = [r["depth"] for r in rows]
                bars = np.array([mean - mean / error, mean * error - mean])
                ax.errorbar(depths, mean, bars, fmt=style, color=color, markersize=4, label=label)
        ax.axhline(1, color=INK, linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="layers", title=f"by the {part}s")
        ax.set_xticks(depths, depths)
        ax.minorticks_off()
    axes[0].set_ylabel("plain variance / variance")
    axes[1].legend()
    return figure


def geometric(values):
    """The geometric mean, and its standard error as a factor."""
    logs = np.log(values)
    error = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    return float(np.exp(logs.mean())), float(np.exp(error))


def main(args):
    set_up(args)
    # Networks of the same names live side by side.
    pyro.settings.set(module_local_params=True)
    pyro.enable_validation(False)  # it takes a third of the time
    if args.smoke_test:
        args.depths, args.num_samples, args.num_nets, args.s = [2, 3], 3, 1, args.s[:1]
    results, table = [], []
    todo = [(s, depth) for s in args.s for depth in args.depths]
    for s, depth in tqdm(todo):
        found = [measure(depth, s, net, args) for net in range(args.num_nets)]
        ratios = {name: [ratio[name] for ratio in found] for name in found[0]}
        results.append({"s": s, "depth": depth, "ratios": ratios})
        cells = {name: "{:.2f} x/÷ {:.2f}".format(*geometric(r)) for name, r in ratios.items()}
        table.append({"s": s, "layers": depth, **cells})
        write_results(args, {"results": results}, table, partial(draw, results))
    print(tabulate(table, headers="keys"))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--s", type=float, nargs="+", default=[0.1, 0.3], help="see above")
    parser.add_argument("--num-nets", type=int, default=2, help="networks for each depth")
    parser.add_argument("--num-samples", type=int, default=80, help="draws of the gradient")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    run(main, parser)
