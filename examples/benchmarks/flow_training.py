# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Flows trained for the same CPU time by Trace_ELBO and by STLTrace_ELBO, on posteriors with curvature.

Each loss has the learning rate, one of three, that is best for it on a seed of its own. The table gives the loss
of the trained guide (minus the ELBO) from many draws: its mean over other seeds, and the standard error of that
mean. Runs take turns, 50 steps at a time. The learning rate falls with time to a hundredth. The logistic
regression takes its data from scikit-learn, and is left out without it::

    python examples/benchmarks/flow_training.py --json flow_training.json --csv flow_training.csv
"""

import math
from functools import partial
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import make_parser, write
from flow_cost import LOSSES, parabolas
from pyro.distributions import transforms as T
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from tqdm import tqdm

from support.command_line import restart, run, set_up
from support.posteriors import centred_schools, logistic
from support.results import cell, mean_and_error
from support.training import now


def funnel(dim):
    """Neal's. It has no data, so that the loss of the posterior is zero."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    scale = (0.5 * v).exp().unsqueeze(-1).expand(v.shape + (dim - 1,))
    pyro.sample("x", dist.Normal(0.0, scale).to_event(1))


def banana():
    """Rosenbrock's function over 20. Likewise."""
    x = pyro.sample("x", dist.Normal(1.0, 10.0**0.5))
    pyro.sample("y", dist.Normal(x.square(), 0.1**0.5))


def cases():
    iaf = partial(AutoIAFNormal, num_transforms=2)
    planar = partial(AutoNormalizingFlow, init_transform_fn=partial(T.iterated, 8, T.planar))
    yield "funnel, 10 dimensions, AutoIAFNormal", partial(funnel, 10), iaf
    yield "banana, 2 dimensions, AutoIAFNormal", banana, iaf
    yield "eight schools, centred, AutoIAFNormal", centred_schools, iaf
    model = logistic()
    if model is not None:
        yield "logistic regression, breast cancer, AutoIAFNormal", model, iaf
    yield "parabolas, 20 dimensions, planar, 8 layers", partial(parabolas, 20), planar


class Training:
    def __init__(self, loss, lr, make, seed):
        model, make_guide = make
        restart(seed)
        self.model, self.guide, self.loss, self.lr = model, make_guide(model), LOSSES[loss](), lr
        self.guide()
        self.optimizer = torch.optim.Adam(self.guide.parameters(), lr=lr)
        self.seconds, self.num_steps, self.is_lost = 0.0, 0, False

    def go_on(self, num_steps, limit):
        start = now()
        try:
            for _ in range(num_steps):
                self.optimizer.param_groups[0]["lr"] = self.lr * 0.01 ** (self.seconds / limit)
                self.optimizer.zero_grad()
                self.loss.differentiable_loss(self.model, self.guide).backward()
                self.optimizer.step()
        except ValueError:  # a distribution says that a parameter is not finite
            self.is_lost = True
        self.seconds += now() - start
        self.num_steps += num_steps

    def evaluate(self, num_blocks):
        """The loss by blocks of 100 draws, and its standard error; infinite if it became NaN in training."""
        if self.is_lost:
            return math.inf, 0.0
        elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        with torch.no_grad():
            return mean_and_error([elbo.loss(self.model, self.guide) for _ in range(num_blocks)])


def train(make, keys, seed, limit, num_blocks):
    """
    Trains in turns.

    :param list keys: pairs of a loss and a learning rate.
    :return: by key, the loss at the end with its standard error, and the number of steps.
    """
    runs = {key: Training(*key, make, seed) for key in keys}
    while any(one.seconds <= limit and not one.is_lost for one in runs.values()):
        for one in runs.values():
            if one.seconds <= limit and not one.is_lost:
                one.go_on(50 if limit else 1, max(limit, 1e-6))
    return {key: (*one.evaluate(num_blocks), one.num_steps) for key, one in runs.items()}


def compare(make, args, limit, num_seeds, num_blocks):
    found = train(make, list(product(LOSSES, args.lr)), args.seed, limit, num_blocks)
    best = {}
    for (loss, lr), (value, *_) in found.items():
        if loss not in best or value < found[loss, best[loss]][0]:
            best[loss] = lr
    # Seeds that nothing was chosen by.
    runs = [train(make, list(best.items()), args.seed + i, limit, num_blocks) for i in range(1, num_seeds + 1)]
    result = {}
    for key in best.items():
        values, errors, steps = zip(*(run[key] for run in runs))
        result[key[0]] = {
            "loss": mean_and_error(values),
            "errors of evaluation": errors,
            "learning rate": key[1],
            "steps": round(float(np.mean(steps))),
        }
    return result


def main(args):
    set_up(args)
    sizes = (0.0, 1, 2) if args.smoke_test else (args.seconds, args.num_seeds, args.num_blocks)
    results = {}
    chosen = [case for case in cases() if args.case in case[0]]
    for name, *make in tqdm(chosen, disable=args.smoke_test):
        results[name] = compare(make, args, *sizes)
        tqdm.write(f"{name} {results[name]}")
    write(args, results, [row(*item) for item in results.items()])


def row(name, result):
    cells = {loss: cell(*found["loss"]) for loss, found in result.items()}
    rates = " / ".join(f"{found['learning rate']:g}" for found in result.values())
    steps = " / ".join(str(found["steps"]) for found in result.values())
    return {"": name, **cells, "learning rates": rates, "steps": steps}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of CPU time for each run")
    parser.add_argument("--num-seeds", type=int, default=3, help="of each case, beside the one for the choice")
    parser.add_argument("--num-blocks", type=int, default=100, help="of 100 draws, for the loss of a trained guide")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.001, 0.003, 0.01], help="each has its best")
    parser.add_argument("--case", default="", help="run only cases with this in the name")
    run(main, parser)
