# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
RVRSGuide on a posterior of 1,000 dimensions.

Each of 1,000 sensors reads the sum of its own source, a part of the next sensor's source, and
noise. The posterior is Normal with correlated neighbors, so the evidence is known, and so is the
best ELBO of a mean-field guide. RVRSGuide takes over such a guide after half of the steps; where
the table says "cold", it trains the guide from the start::

    python examples/papers/rvrs/high_dim.py --out high_dim
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_rb.diagnostics.show.palette import INK
from pyro_rb.infer import RVRSGuide
from support.bounds import elbo
from support.command_line import make_parser, restart, run, set_up
from support.results import make_panels, report
from support.training import fit


class Sensors:
    """
    :param int size: number of sources, and of sensors.
    :param float crosstalk: how much each sensor has of the next source.
    :param float error: standard deviation of the noise.
    """

    def __init__(self, size, crosstalk, error):
        self.size, self.crosstalk, self.error = size, crosstalk, error
        self.data = self.mix(torch.randn(size)) + error * torch.randn(size)

    def mix(self, z):
        return z + self.crosstalk * z.roll(-1, -1)

    def model(self):
        z = pyro.sample("z", dist.Normal(torch.zeros(self.size), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.mix(z), self.error).to_event(1), obs=self.data)

    def bounds(self):
        """The log evidence, and the best ELBO of a mean-field guide."""
        mixing = self.mix(torch.eye(self.size, dtype=torch.float64)).T
        eye = torch.eye(self.size, dtype=torch.float64)
        covariance = mixing @ mixing.T + self.error**2 * eye
        prior = dist.MultivariateNormal(torch.zeros(self.size, dtype=torch.float64), covariance)
        precision = eye + mixing.T @ mixing / self.error**2
        evidence = prior.log_prob(self.data.double())
        gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
        return evidence.item(), (evidence - gap).item()


def train(args, problem, name, target, warm):
    """Returns the guide, milliseconds of a step of its own, and ELBOs along the steps."""
    restart(args.seed)
    guide = AutoDiagonalNormal(problem.model)
    num_plain = 0 if not warm else args.num_steps // 2
    if num_plain:
        fit(problem.model, guide, num_steps=num_plain, lr=args.lr, desc=name)
    if target is not None:
        guide = RVRSGuide(problem.model, guide, Z_target=target)
    curve = []

    def look(step):
        bound, _ = elbo(problem.model, guide, args.num_samples // 50, max_plate_nesting=0)
        curve.append((num_plain + step, bound))

    num_own = args.num_steps - num_plain
    lr = args.lr_warm if warm else args.lr
    every = max(1, num_own // 40)
    seconds = fit(problem.model, guide, num_steps=num_own, lr=lr, desc=name, look=look, every=every)
    return guide, 1000 * seconds / num_own, curve


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_steps, args.num_samples = 20, 500
    problem = Sensors(args.size, args.crosstalk, args.error)
    evidence, best = problem.bounds()
    runs = {"mean field": (None, False)}
    runs.update({f"RVRS, Z = {z}": (z, True) for z in args.Z_target})
    runs[f"RVRS, Z = {args.Z_target[0]}, cold"] = (args.Z_target[0], False)
    rows = []
    figure, (ax,) = make_panels(1, 1, size=(6.5, 3.6))
    for name, (target, warm) in runs.items():
        guide, ms, curve = train(args, problem, name, target, warm)
        bound, error = elbo(problem.model, guide, args.num_samples, max_plate_nesting=0)
        rows.append(
            {
                "guide": name,
                "ELBO": f"{bound:.2f}",
                "standard error": f"{error:.2f}",
                "below the evidence": f"{evidence - bound:.2f}",
                "acceptance": "" if target is None else f"{guide.Z.item():.3f}",
                "CPU time of a step, ms": f"{ms:.1f}",
            }
        )
        ax.plot(*zip(*curve), label=name)
    for value, style, label in ((evidence, "-", "log evidence"), (best, ":", "best mean field")):
        ax.axhline(value, color=INK, linestyle=style, linewidth=0.8, label=label)
    ax.set(xlabel="step", ylabel="ELBO")
    if not args.smoke_test:
        ax.set_ylim(best - 15, evidence + 2)
    ax.legend(fontsize="small")
    more = {"log_evidence": round(evidence, 3), "best_mean_field": round(best, 3)}
    report(args, rows, lambda: figure, **more)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--crosstalk", type=float, default=0.25)
    parser.add_argument("--error", type=float, default=1.0)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--lr-warm", type=float, default=0.005, help="learning rate where RVRSGuide takes over")
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--num-samples", type=int, default=20_000, help="proposals from which the ELBO is estimated")
    run(main, parser)
