# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Training by RaoBlackwell_ELBO and by losses that treat all sites alike, for the same time.

Each loss has a learning rate of its own: at the first seed it is trained at each of three, from the
same start, and the best is taken for the other seeds. Runs take turns. The objective is evaluated
from time to time, as a function of the CPU time of the training steps: with the same random numbers
for all losses, and with discrete sites summed out. What counts is the mean of the last three
values::

    python examples/papers/rao_blackwell/training.py --out training

The table gives the objective in nats (a loss: less is better) as mean and standard error over
seeds, and how far above that of RaoBlackwell_ELBO it is, seed by seed. Differences under 3 standard
errors are noise.
"""

import _path  # noqa: F401
import pyro
import torch

from support.command_line import make_parser, run, set_up
from support.mixed_models import PROBLEMS, mark
from support.results import cell, make_panels, mean_and_error, report
from support.training import TimedRun, set_fast_floats, train_tuned

FACTORS = (1 / 3, 1.0, 3.0)  # of the model's learning rate
OURS = "RaoBlackwell_ELBO"
#: CPU seconds of a training run.
SECONDS = {
    "semi-supervised": 6.0,
    "mixture": 3.0,
    "regression": 3.0,
    "binary": 3.0,
    "network": 3.0,
    "network with BatchNorm": 3.0,
    "schools": 2.0,
    "hidden Markov": 3.0,
}


class Training(TimedRun):
    """A run that notes the objective along its time."""

    num_last, num_draws = 3, 5

    def __init__(self, problem, name, factor, seed, limit):
        def make():
            model, guide = problem.make()
            return model, mark(name, guide)

        loss = {**problem.single(), **problem.ours()}[name]()
        super().__init__(make, loss, {"lr": factor * problem.lr}, seed, limit)
        self.problem = problem
        self.note()

    def batch(self):
        return self.problem.batch(self.num_steps)

    def note(self):
        with pyro.get_param_store().scope(self.store):
            value = self.problem.objective(self.model, self.guide, self.num_draws)
        self.notes.append((self.seconds, self.num_steps, value))

    @property
    def result(self):
        """Infinite for a run that has gone astray."""
        values = torch.tensor([value for _, _, value in self.notes[-self.num_last:]])
        return values.mean().nan_to_num(nan=torch.inf).item()


def train(name, args):
    """By loss, the factor of its learning rate, and a run for each seed."""
    problem, seconds = PROBLEMS[name], args.seconds or SECONDS[name]
    losses = [*problem.ours(), *problem.single()]
    for loss in losses:  # what the first steps import is not to count
        first = Training(problem, loss, 1.0, args.seeds[0], seconds)
        first.epoch(first.make_batches)

    def make_run(loss, factor, seed):
        return Training(problem, loss, factor, seed, seconds)

    return train_tuned(make_run, losses, args.factors, args.seeds, Training.num_notes)


def rows_of(name, found):
    ours = [run.result for run in found[OURS][1]]
    for loss, (factor, runs) in found.items():
        results = [run.result for run in runs]
        above = [result - mine for result, mine in zip(results, ours)]
        yield {
            "model": PROBLEMS[name].title,
            "loss": loss,
            "learning rate": f"{factor * PROBLEMS[name].lr:.3g}",
            "steps": round(sum(run.num_steps for run in runs) / len(runs)),
            "objective": cell(*mean_and_error(results)),
            "above": "" if loss == OURS else cell(*mean_and_error(above)),
        }


def draw(everything):
    fig, axes = make_panels(-(-len(everything) // 3), min(3, len(everything)))
    for ax, (name, found) in zip(axes, everything.items()):
        for loss, (_, runs) in found.items():
            seconds, _, values = torch.tensor([run.notes for run in runs]).mean(0).T
            ax.plot(seconds, values, label=loss)
        ax.set(title=PROBLEMS[name].title, xlabel="CPU seconds", ylabel="objective")
        ends = [run.result for _, runs in found.values() for run in runs]
        ax.set_ylim(top=max(ends) + (max(ends) - min(ends)))
        ax.legend(fontsize="x-small")
    return fig


def main(args):
    set_up(args)
    set_fast_floats()
    if args.smoke_test:
        args.seeds, args.factors, args.seconds = [0], [1.0], 1e-3
        Training.num_notes = Training.num_draws = 1
        args.models = args.models or ["mixture", "schools"]
    everything = {name: train(name, args) for name in args.models or PROBLEMS}
    rows = [row for name, found in everything.items() for row in rows_of(name, found)]
    curves = {
        name: {loss: [run.notes for run in runs] for loss, (_, runs) in found.items()}
        for name, found in everything.items()
    }
    report(args, rows, lambda: draw(everything), curves=curves)


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), help="default: all")
    parser.add_argument("--seconds", type=float, help="time of a training run; default: 2 to 6, by model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training runs")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="times the model's learning rate")
    run(main, parser)
