# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Rules that adapt the threshold of a rejection sampler, side by side.

At each step eleven log weights are drawn afresh from a normal distribution that may drift, as it
does in training; no guide is trained. The rules are

* ``newton``, the rule of :func:`pyro_rb.ops.rejection_threshold.adapt_threshold`;
* ``dual averaging`` of ``Z_target`` less the acceptance, with the constants that are
  usual for step sizes of Hamiltonian Monte Carlo;
* ``gradient``, a step along the gradient of half of the square of ``Z - Z_target``.

For each rule the table gives the steps until the acceptance of a long run stays within 0.1 of the
target, and, after 1,000 steps, the mean and the spread of the acceptance from step to step::

    python examples/benchmarks/rvrs_adaptation.py --json adaptation.json
"""

import json
import math

import torch
from common import make_parser, write
from tqdm import tqdm

from pyro_rb.ops.rejection import acceptance
from pyro_rb.ops.rejection_threshold import adapt_threshold, solve_threshold
from support.command_line import run, set_up

TARGET, EPSILON, NUM_PROPOSALS = 0.33, 0.01, 11

#: Standard deviation of log weights, error of the first threshold, drift of their mean.
SETTINGS = {
    "nearly fitted, right start": (1.0, 0.0, 0.0),
    "nearly fitted, 8 too high": (1.0, 8.0, 0.0),
    "nearly fitted, 1000 too high": (1.0, 1000.0, 0.0),
    "nearly fitted, 8 too low": (1.0, -8.0, 0.0),
    "poorly fitted, 8 too high": (30.0, 8.0, 0.0),
    "poorly fitted, 1000 too high": (30.0, 1000.0, 0.0),
    "drifting by 0.1 a step": (1.0, 0.0, 0.1),
    "drifting by 1 a step": (1.0, 0.0, 1.0),
}


class Newton:
    def __init__(self, T, lr=0.1):
        self.T, self.lr = T, lr

    def step(self, log_weight):
        self.T = adapt_threshold(log_weight, self.T, TARGET, EPSILON, self.lr)


class Gradient:
    def __init__(self, T, lr=0.1):
        self.T, self.lr = T, lr

    def step(self, log_weight):
        s = (log_weight + self.T).sigmoid()
        mean = acceptance(log_weight, self.T, EPSILON).mean()
        self.T = self.T - self.lr * (mean - TARGET) * ((1 - EPSILON) * s * (1 - s)).mean()


class DualAveraging:
    def __init__(self, T, gamma=0.05, t0=10, kappa=0.75):
        self.T, self.start, self.mean = T, T, torch.zeros_like(T)
        self.gamma, self.t0, self.num = gamma, t0, 0

    def step(self, log_weight):
        self.num += 1
        error = TARGET - acceptance(log_weight, self.T, EPSILON).mean()
        rate = 1 / (self.num + self.t0)
        self.mean = (1 - rate) * self.mean - rate * error
        self.T = self.start - self.mean * math.sqrt(self.num) / self.gamma


RULES = {"newton": Newton, "dual averaging": DualAveraging, "gradient": Gradient}


def follow(rule, spread, error, drift, num_steps):
    """The acceptance that a long run would have, at each step."""
    def draw(size, t):
        return spread * torch.randn(size) + drift * t - 70

    adapter = rule(solve_threshold(draw(4000, 0), TARGET, EPSILON) + error)
    seen = []
    for t in range(num_steps):
        adapter.step(draw(NUM_PROPOSALS, t))
        seen.append(acceptance(draw(1000, t), adapter.T, EPSILON).mean().item())
    return torch.tensor(seen)


def summarize(seen):
    mean_of_20 = seen.unfold(0, 20, 1).mean(-1)
    is_off = ((mean_of_20 - TARGET).abs() > 0.1).nonzero()
    reached = int(is_off[-1]) + 1 if len(is_off) else 0
    half = seen[len(seen) // 2 :]
    return {
        "reached after": None if reached >= len(mean_of_20) else reached,
        "mean": round(half.mean().item(), 3),
        "sd": round(half.std().item(), 3),
    }


def main(args):
    set_up(args)
    num_steps = 60 if args.smoke_test else 2000
    results = {}
    for name, setting in tqdm(SETTINGS.items(), disable=args.smoke_test):
        results[name] = {
            rule: summarize(follow(RULES[rule], *setting, num_steps)) for rule in RULES
        }
        print(name, json.dumps(results[name]))
    write(args, results)


if __name__ == "__main__":
    run(main, make_parser(__doc__, csv=False))
