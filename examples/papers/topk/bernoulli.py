# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Three coins with one parameter: the simplest case of RaoBlackwellTopK_ELBO.

Three coins b with common log odds eta are one latent z with 8 values. The loss is the mean squared
distance from b to (0.6, 0.51, 0.48), without an entropy; the best eta is +infinity. As in Figures 1
and 2 of Liu et al. (2019), the script draws the variance of the gradient against the number k of
summed values, at eta = 0 and at eta = -4, where z is nearly certain, and the loss along gradient
descent from both. It takes about a minute::

    python examples/papers/topk/bernoulli.py --out bernoulli
"""

import itertools
from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb.diagnostics.show.palette import INK
from pyro_rb.infer import RaoBlackwellTopK_ELBO
from support.command_line import make_parser, restart, run, set_up
from support.results import make_panels, write_results

STARTS = (0.0, -4.0)
EVERY = 10  # steps, the loss is noted
BASELINES = (None, "reinforce+", "loo")
topk = partial(RaoBlackwellTopK_ELBO, max_plate_nesting=1)
LOSSES = {
    "exact sum": partial(TraceEnum_ELBO, max_plate_nesting=1),
    "REINFORCE": Trace_ELBO,
    "k = 1": partial(topk, k=1, baseline=None),
    "k = 3": partial(topk, k=3, baseline=None),
    "REINFORCE+": partial(topk, k=0, baseline="reinforce+"),
    "k = 1, REINFORCE+": partial(topk, k=1, baseline="reinforce+"),
    "k = 1, loo": partial(topk, k=1),
}


class Coins:
    """
    Copies of the problem, each with a parameter of its own: so many draws, or runs.
    """

    def __init__(self, start, num_copies):
        self.start, self.num_copies = start, num_copies
        coins = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
        self.heads = coins.sum(-1)
        self.cost = (coins - torch.tensor([0.6, 0.51, 0.48])).square().sum(-1)

    def log_q(self):
        eta = pyro.param("eta", torch.full((self.num_copies, 1), self.start))
        return eta * self.heads - 3 * torch.nn.functional.softplus(eta)

    def model(self):
        with pyro.plate("copies", self.num_copies):
            # The mask leaves log p and log q out of the objective.
            with pyro.poutine.mask(mask=False):
                z = pyro.sample("z", dist.Categorical(torch.ones(8)))
            pyro.factor("cost", -self.cost[z])

    def guide(self):
        with pyro.plate("copies", self.num_copies), pyro.poutine.mask(mask=False):
            pyro.sample("z", dist.Categorical(logits=self.log_q()))

    @torch.no_grad()
    def expected_cost(self):
        """Of each copy, ``[num_copies]``."""
        return (self.log_q().exp() * self.cost).sum(-1)


def draw_gradients(start, elbo, num_samples):
    restart(0)
    case = Coins(start, num_samples)
    elbo.loss_and_grads(case.model, case.guide)
    return pyro.param("eta").grad


def measure_variances(start, num_samples):
    """For each k, by baseline, and the bound of Proposition 1 without one."""
    pyro.clear_param_store()
    probs = Coins(start, 1).log_q().detach().exp().sort(descending=True).values[0].cpu()
    rows = {str(b): [] for b in BASELINES}
    for k in range(8):
        for baseline in BASELINES:
            elbo = topk(k=k, num_samples=1, baseline=baseline)
            variance = draw_gradients(start, elbo, num_samples).var()
            rows[str(baseline)].append(float(f"{variance:.3g}"))
    bound = rows["None"][0] * np.append(1.0, 1.0 - probs.cumsum(0)[:-1].numpy())
    return {**rows, "bound": [float(f"{x:.3g}") for x in bound]}


def descend(start, name, num_steps, num_copies, lr):
    """The loss along gradient descent: mean, 10% and 90% quantile over copies, by step."""
    restart(0)
    case, elbo = Coins(start, num_copies), LOSSES[name]()
    guide = config_enumerate(case.guide) if name == "exact sum" else case.guide
    svi = pyro.infer.SVI(case.model, guide, pyro.optim.SGD({"lr": lr}), elbo)
    curve = []
    for step in range(num_steps + 1):
        svi.step()
        if step % EVERY == 0:
            cost = case.expected_cost()
            curve.append(torch.stack([cost.mean(), *cost.quantile(torch.tensor([0.1, 0.9]))]))
    return torch.stack(curve).T.cpu().numpy().round(5).tolist()


def draw(variances, curves):
    fig, axes = make_panels(2, 2)
    for ax, start in zip(axes[:2], STARTS):
        for name, curve in curves[start].items():
            steps = EVERY * np.arange(len(curve[0]))
            (line,) = ax.plot(steps, curve[0], label=name)
            ax.fill_between(steps, *curve[1:], color=line.get_color(), alpha=0.1)
        ax.set(xlabel="step", ylabel="loss, mean and 80% of runs", title=f"from eta = {start:g}")
    for ax, start in zip(axes[2:], STARTS):
        for name, values in variances[start].items():
            style = dict(color=INK, ls=":") if name == "bound" else dict(marker="o", markersize=4)
            # At k = 7 the sum is over all: the variance is 0, or what rounding leaves.
            ax.plot(range(7), values[:7], label=name, **style)
        ax.set(xlabel="k", ylabel="variance of the gradient", title=f"at eta = {start:g}", yscale="log")
    axes[0].legend(fontsize=7)
    axes[3].legend()
    return fig


def main(args):
    set_up(args)
    torch.set_default_dtype(torch.float64)
    if args.smoke_test:
        args.num_samples, args.num_copies, args.num_steps = 100, 5, 5
    variances = {start: measure_variances(start, args.num_samples) for start in STARTS}
    rows = [
        {"eta": f"{start:g}", "baseline": name, **{f"k = {k}": v for k, v in enumerate(values)}}
        for start in STARTS
        for name, values in variances[start].items()
    ]
    jobs = list(itertools.product(STARTS, LOSSES))
    curves = {start: {} for start in STARTS}
    for start, name in tqdm(jobs):
        curves[start][name] = descend(start, name, args.num_steps, args.num_copies, args.lr)
    print(tabulate(rows, headers="keys"))
    results = {"variance": variances, "loss": curves}
    write_results(args, results, rows, lambda: draw(variances, curves))


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--num-samples", type=int, default=100000, help="draws of each gradient")
    parser.add_argument("--num-copies", type=int, default=200, help="runs of gradient descent")
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1.0)
    run(main, parser)
