# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What a comparison of losses says with one fixed minibatch, and with batches that are drawn.

The model is a logistic regression of 2,000 rows, with batches of 64. The result is the variance of the gradient of
STLTrace_ELBO over that of Trace_ELBO, with its standard error, at some steps of training by Trace_ELBO::

    python examples/benchmarks/minibatches.py --json minibatches.json
"""

import pyro
import pyro.distributions as dist
import torch
from common import make_parser, write
from pyro.infer.autoguide import AutoNormal

from pyro_rb import compare
from support.command_line import restart, run, set_up

NUM_ROWS, NUM_FEATURES, SIZE = 2000, 5, 64


def model(features, outcome):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([NUM_FEATURES]).to_event(1))
    with pyro.plate("rows", len(features)), pyro.poutine.scale(scale=NUM_ROWS / len(features)):
        pyro.sample("outcome", dist.Bernoulli(logits=(features * weights).sum(-1)), obs=outcome)


def main(args):
    set_up(args)
    features = torch.randn(NUM_ROWS, NUM_FEATURES)
    outcome = torch.bernoulli((features @ torch.linspace(-1.0, 1.0, NUM_FEATURES)).sigmoid())

    def batch():
        rows = torch.randperm(NUM_ROWS)[:SIZE]
        return features[rows], outcome[rows]

    results = {}
    for name, data in {"a fixed batch": batch(), "batches that are drawn": batch}.items():
        restart(args.seed)
        result = compare(
            model,
            AutoNormal(model),
            ["STLTrace_ELBO"],
            args=data,
            optim=pyro.optim.Adam({"lr": 0.01}),
            num_samples=10 if args.smoke_test else 300,
            num_burn_in=2 if args.smoke_test else 100,
            train_steps=2 if args.smoke_test else 1500,
        )
        ratios = {s.step: (s.losses[1].variance_ratio, s.losses[1].variance_ratio_error) for s in result.states}
        results[name] = {"variance": ratios, "advice": result.recommendation.sentence}
        print(f"{name}:", ", ".join(f"step {s}: {r:.3f} +/- {e:.3f}" for s, (r, e) in ratios.items()))
        print(f"  {results[name]['advice']}")
    write(args, results)


if __name__ == "__main__":
    run(main, make_parser(__doc__, csv=False))
