# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Trains with each loss for equal time, from the same start: :func:`race`."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.problem import Problem
from pyro_rb.diagnostics.run.sampler import choose_clock
from pyro_rb.diagnostics.stats.mean_test import z_threshold
from pyro_rb.infer.generators import seed_generators

#: From which the learning rate of each loss is chosen, with Adam.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
NUM_SEEDS, NUM_POINTS, NUM_EVALUATIONS = 3, 8, 30


@dataclass
class Curve:
    """
    Training with one loss.

    :param str name: The loss.
    :param float learning_rate: The best of those that were tried.
    :param list seconds: Training time at each point.
    :param list steps: Steps until then, the mean over seeds.
    :param list losses: The loss of the reference at each point, a list for each seed, in nats. NaN
        from the point at which a training failed.
    :param str error: Why a training failed, if one did.
    """

    name: str
    learning_rate: float
    seconds: List[float] = field(default_factory=list)
    steps: List[float] = field(default_factory=list)
    losses: List[List[float]] = field(default_factory=list)
    error: Optional[str] = None

    @property
    def final(self) -> float:
        """The mean loss at the end."""
        values = [curve[-1] for curve in self.losses if curve]
        return sum(values) / len(values) if values else math.nan


@dataclass
class Race:
    """
    What :func:`race` has found. Prints as a sentence.

    :param list curves: A :class:`Curve` for each loss, the reference first.
    :param float seconds: Training time of each loss and seed.
    :param str winner: The loss that ends lower than the others by more than chance; None if no difference is seen.
    :param float margin: By how many nats the best loss ends below the reference, or below the second if the
        reference is the best.
    :param float margin_error: The standard error of that.
    """

    curves: List[Curve]
    seconds: float
    winner: Optional[str] = None
    margin: float = 0.0
    margin_error: float = math.nan

    def __str__(self) -> str:
        if self.winner is None:
            return f"Trained for {self.seconds:.3g} s each: no difference seen."
        return (
            f"Trained for {self.seconds:.3g} s each: {self.winner} ends lowest, by {self.margin:.3g} +/- "
            f"{self.margin_error:.2g} nats."
        )


