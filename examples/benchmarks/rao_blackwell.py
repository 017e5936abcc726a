# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance and time of a step of RaoBlackwell_ELBO, against losses that treat all sites alike.

The models have discrete and continuous sites, and some have one kind only. They are measured early and late in
training, which is by RaoBlackwell_ELBO for all. Parameters are held fixed; losses take turns, draw by draw, with the
same seeds. The table gives the total variance of the gradient (for the binary autoencoder only that of the encoder)
and the time of a step, as multiples of Trace_ELBO's. The gain is variance times time of the best other loss, over that
of RaoBlackwell_ELBO. The best other loss is chosen anew in each state, so that no single choice of a user would be as
good. What a user would have to write by hand is there for comparison only::

    python examples/benchmarks/rao_blackwell.py --json gain.json --csv gain.csv
"""

import json

import numpy as np
import pyro
from common import make_parser, seconds, write
from pyro.infer import SVI
from tqdm import tqdm

from pyro_rb.diagnostics.run.parameters import find_parameters
from pyro_rb.diagnostics.run.sampler import GradientSampler, draw_seeds
from pyro_rb.diagnostics.stats.moments import RunningMoments
from support.command_line import restart, run, set_up
from support.mixed_models import PROBLEMS, mark
from support.training import set_fast_floats


class Measurement:
    """
    Gradients of one loss, at parameters that stay as they are.

    :param int num_burn_in: of steps, for a loss that learns from them.
    """

    def __init__(self, problem, name, loss, model, guide, num_burn_in):
        guide, args = mark(name, guide), problem.batch(0)
        parameters = {n: p for n, p in find_parameters(model, guide, args).items() if problem.part in n}
        self.sampler = GradientSampler(loss, model, guide, args, {}, parameters, use_backward=True)
        self.moments = [RunningMoments() for _ in parameters]
        self.times = []
        # R2G2_ELBO finds out at the first steps what may not be projected.
        for _ in range(num_burn_in if hasattr(loss, "control_variate_scale") else 2):
            self.sampler.step()
            self.sampler.collect()

    def draw(self, seed):
        pyro.set_rng_seed(seed)
        self.times.append(seconds(self.sampler.step))
        for moments, gradient in zip(self.moments, self.sampler.collect()):
            moments.update(gradient)

    @property
    def variance(self):
        return sum(moments.variance.sum().item() for moments in self.moments)


def measure(problem, model, guide, args):
    """By loss, variance and time over those of Trace_ELBO; gains, by loss of ours."""
    losses = {**problem.single(), **problem.ours()}
    found = {
        name: Measurement(problem, name, make(), model, guide, args.num_burn_in) for name, make in losses.items()
    }
    for seed in draw_seeds(0, args.num_samples)[1]:
        for measurement in found.values():
            measurement.draw(seed)
    times = {name: float(np.median(m.times)) for name, m in found.items()}
    plain = found["Trace_ELBO"].variance, times["Trace_ELBO"]
    rows = {
        name: {"variance": significant(m.variance / plain[0]), "time": significant(times[name] / plain[1])}
        for name, m in found.items()
    }
    costs = {name: m.variance * times[name] for name, m in found.items()}
    others = [name for name in problem.single() if "by hand" not in name]
    best = min(others, key=lambda name: costs[name])
    gains = {name: significant(costs[best] / costs[name]) for name in problem.ours()}
    return {"ms": round(1e3 * plain[1], 2), "losses": rows, "best other": best, "gain": gains}


def significant(value):
    return float(f"{value:.3g}")


def states(problem, seed, args):
    """Yields the number of steps with model and guide, early and late in one training run."""
    restart(seed)
    model, guide = problem.make()
    loss = problem.ours()["RaoBlackwell_ELBO"]()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": problem.lr}), loss)
    done = 0
    for num_steps in [2] if args.smoke_test else problem.steps:
        while done < num_steps:
            svi.step(*problem.batch(done))
            done += 1
        yield done, model, guide


def make_table(results):
    """A row for each state, with the gains at each seed."""
    rows = []
    for title, by_steps in results.items():
        for steps, by_seed in by_steps.items():
            row = {"model": title, "step": steps}
            row["best other"] = " / ".join(dict.fromkeys(found["best other"] for found in by_seed.values()))
            for name in next(iter(by_seed.values()))["gain"]:
                key = name.replace("RaoBlackwell_ELBO", "gain")
                row[key] = " / ".join(str(found["gain"][name]) for found in by_seed.values())
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]


def main(args):
    set_up(args)
    set_fast_floats()
    if args.smoke_test:
        args.num_samples, args.num_burn_in, args.seeds = 2, 4, [0]
        args.models = ["mixture", "binary"]
    results = {}
    for name in tqdm(args.models or PROBLEMS, disable=args.smoke_test):
        problem = PROBLEMS[name]
        by_steps = results.setdefault(problem.title, {})
        for seed in args.seeds:
            for steps, model, guide in states(problem, seed, args):
                found = measure(problem, model, guide, args)
                by_steps.setdefault(steps, {})[seed] = found
                tqdm.write(f"{name}, step {steps}, seed {seed}: {json.dumps(found, indent=1)}")
    write(args, results, make_table(results))


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), help="default: all")
    parser.add_argument("--num-samples", type=int, default=60, help="gradients of each loss in each state")
    parser.add_argument("--num-burn-in", type=int, default=50, help="steps before, from which some losses learn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of training runs")
    run(main, parser)
