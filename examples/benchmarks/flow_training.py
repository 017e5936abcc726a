# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Flows trained for the same CPU time by Trace_ELBO and by STLTrace_ELBO.

Given is the loss of the trained guide, minus the ELBO, by many draws: its mean over seeds, and the standard error of
that. Runs of a seed take turns, 50 steps each at a time. The learning rate falls with time to a hundredth::

    python examples/benchmarks/flow_training.py --json flow_training.json --csv flow_training.csv
"""

from functools import partial

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

from pyro_rb.diagnostics.cli.examples import EIGHT_SCHOOLS_EFFECTS, EIGHT_SCHOOLS_ERRORS
from utils.command_line import restart, run, set_up
from utils.training import now


def centred_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        errors = torch.tensor(EIGHT_SCHOOLS_ERRORS)
        pyro.sample("effect", dist.Normal(theta, errors), obs=torch.tensor(EIGHT_SCHOOLS_EFFECTS))


CASES = {
    "eight schools, centred, AutoIAFNormal, 2 layers": (centred_schools, partial(AutoIAFNormal, num_transforms=2)),
    "parabolas, 20 dimensions, AutoIAFNormal, 2 layers": (
        partial(parabolas, 20),
        partial(AutoIAFNormal, num_transforms=2),
    ),
    "parabolas, 20 dimensions, planar, 8 layers": (
        partial(parabolas, 20),
        partial(AutoNormalizingFlow, init_transform_fn=partial(T.iterated, 8, T.planar)),
    ),
}


class Training:
    def __init__(self, make_loss, model, make_guide, seed, lr):
        restart(seed)
        self.model, self.guide, self.loss, self.lr = model, make_guide(model), make_loss(), lr
        self.guide()
        self.optimiser = torch.optim.Adam(self.guide.parameters(), lr=lr)
        self.seconds, self.num_steps = 0.0, 0

    def go_on(self, num_steps, limit):
        start = now()
        for _ in range(num_steps):
            self.optimiser.param_groups[0]["lr"] = self.lr * 0.01 ** (self.seconds / limit)
            self.optimiser.zero_grad()
            self.loss.differentiable_loss(self.model, self.guide).backward()
            self.optimiser.step()
        self.seconds += now() - start
        self.num_steps += num_steps

    def evaluate(self, num_draws):
        with torch.no_grad():
            return float(np.mean([Trace_ELBO().loss(self.model, self.guide) for _ in range(num_draws)]))


def main(args):
    set_up(args)
    limit, num_seeds, num_draws = (0.0, 1, 2) if args.smoke_test else (args.seconds, args.num_seeds, args.num_draws)
    results = {}
    for name, (model, make_guide) in tqdm(CASES.items(), disable=args.smoke_test):
        losses, steps = {key: [] for key in LOSSES}, {key: [] for key in LOSSES}
        for seed in range(num_seeds):
            runs = {key: Training(make, model, make_guide, seed, args.lr) for key, make in LOSSES.items()}
            while min(one.seconds for one in runs.values()) <= limit:
                for one in runs.values():
                    if one.seconds <= limit:
                        one.go_on(1 if args.smoke_test else 50, max(limit, 1e-6))
            for key, one in runs.items():
                losses[key].append(one.evaluate(num_draws))
                steps[key].append(one.num_steps)
        results[name] = {key: [np.mean(x), np.std(x) / max(1, len(x) - 1) ** 0.5] for key, x in losses.items()}
        results[name]["steps"] = {key: float(np.mean(x)) for key, x in steps.items()}
        tqdm.write(f"{name} {results[name]}")
    rows = [{"": name, **{key: "{:.3f} ± {:.3f}".format(*row[key]) for key in LOSSES}} for name, row in results.items()]
    write(args, results, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of CPU time for each run")
    parser.add_argument("--num-seeds", type=int, default=5, help="of each case")
    parser.add_argument("--num-draws", type=int, default=2000, help="for the loss of a trained guide")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate at the start")
    run(main, parser)
