# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What a loss of pyro_rb gains on models of other packages, if all losses train for the same CPU time.

Each loss has the best of three learning rates, chosen on a seed of its own. The table gives the loss of a trained guide
by ``Trace_ELBO`` in nats (less is better) as mean and standard error over other seeds, and how far it is below that of
the package's own loss, seed by seed. The first steps, in which compiled losses are captured,
are not timed. Packages that are not installed are left out::

    python examples/with_others/gains.py --out gains
"""

import importlib
from functools import partial

import torch
from common import command_line, report
from pyro import get_param_store
from pyro.infer import Trace_ELBO
from tqdm import tqdm

import pyro_rb
from pyro_rb.diagnostics.run.losses import make_loss, with_options
from support.results import cell, mean_and_error
from support.training import Run

COMPILED = ", compiled"
#: By name: script, function, arguments of it, the loss that the package or its examples use, learning rate.
PROBLEMS = {
    "TyXe, network 1-100-1": ("tyxe_network", {}, "TraceMeanField_ELBO", 0.01),
    "TyXe, network 1-50-50-1": ("tyxe_network", {"sizes": (1, 50, 50, 1)}, "TraceMeanField_ELBO", 0.01),
    "scvi-tools, AmortizedLDA": ("scvi_topics", {}, "TraceMeanField_ELBO", 0.01),
    "gpytorch, PyroGP": ("gpytorch_process", {}, "Trace_ELBO:retain_graph=True", 0.02),
    "chirho, treatment": ("chirho_counterfactual", {}, "Trace_ELBO", 0.02),
}


def find_problems():
    """By name: a function that returns model, guide and arguments; the usual loss, and the learning rate."""
    found = {}
    for name, (script, options, usual, lr) in PROBLEMS.items():
        try:
            found[name] = partial(importlib.import_module(script).make, **options), usual, lr
        except ImportError as error:
            tqdm.write(f"{name} is left out: {error}")
    return found


class Training(Run):
    """
    :param str name: of the loss, with ``", compiled"`` if it is.
    """

    backend, num_first, num_draws = "inductor", 30, 200

    def __init__(self, make, name, lr, seed):
        def start():
            model, guide, self.data = make()
            return model, guide

        loss = make_loss(name.removesuffix(COMPILED))
        super().__init__(start, loss, {"lr": lr}, seed)
        if name.endswith(COMPILED):
            loss = pyro_rb.compile(loss, self.backend, background=False)
            self.svi = pyro_rb.CompiledSVI(self.model, self.guide, self.svi.optim, loss)
        self.num_steps = 0

    def train(self, seconds):
        """
        :return: the loss of the trained guide.
        """
        self.go_on(self.num_first)
        first, self.num_steps = self.seconds, 0
        while self.seconds - first < seconds:
            self.go_on(5)
        elbo = Trace_ELBO(num_particles=self.num_draws)
        with torch.no_grad(), get_param_store().scope(self.store):
            value = elbo.loss(self.model, self.guide, *self.data)
        return value if value == value else float("inf")

    def go_on(self, num_steps):
        self.epoch(lambda: [self.data] * num_steps)
        self.num_steps += num_steps


def measure(make, usual, lr, args):
    """By loss: its learning rate, losses of trained guides by seed, and the mean number of steps."""
    names = [usual, *(with_options(name, usual) for name in args.loss)]
    found = {}
    for name in [*names, *(n + COMPILED for n in names)]:
        rates = [lr * factor for factor in args.factors]
        tries = {rate: Training(make, name, rate, args.seed).train(args.seconds) for rate in rates}
        best = min(tries, key=tries.get)
        runs = [Training(make, name, best, args.seed + i) for i in range(1, args.num_seeds + 1)]
        values = [run.train(args.seconds) for run in runs]
        found[name] = best, values, sum(run.num_steps for run in runs) / len(runs)
    return found


def rows_of(problem, found):
    usual = next(iter(found.values()))[1]
    for name, (lr, values, num_steps) in found.items():
        below = [a - b for a, b in zip(usual, values)]
        yield {
            "model": problem,
            "loss": name,
            "learning rate": f"{lr:.3g}",
            "steps": round(num_steps),
            "loss after training": cell(*mean_and_error(values)),
            "below": cell(*mean_and_error(below)) if values is not usual else "",
        }


def main(args):
    command_line.set_up(args)
    if args.smoke_test:
        args.seconds, args.num_seeds, args.factors, args.loss = 1e-3, 1, [1.0], ["STLTrace_ELBO"]
        Training.backend, Training.num_first, Training.num_draws = "replay", 3, 2
    rows, values = [], {}
    for problem, settings in tqdm(find_problems().items(), disable=args.smoke_test):
        if args.model not in problem:
            continue
        found = measure(*settings, args)
        values[problem] = {name: one[1] for name, one in found.items()}
        rows += rows_of(problem, found)
    report(args, rows, values=values)


if __name__ == "__main__":
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--loss", nargs="+", default=["RaoBlackwell_ELBO"], help="losses beside the usual one")
    parser.add_argument("--model", default="", help="run only models with this in the name")
    parser.add_argument("--seconds", type=float, default=6.0, help="of CPU time for each run")
    parser.add_argument("--num-seeds", type=int, default=4, help="seeds beside the one for the choice")
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 1.0, 3.0], help="times the learning rate")
    command_line.run(main, parser)
