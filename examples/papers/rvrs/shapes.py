# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Two posteriors in two dimensions, drawn against guides and RVRSGuide around them.

``wedge`` is a logistic regression on six points that a line can almost separate: its
posterior is skewed. ``funnel`` has a log scale, and a location that has this scale and one vague
reading. All integrals are sums over a grid, fine enough to be exact to the digits given. All guides
are trained for the same number of steps; RVRSGuide takes over a guide after half of them::

    python examples/papers/rvrs/shapes.py --out shapes
"""

import math
from typing import Any, Callable, NamedTuple, Tuple

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal

from pyro_rb.diagnostics.show.palette import INK
from pyro_rb.infer import RVRSGuide
from pyro_rb.ops.rejection import acceptance
from support.bounds import log_joint
from support.command_line import make_parser, restart, run, set_up
from support.results import make_panels, report
from support.training import fit

#: Shares of the posterior inside of the contours.
LEVELS = (0.99, 0.9, 0.5)


def wedge():
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    dose = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0])
    with pyro.plate("animals", 6):
        logits = intercept + slope * dose
        dead = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
        pyro.sample("dead", dist.Bernoulli(logits=logits), obs=dead)


def funnel():
    log_scale = pyro.sample("log scale", dist.Normal(0.0, 1.0))
    location = pyro.sample("location", dist.Normal(0.0, log_scale.exp()))
    pyro.sample("reading", dist.Normal(location, 2.0), obs=torch.tensor(0.0))


class Problem(NamedTuple):
    model: Callable[[], None]
    max_plate_nesting: int
    #: The two sites, with the ends of their axes and the number of points between.
    first: Tuple[str, float, float, int]
    second: Tuple[str, float, float, int]


PROBLEMS = {
    "wedge": Problem(wedge, 1, ("intercept", -22.0, 8.0, 600), ("slope", -6.0, 30.0, 600)),
    "funnel": Problem(funnel, 0, ("log scale", -5.0, 4.0, 300), ("location", -12.0, 12.0, 4800)),
}


class Grid:
    """A problem at the points of a grid, as ``[num_first, num_second]``."""

    def __init__(self, problem, coarse):
        axes = [
            torch.linspace(low, high, num // coarse, dtype=torch.float64)
            for _, low, high, num in (problem.first, problem.second)
        ]
        self.names = problem.first[0], problem.second[0]
        self.x, self.y = torch.meshgrid(*axes, indexing="ij")
        self.points = torch.stack([self.x.flatten(), self.y.flatten()], -1)
        self.log_cell = math.log((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
        ones = (1,) * problem.max_plate_nesting
        values = {n: self.points[:, i].reshape((-1,) + ones) for i, n in enumerate(self.names)}
        self.log_p = log_joint(problem.model, values, problem.max_plate_nesting)
        self.log_evidence = self.log_sum(self.log_p)

    def log_sum(self, log_density):
        return (log_density.logsumexp(0) + self.log_cell).item()

    @torch.no_grad()
    def evaluate(self, guide):
        """The ELBO, the mean acceptance, and how much of the guide is on the grid."""
        proposal = guide.guide if isinstance(guide, RVRSGuide) else guide
        log_q = proposal.get_posterior().log_prob(self.points.float()).double()
        mass = math.exp(self.log_sum(log_q))
        f = self.log_p - log_q
        log_z, log_r = 0.0, log_q
        if isinstance(guide, RVRSGuide):
            log_a = acceptance(f, guide.T.double(), guide.epsilon).log()
            log_z = self.log_sum(log_q + log_a)
            f, log_r = f - log_a, log_q + log_a - log_z
        elbo = ((log_r + self.log_cell).exp() * f).sum().item() + log_z
        return elbo, math.exp(log_z), mass

    def draw(self, ax, samples):
        """Contours of the posterior, and samples."""
        order = self.log_p.sort(descending=True)
        mass = (order.values - self.log_evidence + self.log_cell).exp().cumsum(0)
        heights = [order.values[(mass > level).nonzero()[0, 0]].item() for level in LEVELS]
        shape = self.log_p.reshape(self.x.shape)
        inside = self.log_p > heights[0]
        for axis, i in (("x", 0), ("y", 1)):
            low, high = self.points[inside, i].aminmax()
            pad = 0.15 * (high - low)
            getattr(ax, f"set_{axis}lim")((low - pad).item(), (high + pad).item())
        ax.contour(self.x.cpu(), self.y.cpu(), shape.cpu(), heights, colors=INK, linewidths=0.8, linestyles="solid")
        ax.scatter(*samples.T.cpu(), s=3, alpha=0.5, color="C0", linewidths=0)


def make_flow(model):
    return AutoIAFNormal(model, hidden_dim=[16, 16], num_transforms=2)


#: By name: the guide, and the acceptance of the RVRSGuide around it.
GUIDES: Any = {
    "mean field": (AutoDiagonalNormal, None),
    "RVRS of mean field, Z = 0.3": (AutoDiagonalNormal, 0.3),
    "RVRS of mean field, Z = 0.1": (AutoDiagonalNormal, 0.1),
    "flow": (make_flow, None),
    "RVRS of flow, Z = 0.3": (make_flow, 0.3),
}


def train(args, model, name):
    make_guide, target = GUIDES[name]
    restart(args.seed)
    guide = make_guide(model)
    half = args.num_steps // 2
    num_steps = args.num_steps if target is None else half
    seconds = fit(model, guide, num_steps=num_steps, lr=args.lr, desc=name)
    if target is not None:
        guide = RVRSGuide(model, guide, Z_target=target)
        seconds += fit(model, guide, num_steps=half, lr=args.lr, desc=name)
    return guide, seconds


def draw_samples(guide, num_samples, names):
    if isinstance(guide, RVRSGuide):
        draws = guide.sample_posterior(num_samples)
        return torch.stack([draws[name].reshape(-1) for name in names], -1)
    with torch.no_grad():
        return guide.get_posterior().sample((num_samples,))


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_steps, args.num_draws = 20, 50
    rows = []
    # Small panels, for letters that can be read on a page.
    figure, axes = make_panels(len(PROBLEMS), len(GUIDES), size=(2.1, 2.4))
    axes = iter(axes)
    for problem_name in PROBLEMS:
        problem = PROBLEMS[problem_name]
        grid = Grid(problem, coarse=4 if args.smoke_test else 1)
        gaps = {}
        for name, ax in zip(GUIDES, axes):
            guide, seconds = train(args, problem.model, name)
            bound, z, mass = grid.evaluate(guide)
            gaps[name] = grid.log_evidence - bound
            closed = 1 - gaps[name] / gaps["mean field"]
            rows.append(
                {
                    "posterior": problem_name,
                    "guide": name,
                    "KL divergence": f"{gaps[name]:.4f}",
                    "closed": f"{100 * closed:.0f} %",
                    "acceptance": f"{z:.3f}" if isinstance(guide, RVRSGuide) else "",
                    "mass on grid": f"{mass:.5f}",
                    "CPU time, s": f"{seconds:.1f}",
                }
            )
            grid.draw(ax, draw_samples(guide, args.num_draws, grid.names))
            ax.set_title(f"{name}\nKL {gaps[name]:.3f}", fontsize="small")
            ax.set(xlabel=grid.names[0], ylabel=grid.names[1])
    report(args, rows, lambda: figure)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--num-draws", type=int, default=500, help="draws shown in a panel")
    run(main, parser)