class Training:
    """One training: its parameters, optimizer, loss and random numbers, to be taken up again."""

    def __init__(self, problem: Problem, loss: Any, optim: Any, learning_rate: float, seed: int) -> None:
        self.problem = problem
        self.sampler = problem.sampler(copy.deepcopy(loss))
        options = {**(optim.pt_optim_args if isinstance(optim.pt_optim_args, dict) else {}), "lr": learning_rate}
        self.optim = PyroOptim(optim.pt_optim_constructor, options, optim.pt_clip_args)
        self.tensors = trained_tensors(problem)
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.seed = seed
        self.seconds, self.num_steps = 0.0, 0
        self.error: Optional[str] = None
        self.curve: List[float] = []

    def train(self, until: float) -> None:
        """Goes on until that much time was spent in all."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.values):
                tensor.copy_(value)
        seed_generators((self.seed * 1000003 + self.num_steps) % 2**32)
        clock = choose_clock(self.sampler.tensors)
        start = clock() - self.seconds
        try:
            while self.seconds < until and self.error is None:
                if not math.isfinite(self.sampler.train(self.optim)):
                    self.error = f"the loss was not finite in step {self.num_steps + 1}"
                self.num_steps += 1
                self.seconds = clock() - start
        except Exception as error:
            self.sampler.clear()
            self.error = one_line(error)
        self.values = [tensor.detach().clone() for tensor in self.tensors]

    def evaluate(self, judge: Any, num_evaluations: int) -> float:
        """The mean loss by the reference, with the same random numbers for all; right after training."""
        values = self.draw(judge, num_evaluations)
        return sum(values) / len(values)

    def draw(self, judge: Any, num_draws: int) -> List[float]:
        """Values of a loss, with the same random numbers for all; right after training."""
        if self.error is not None:
            return [math.nan] * num_draws
        values = []
        for number in range(num_draws):
            seed_generators(number)
            with torch.no_grad():
                value = judge.loss.loss(*judge.call, **judge.kwargs)
            values.append(float(value))
        return values


def race(
    problem: Problem,
    reference: str,
    losses: Sequence[str],
    made: Dict[str, Any],
    optim: PyroOptim,
    seconds: float,
    bar: TimedBar,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_seeds: int = NUM_SEEDS,
) -> Race:
    """
    Trains with each loss for the same time. First a quarter of it with each learning rate, of which the
    best is taken; then with several seeds, in turns, so that what else the machine does hits all alike.

    :param dict made: Losses by name.
    :param float seconds: For each loss and seed; the time for evaluations is not counted.
    """
    judge = problem.sampler(make_loss(reference))
    names = [reference, *(name for name in losses if name != reference)]
    begin = Training(problem, make_loss(reference), optim, 1.0, 0)
    curves = []
    for name in names:
        rate, error = choose_learning_rate(begin, made[name], optim, seconds / 4, judge, bar, learning_rates)
        curves.append(Curve(name, rate, error=error))
    runs = {
        curve.name: [
            Training(problem, made[curve.name], optim, curve.learning_rate, seed + 1) for seed in range(num_seeds)
        ]
        for curve in curves
        if curve.error is None
    }
    for point in range(1, NUM_POINTS + 1):
        for seed in range(num_seeds):
            for name, listed in runs.items():
                run = listed[seed]
                run.train(seconds * point / NUM_POINTS)
                run.curve.append(run.evaluate(judge, NUM_EVALUATIONS))
                bar.update("training")
        for curve in curves:
            if curve.name in runs:
                listed = runs[curve.name]
                curve.seconds.append(seconds * point / NUM_POINTS)
                curve.steps.append(sum(run.num_steps for run in listed) / num_seeds)
                curve.losses = [run.curve for run in listed]
                curve.error = next((run.error for run in listed if run.error), None)
    begin.train(0.0)
    return _judged(curves, seconds)


def choose_learning_rate(
    begin: Training,
    loss: Any,
    optim: PyroOptim,
    seconds: float,
    judge: Any,
    bar: TimedBar,
    learning_rates: Sequence[float],
) -> Tuple[float, Optional[str]]:
    """
    Trains with each learning rate from the same start, which is where it ends.

    :param Training begin: One that has made no step.
    :param float seconds: For each.
    :param judge: What evaluates.
    :returns: The best of them, and why none is good, if so.
    """
    best, rate, error = math.inf, learning_rates[0], None
    for learning_rate in learning_rates:
        begin.train(0.0)  # back to the start
        run = Training(begin.problem, loss, optim, learning_rate, 0)
        run.train(seconds)
        value, error = run.evaluate(judge, NUM_EVALUATIONS), run.error or error
        if value < best:
            best, rate = value, learning_rate
        bar.update("training")
    begin.train(0.0)
    return rate, None if best < math.inf else error


def _judged(curves: List[Curve], seconds: float) -> Race:
    """Who has won: the differences of seeds must exceed chance, by Student's t at 5 % over all losses."""
    found = Race(curves, seconds)
    sound = [curve for curve in curves if curve.error is None and math.isfinite(curve.final)]
    if len(sound) < 2:
        return found
    ranked = sorted(sound, key=lambda curve: curve.final)
    best, rival = ranked[0], (sound[0] if ranked[0] is not sound[0] else ranked[1])
    pairs = zip(best.losses, rival.losses)
    differences = torch.tensor([b[-1] - a[-1] for a, b in pairs], dtype=torch.double, device="cpu")
    if len(differences) < 2:
        return found
    found.margin = differences.mean().item()
    found.margin_error = (differences.std() / len(differences) ** 0.5).item()
    if found.margin > z_threshold(0.05, len(sound) - 1, len(differences)) * found.margin_error:
        found.winner = best.name
    return found


def trained_tensors(problem: Problem) -> List[Tensor]:
    """Parameters, and buffers of modules, which training changes as well."""
    buffers = [
        tensor
        for root in problem.snapshot.roots
        for module in [getattr(root, "__self__", root)]
        if isinstance(module, torch.nn.Module)
        for tensor in module.buffers()
    ]
    return [*problem.parameters.values(), *buffers]
