# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance of the gradient on a mixture of Gaussians, at equal numbers of evaluations.

The data are 200 points of 10 components in the plane; the guide is categorical for the label of
each point. Parameters are held fixed where the locations of the model are one standard deviation
off and the guide is the posterior under other locations. The table gives the sum of the variances
of all elements of the gradient::

    python examples/benchmarks/topk_variance.py --json variance.json --csv variance.csv
"""

import json

import pyro
import pyro.distributions as dist
import torch
from common import make_parser, write
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from tqdm import tqdm

from pyro_rb.diagnostics import gradient_moments
from pyro_rb.infer import RaoBlackwellTopK_ELBO
from support.command_line import run, set_up

NESTING = {"max_plate_nesting": 1}


class Mixture:
    """
    :param str guide: ``"tempered"`` or ``"misled"``.
    """

    def __init__(self, guide, num_points=200, num_components=10):
        locs = 4.0 * torch.randn(num_components, 2)
        labels = torch.randint(num_components, (num_points,))
        self.data = locs[labels] + torch.randn(num_points, 2)
        self.num_components = num_components
        self.locs, others = locs + torch.randn(2, num_components, 2)
        if guide == "tempered":
            self.logits = self.log_density(self.locs) / 3.3
        else:
            self.logits = self.log_density(others)

    def log_density(self, locs):
        return -0.5 * (self.data.unsqueeze(1) - locs).square().sum(-1)

    def model(self):
        locs = pyro.param("locs", self.locs)
        with pyro.plate("data", len(self.data)):
            z = pyro.sample("z", dist.Categorical(self.data.new_ones(self.num_components)))
            pyro.sample("x", dist.Normal(locs[z], 1.0).to_event(1), obs=self.data)

    def guide(self):
        with pyro.plate("data", len(self.data)):
            pyro.sample("z", dist.Categorical(logits=pyro.param("logits", self.logits)))


def topk(**options):
    return RaoBlackwellTopK_ELBO(**options, **NESTING)


def losses(num):
    """By name, the losses that evaluate the model at ``num`` values."""
    yield "mean of draws", Trace_ELBO(num_particles=num, vectorize_particles=True, **NESTING)
    yield "mean of draws, TraceGraph_ELBO", TraceGraph_ELBO(num_particles=num)
    yield "mean of draws, loo", topk(k=0, num_samples=num)
    for baseline in (None, "loo"):
        yield f"k = {num - 1}, {baseline}", topk(k=num - 1, baseline=baseline)
        if num > 2:
            yield f"k = 1, {baseline}", topk(num_samples=num - 1, baseline=baseline)
        yield f"budget, {baseline}", topk(budget=num, baseline=baseline)
    yield "budget, reinforce+", topk(budget=num - 1, baseline="reinforce+")


def main(args):
    set_up(args)
    torch.set_default_dtype(torch.float64)
    samples = 5 if args.smoke_test else args.num_samples
    results = {"num_samples": samples}
    for guide in ("tempered", "misled"):
        pyro.set_rng_seed(args.seed)
        case = Mixture(guide)
        confidence = case.logits.softmax(-1).max(-1).values.median().item()
        rows = {"median of the largest probability": round(confidence, 3)}
        for num in (2, 4):
            for name, elbo in tqdm(list(losses(num)), disable=args.smoke_test):
                pyro.clear_param_store()
                moments = gradient_moments(
                    elbo, case.model, case.guide, num_samples=samples, seed=1
                )
                variance = sum(m.variance.sum().item() for m in moments.values())
                rows.setdefault(name, {})[num] = float(f"{variance:.4g}")
        results[guide] = rows
        print(guide, json.dumps(rows, indent=1))
    columns = [(guide, num) for guide in ("tempered", "misled") for num in (2, 4)]
    rows = [
        {"": name, **{f"{guide}, {num}": results[guide][name].get(num, "") for guide, num in columns}}
        for name in list(results["tempered"])[1:]
    ]
    write(args, results, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of each gradient")
    run(main, parser)
