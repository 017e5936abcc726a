# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian logistic regression by guides of Pyro, and by RVRSGuide around them.

The data are 100 rows from each of three tables of scikit-learn (extra ``examples``): breast cancer, one kind of wine
against the others, and handwritten digits, 3 against 8. Features are standardized; weights have a standard normal
prior. All guides are trained for the same number of steps. RVRSGuide takes over a guide after half of them. The flow
is also trained by STLTrace_ELBO, with path gradients. With ``--dais 4 16`` annealed importance sampling by NumPyro's
AutoDAIS (extra ``benchmarks``) is fitted too, for as many steps::

    python examples/papers/rvrs/logistic.py --dais 4 16 --out logistic

The table gives the ELBO (for IWAE the bound of 8 draws that it maximizes), the share of the mean-field guide's
distance to the log evidence that is gone, the running mean of the acceptance, and the CPU time of all steps, which
are replayed. The log evidence comes from importance sampling with RVRSGuide's full-rank normal.
"""

import math
from functools import partial

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
)
from tqdm import tqdm

import pyro_rb
from pyro_rb.infer import RVRSGuide, STLTrace_ELBO
from support.bounds import elbo, importance_bound, log_weights, mean_of_draws
from support.command_line import make_parser, restart, run, set_up
from support.data import data_of
from support.results import cell, mean_and_error, report
from support.training import Clock, fit

TABLES = ("breast cancer", "wine", "digits")


def load_data(name, num_rows, seed):
    """Features ``[num_rows, num_features]``, labels ``[num_rows]``."""
    with data_of("scikit-learn"):
        from sklearn import datasets
    data = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    features, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    if name == "digits":
        is_kept = (labels == 3) | (labels == 8)
        features, labels = features[is_kept], labels[is_kept] == 8
    elif name == "wine":
        labels = labels == 1
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator, device="cpu")[:num_rows]
    features = features[rows]
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)  # some pixels are always off
    return features, labels[rows].float()


def make_model(features, labels):
    def model():
        zeros = features.new_zeros(features.shape[-1])
        weights = pyro.sample("weights", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("rows", len(labels)):
            logits = (features * weights).sum(-1)
            pyro.sample("label", dist.Bernoulli(logits=logits), obs=labels)

    return model


def make_flow(model):
    return AutoIAFNormal(model, hidden_dim=[64], num_transforms=2)


class Experiment:
    """All guides on one table, with one seed."""

    def __init__(self, args, features, labels, seed):
        self.args, self.seed, self.data = args, seed, (features, labels)
        self.model = make_model(features, labels)
        #: By guide: the ELBO, seconds, and the acceptance or None.
        self.found = {}

    def fit(self, name, guide, loss=None, part=1.0, lr=None):
        loss = Trace_ELBO() if loss is None else loss
        if not self.args.smoke_test:
            loss = pyro_rb.compile(loss, backend="replay")  # the same steps bit by bit, in less time
        lr = self.args.lr if lr is None else lr
        num_steps = math.ceil(part * self.args.num_steps)
        return fit(self.model, guide, loss, num_steps=num_steps, lr=lr, desc=name)

    def add(self, name, bound, seconds, acceptance=None):
        self.found[name] = bound[0], seconds, acceptance
        tqdm.write(f"{name}: {bound[0]:.3f} ± {bound[1]:.3f}, {seconds:.1f} s")

    def guide(self, name, make_guide, wanted=(), lr=None, make_loss=Trace_ELBO):
        """The guide, and around it RVRSGuide for each ``(Z_target, epsilon)`` wanted."""
        restart(self.seed)
        guide = make_guide(self.model)
        seconds = self.fit(name, guide, make_loss(), lr=lr)
        self.add(name, elbo(self.model, guide, self.args.num_samples), seconds)
        for target, epsilon in wanted:
            restart(self.seed)
            proposal = make_guide(self.model)
            title = f"RVRS of {name}, Z = {target}, ε = {epsilon:g}"
            seconds = self.fit(name, proposal, make_loss(), part=0.5, lr=lr)
            guide = RVRSGuide(self.model, proposal, Z_target=target, epsilon=epsilon)
            seconds += self.fit(title, guide, part=0.5, lr=self.args.lr_rvrs)
            self.add(title, guide.elbo(self.args.num_samples), seconds, guide.Z.item())
        return guide

    def iwae(self, num_particles=8):
        restart(self.seed)
        guide = AutoDiagonalNormal(self.model)
        loss = RenyiELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        name = f"IWAE of mean field, K = {num_particles}"
        seconds = self.fit(name, guide, loss)
        weights = log_weights(self.model, guide, self.args.num_samples)
        weights = weights[: len(weights) // num_particles * num_particles]
        bounds = importance_bound(weights.reshape(-1, num_particles), -1)
        self.add(name, mean_of_draws(bounds), seconds)

    def dais(self, num_steps_inside):
        """NumPyro compiles its whole loop, so that its time is not that of our steps."""
        from _dais import fit_dais

        best = -math.inf, math.nan
        for lr in self.args.lr_dais:
            with Clock() as clock:
                bound = fit_dais(*self.data, num_steps_inside, lr, self.args, self.seed)
            if bound[0] > best[0]:
                best, seconds = bound, clock.seconds
        self.add(f"DAIS of mean field, K = {num_steps_inside}", best, seconds)

    def run(self):
        """:return: the log evidence."""
        args = self.args
        wanted = [(target, args.epsilon) for target in args.Z_target]
        small = [(args.Z_target[-1], args.small_epsilon)]
        self.guide("mean field", AutoDiagonalNormal, wanted + small)
        self.iwae()
        for num_steps_inside in args.dais:
            self.dais(num_steps_inside)
        self.guide("flow", make_flow, wanted[:1], lr=args.lr_flow)
        self.guide("flow, STL", make_flow, wanted[:1], args.lr_flow, partial(STLTrace_ELBO, control_variate_scale=1.0))
        guide = self.guide("full-rank normal", AutoMultivariateNormal, wanted[:1])
        return importance_bound(log_weights(self.model, guide.guide, 10 * args.num_samples)).item()


def make_rows(table, found, evidence):
    """A row for each guide, means over seeds, from a list of what was found by each."""
    rows = []
    plain = [f["mean field"][0] for f in found]
    for name in found[0]:
        bounds, seconds, acceptance = zip(*(f[name] for f in found))
        closed = [1 - (evidence - b) / (evidence - p) for b, p in zip(bounds, plain)]
        rows.append({
            "table": table,
            "guide": name,
            "ELBO": cell(*mean_and_error(bounds)),
            "closed": "" if name == "mean field" else f"{sum(closed) / len(closed):.0%}",
            "acceptance": "" if None in acceptance else f"{sum(acceptance) / len(acceptance):.3f}",
            "CPU time, s": f"{sum(seconds) / len(seconds):.1f}",
        })
    return rows


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_steps, args.num_samples, args.seeds, args.tables = 4, 20, [0], ["digits"]
        args.Z_target = [0.3]
    rows, evidences = [], {}
    for table in args.tables:
        data = load_data(table, args.num_rows, 0)
        experiments = [Experiment(args, *data, seed) for seed in args.seeds]
        evidence = [experiment.run() for experiment in experiments]
        evidences[table] = evidence
        rows += make_rows(table, [e.found for e in experiments], sum(evidence) / len(evidence))
        report(args, rows, log_evidence=evidences)


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--num-rows", type=int, default=100)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--lr-flow", type=float, default=0.005)
    parser.add_argument("--lr-rvrs", type=float, default=0.005)
    parser.add_argument("--lr-dais", type=float, nargs="+", default=[0.01, 0.03], help="learning rates to try")
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--small-epsilon", type=float, default=1e-4, help="for another run with the last Z_target")
    parser.add_argument("--dais", type=int, nargs="*", default=[], help="numbers of steps of annealing")
    parser.add_argument("--num-samples", type=int, default=100_000, help="proposals from which the ELBO is estimated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    run(main, parser)
