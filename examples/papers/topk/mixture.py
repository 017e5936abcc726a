# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A mixture of 10 Gaussians, fitted by stochastic gradients: how many values to sum?

There are 200 points in the plane. The guide has a categorical label for each point, and a point
estimate for each of the centers (Figure 3 of Liu et al., 2019). All losses start from the same
randomly chosen centers. One comparison is between numbers k of summed labels. The other, at equal
numbers of evaluations, is between k summed labels with one draw, and the mean of k + 1 draws::

    python examples/papers/topk/mixture.py --out mixture

The ELBO that is shown is exact. Several runs from one start are made side by side, in a plate.
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb.diagnostics.show.palette import INK
from pyro_rb.infer import RaoBlackwellTopK_ELBO
from support.command_line import make_parser, restart, run, set_up
from support.results import make_panels, write_results

topk = partial(RaoBlackwellTopK_ELBO, max_plate_nesting=2, baseline=None)
enumeration = partial(TraceEnum_ELBO, max_plate_nesting=2)
EXACT = "exact sum"
# Name -> evaluations at a point, and the loss.
BY_K = {
    EXACT: (10, enumeration),
    "k = 0": (1, partial(topk, k=0)),
    "k = 1": (2, partial(topk, k=1)),
    "k = 3": (4, partial(topk, k=3)),
    "k = 5": (6, partial(topk, k=5)),
}
AT_EQUAL_COST = {
    EXACT: (10, enumeration),
    **{f"k = {k}": (k + 1, partial(topk, k=k)) for k in (1, 3)},
    **{f"mean of {n} draws": (n, partial(topk, k=0, num_samples=n)) for n in (2, 4)},
    **{f"budget = {n}, loo": (n, partial(topk, budget=n, baseline="loo")) for n in (2, 4)},
}
LOSSES = {**BY_K, **AT_EQUAL_COST}


class Mixture:
    """
    :param int num_runs: copies with parameters of their own, from the same start.
    """

    def __init__(self, num_runs, num_points=200, num_components=10):
        self.num_runs, self.num_components = num_runs, num_components
        centres = 5.0 * torch.randn(num_components, 2)
        labels = torch.randint(num_components, (num_points,))
        self.data = centres[labels] + torch.randn(num_points, 2)
        self.start = self.data[torch.randperm(num_points)[:num_components]]
        nearest = torch.cdist(self.data, self.start).argmin(-1)
        self.logits = 3.0 * torch.nn.functional.one_hot(nearest, num_components).float()

    def plates(self):
        return pyro.plate("runs", self.num_runs, dim=-2), pyro.plate("points", len(self.data), dim=-1)

    def model(self):
        centres = pyro.param("centres", lambda: self.start.expand(self.num_runs, -1, -1).clone())
        runs, points = self.plates()
        with runs:
            prior = dist.Normal(0.0, 5.0).expand(centres.shape[1:]).to_event(2)
            # The guide has a point for the centres, which are learned as a parameter.
            pyro.factor("centres_prior", prior.log_prob(centres).unsqueeze(-1))
            with points:
                label = pyro.sample("label", dist.Categorical(torch.ones(self.num_components)))
                run = torch.arange(self.num_runs).unsqueeze(-1)
                loc = Vindex(centres)[run, label]
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=self.data)

    def guide(self):
        logits = pyro.param("logits", lambda: self.logits.expand(self.num_runs, -1, -1).clone())
        runs, points = self.plates()
        with runs, points:
            pyro.sample("label", dist.Categorical(logits=logits))

    @torch.no_grad()
    def loss(self):
        """The exact negative ELBO of a point, ``[num_runs]``."""
        centres, logits = pyro.param("centres"), pyro.param("logits").log_softmax(-1)
        log_p = dist.Normal(centres.unsqueeze(-3), 1.0).log_prob(self.data.unsqueeze(-2)).sum(-1)
        elbo = (logits.exp() * (log_p - np.log(self.num_components) - logits)).sum([-1, -2])
        prior = dist.Normal(0.0, 5.0).log_prob(centres).sum([-1, -2])
        return -(elbo + prior) / len(self.data)


def fit(name, seed, args):
    """The exact loss at every 10th step, mean over runs."""
    restart(seed)
    case, elbo = Mixture(args.num_runs), LOSSES[name][1]()
    guide = config_enumerate(case.guide) if name == EXACT else case.guide
    svi = pyro.infer.SVI(case.model, guide, pyro.optim.SGD({"lr": args.lr}), elbo)
    curve = []
    for step in range(args.num_steps + 1):
        svi.step()
        if step % 10 == 0:
            curve.append(round(case.loss().mean().item(), 5))
    return curve


def gap(curves, name):
    """The loss above that by the exact sum at the same step, mean over data sets."""
    return np.mean([np.subtract(of[name], of[EXACT]) for of in curves.values()], 0)


def make_table(curves, args):
    steps = sorted({min(args.num_steps // 10, step // 10) for step in (50, 100, args.num_steps)})
    rows = []
    for name, (evaluations, _) in LOSSES.items():
        end = np.mean([of[name][-1] for of in curves.values()])
        rows.append({
            "loss": name,
            "evaluations": evaluations,
            **{f"gap, step {10 * step}": f"{gap(curves, name)[step]:.4f}" for step in steps},
            "negative ELBO, end": f"{end:.4f}",
        })
    return rows


def draw(curves):
    fig, axes = make_panels(1, 2)
    for ax, group in zip(axes, (BY_K, AT_EQUAL_COST)):
        for name in group:
            values = gap(curves, name)
            style = dict(color=INK) if name == EXACT else dict(ls="--" if "mean" in name else "-")
            ax.plot(10 * np.arange(len(values)), values, label=name, **style)
        ax.set(xlabel="step", ylabel="loss above that by the exact sum, nats")
        ax.set_yscale("symlog", linthresh=0.01)
        ax.legend()
    return fig


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_runs, args.num_steps, args.seeds = 2, 10, [0]
    curves = {seed: {} for seed in args.seeds}
    with tqdm(total=len(args.seeds) * len(LOSSES)) as progress:
        for seed in args.seeds:
            for name in LOSSES:
                curves[seed][name] = fit(name, seed, args)
                progress.update()
    rows = make_table(curves, args)
    print(tabulate(rows, headers="keys"))
    write_results(args, {"rows": rows, "mean loss": curves}, rows, lambda: draw(curves))


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--num-runs", type=int, default=20, help="runs from each start")
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of gradient descent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data and start")
    run(main, parser)
