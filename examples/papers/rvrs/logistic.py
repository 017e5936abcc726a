# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian logistic regression by guides of Pyro, and by RVRSGuide around them.

The data are 100 rows of the breast cancer data of scikit-learn (extra ``examples``), with
all 30 features standardized; weights have a standard normal prior. All guides are trained
for the same number of steps. RVRSGuide takes over a guide after half of them::

    python examples/papers/rvrs/logistic.py --out logistic

Given are the ELBO (for IWAE the bound of 8 draws that it maximizes), the running mean of
the acceptance, and the CPU time of all steps. The log evidence is that of importance
sampling from the full-rank normal.
"""

import math

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
)

from pyro_rb.infer import RVRSGuide
from support.bounds import elbo, log_weights, mean_of_draws
from support.command_line import make_parser, restart, run, set_up
from support.data import data_of
from support.results import report
from support.training import fit


def load_data(num_rows, seed):
    """Features ``[num_rows, 30]``, labels ``[num_rows]``."""
    with data_of("scikit-learn"):
        from sklearn.datasets import load_breast_cancer
    data = load_breast_cancer()
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randperm(len(data.target), generator=generator, device="cpu")[:num_rows].numpy()
    features = torch.tensor(data.data[rows], dtype=torch.float32)
    features = (features - features.mean(0)) / features.std(0)
    return features, torch.tensor(data.target[rows], dtype=torch.float32)


def make_model(features, labels):
    def model():
        zeros = features.new_zeros(features.shape[-1])
        weights = pyro.sample("weights", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("rows", len(labels)):
            logits = (features * weights).sum(-1)
            pyro.sample("label", dist.Bernoulli(logits=logits), obs=labels)

    return model


class Experiment:
    def __init__(self, args, model):
        self.args = args
        self.model = model
        self.rows = []

    def fit(self, name, guide, loss=None, part=1.0, lr=None):
        lr = self.args.lr if lr is None else lr
        num_steps = math.ceil(part * self.args.num_steps)
        return fit(self.model, guide, loss, num_steps=num_steps, lr=lr, desc=name)

    def add(self, name, bound, seconds, acceptance=None):
        row = {"guide": name, "ELBO": f"{bound[0]:.3f}", "standard error": f"{bound[1]:.3f}"}
        row["acceptance"] = "" if acceptance is None else f"{acceptance:.3f}"
        row["CPU time, s"] = f"{seconds:.1f}"
        self.rows.append(row)

    def guide(self, name, make_guide, wanted=(), lr=None):
        """The guide, and around it RVRSGuide for each ``(Z_target, epsilon)`` wanted."""
        restart(self.args.seed)
        guide = make_guide(self.model)
        seconds = self.fit(name, guide, lr=lr)
        self.add(name, elbo(self.model, guide, self.args.num_samples), seconds)
        for target, epsilon in wanted:
            restart(self.args.seed)
            proposal = make_guide(self.model)
            title = f"RVRS of {name}, Z = {target}, ε = {epsilon:g}"
            seconds = self.fit(name, proposal, part=0.5, lr=lr)
            rvrs = RVRSGuide(self.model, proposal, Z_target=target, epsilon=epsilon)
            seconds += self.fit(title, rvrs, part=0.5, lr=self.args.lr_rvrs)
            bound = rvrs.elbo(self.args.num_samples)
            self.add(title, bound, seconds, rvrs.Z.item())
        return guide

    def iwae(self, num_particles=8):
        restart(self.args.seed)
        guide = AutoDiagonalNormal(self.model)
        loss = RenyiELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        name = f"IWAE of mean field, K = {num_particles}"
        seconds = self.fit(name, guide, loss)
        weights = log_weights(self.model, guide, self.args.num_samples)
        weights = weights[: len(weights) // num_particles * num_particles]
        bound = weights.reshape(-1, num_particles).logsumexp(-1) - math.log(num_particles)
        self.add(name, mean_of_draws(bound), seconds)


def make_flow(model):
    return AutoIAFNormal(model, hidden_dim=[64], num_transforms=2)


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_steps, args.num_samples = 20, 200
    model = make_model(*load_data(args.num_rows, args.seed))
    experiment = Experiment(args, model)
    wanted = [(target, args.epsilon) for target in args.Z_target]
    small = [(args.Z_target[-1], args.small_epsilon)]
    experiment.guide("mean field", AutoDiagonalNormal, wanted + small)
    experiment.iwae()
    guide = experiment.guide("full-rank normal", AutoMultivariateNormal, wanted[:1])
    weights = log_weights(model, guide, 10 * args.num_samples)
    experiment.guide("autoregressive flow", make_flow, lr=args.lr_flow)
    report(
        args,
        experiment.rows,
        log_evidence=round(weights.logsumexp(0).item() - math.log(len(weights)), 3),
        effective_sample_size=round(1 / weights.softmax(0).square().sum().item()),
    )


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-rows", type=int, default=100)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--lr-flow", type=float, default=0.005)
    parser.add_argument("--lr-rvrs", type=float, default=0.005)
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--small-epsilon", type=float, default=1e-4, help="for the last Z_target once more")
    parser.add_argument("--num-samples", type=int, default=100_000, help="of which the ELBO is estimated")
    run(main, parser)
