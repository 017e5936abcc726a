# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Trains, and measures losses on the way: :class:`Study`."""

import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_rb.diagnostics.compare.chooser import Chooser
from pyro_rb.diagnostics.compare.measure import Plan, ReferenceFailed, measure
from pyro_rb.diagnostics.compare.measurement import Gauge, find_signal, steps_ratios
from pyro_rb.diagnostics.compare.report import StateResult, TrainingWindow
from pyro_rb.diagnostics.guard.guard import GradientGuard, NonFiniteError
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.effect import find_effect
from pyro_rb.diagnostics.run.losses import (
    ENUMERATED,
    Losses,
    is_elbo,
    make_loss,
    make_losses,
    with_options,
)
from pyro_rb.diagnostics.run.messages import WarningLog, one_line
from pyro_rb.diagnostics.run.problem import Problem
from pyro_rb.diagnostics.run.sampler import GradientSampler
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.mean_test import rounding_error, z_threshold
from pyro_rb.diagnostics.stats.progress import noise_share, root_sum_of_squares
from pyro_rb.diagnostics.stats.projections import Projector
from pyro_rb.diagnostics.stats.stopping import StopRule
from pyro_rb.infer.generators import seed_generators

NUM_WINDOWS = 50
#: How far to train, where nothing is said and the loss falls on.
MOST_STEPS, MOST_SECONDS = 2000, 20.0


@dataclass
class Study:
    """
    What :func:`~pyro_rb.diagnostics.compare.compare.compare` does with a prepared problem.

    :param Problem problem: Model and guide.
    :param str reference: Name of the reference.
    :param losses: What it is compared to, and maybe the reference itself.
    :param bool scored: Whether the guide has sites without a reparameterized draw.
    :param bool exact: Whether to compare to the exact gradient.
    :param list steps: After how many training steps to measure. None: before training, and when a
        :class:`~pyro_rb.diagnostics.stats.stopping.StopRule` says that the loss falls no more, or
        after :data:`MOST_STEPS` or :data:`MOST_SECONDS`.
    :param PyroOptim optim: For the training.
    :param Plan plan: How long to sample at one state; its deadline is that of all.
    """

    problem: Problem
    reference: str
    losses: Losses
    scored: bool
    exact: bool
    steps: Optional[Sequence[int]]
    optim: PyroOptim
    plan: Plan
    seed: int
    failure_rate: float
    bar: TimedBar
    warned: WarningLog
    states: List[StateResult] = field(default_factory=list)
    training: List[float] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    threshold: float = 0.0
    interrupted: bool = False
    error: Optional[str] = None

    def run(self) -> None:
        """
        Fills ``states``, ``training`` and ``notes``.

        :raises ValueError: If training or the reference fails before anything was measured. Later,
            ``error`` says so.
        """
        trainer = self.problem.sampler(make_loss(self.reference))
        try:
            steps = [0, MOST_STEPS] if self.steps is None else self.steps
            for index, step in enumerate(steps):
                seed_generators((self.seed + len(self.training)) % 2**32)
                self.bar.start()
                rule = StopRule() if self.steps is None else None
                end = time.perf_counter() + MOST_SECONDS
                while len(self.training) < step:
                    self._train(trainer)
                    if rule and (rule.update(self.training[-1]) or time.perf_counter() > end):
                        self.bar.counts["step"] = len(self.training)
                        break
                if rule and self.training:
                    how = "until the loss fell no more" if rule.stopped else "where it may have been falling still"
                    self.notes.append(f"Trained for {len(self.training)} steps, {how}; train_steps sets the number.")
                self._measure(len(self.training), len(steps) - index)
                if self.interrupted or self.error:
                    return
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:
            if not self.states:
                raise
            self.error = str(error) if isinstance(error, ValueError) else one_line(error)

    @property
    def is_whole(self) -> bool:
        """Whether all that was asked for is measured."""
        return bool(self.states) and not self.interrupted and not self.error

    def made(self) -> Dict[str, Any]:
        """New losses by name, the reference first: what a loss has learned belongs to one state."""
        made = {self.reference: make_loss(self.reference), **make_losses(self.losses)}
        return {**made, self.reference: make_loss(self.reference)}

    def explanations(self) -> List[str]:
        """Reasons for results that would surprise."""
        jacobians = self.problem.sites.jacobians
        biased = {row.name for state in self.states for row in state.losses if row.biased}
        found = []
        for name, loss in make_losses(self.losses).items():
            if name in biased and jacobians and isinstance(loss, TraceMeanField_ELBO):
                found.append(
                    f"{name} is biased on this guide: Pyro's KL divergence of a Delta leaves out its "
                    f"log_density, here the Jacobian of {', '.join(map(repr, jacobians))}."
                )
            if name in biased and is_elbo(loss) and loss.vectorize_particles and loss.num_particles > 1:
                reason = Chooser(self.problem).not_vectorized(loss) or "a sum over all dimensions mixes the particles"
                found.append(
                    f"{name}: vectorized particles add a dimension on the left of all plates, which the model has to "
                    f"leave alone. Does it? A likely cause: {reason}."
                )
        return found

    def windows(self) -> List[TrainingWindow]:
        """The losses of training, summed up."""
        size = max(1, -(-len(self.training) // NUM_WINDOWS))
        found = []
        for start in range(0, len(self.training), size):
            part = torch.tensor(self.training[start : start + size], dtype=torch.double, device="cpu")
            deviation = part.std().item() if len(part) > 1 else None
            found.append(
                TrainingWindow(start + len(part), len(part), part.mean().item(), deviation)
            )
        return found

    def _train(self, trainer: GradientSampler) -> None:
        try:
            self.training.append(trainer.train(self.optim))
        except Exception as error:
            raise ValueError(
                f"training with {self.reference} failed at step {len(self.training) + 1}: {one_line(error)}"
            ) from error
        self.bar.update("step")

    def _measure(self, step: int, states_left: int) -> None:
        made = self.made()
        # Other random numbers at each state, so that each tests bias anew.
        at = (self.seed + step) % 2**32
        tensors = list(self.problem.parameters.values())
        coordinates = Coordinates(list(self.problem.parameters), tensors, find_effect(self.problem, at))
        self._note(coordinates, sum(tensor.numel() for tensor in tensors))
        exact = self._exact_gradient(coordinates) if self.exact else None
        projector = Projector(coordinates) if self.scored else None
        gauges = [Gauge(n, self.problem.sampler(loss), coordinates, projector) for n, loss in made.items()]
        plan = self.plan._replace(deadline=self._deadline(step, states_left))
        self.bar.start()
        try:
            stopped = measure(gauges, plan, at, self.bar, self.warned)
        except ReferenceFailed as failure:
            when = f" after {step} training steps (too large a learning rate?)" if step else ""
            count = gauges[0].moments.count
            self.error = (
                f"{self.reference}, to which all losses are compared, failed on this model and guide"
                f"{when}, in draw {count + 1}: {failure}{self._blame(failure.seed)}"
            )
            if count < 2 and not self.states:
                raise ValueError(self.error) from failure.cause
            stopped = "failed"
        if gauges[0].moments.count < 2:
            self.interrupted = stopped == "interrupted"
            return
        try:
            if stopped not in ("failed", "interrupted"):
                for gauge in gauges:
                    if gauge.failure is None:
                        gauge.measure_memory(at)
                        self.warned.collect(gauge.name)
        except KeyboardInterrupt:
            self.interrupted = True
        self._add_state(gauges, step, stopped, exact)
        self.interrupted |= stopped == "interrupted"

    def _note(self, coordinates: Coordinates, total: int) -> None:
        used = sum(coordinates.sizes)
        notes = []
        if used < total:
            notes.append(
                f"{total - used} of {total} parameter values are left out: at the present parameters "
                "the model does not depend on them."
            )
        if coordinates.is_subset:
            notes.append(f"Measured on {sum(coordinates.counts)} of {used} parameter values, drawn at random.")
        self.notes += [note for note in notes if note not in self.notes]

    def _blame(self, seed: int) -> str:
        """Where the first bad number of a gradient begins, if one can be found."""
        one = self.problem.sampler(GradientGuard(make_loss(self.reference)))
        seed_generators(seed)
        try:
            one.step()
        except NonFiniteError as error:
            rare = "GradientGuard(..., on_bad='skip') trains past it where that is rare"
            return f". First bad number: {error.bad}. {rare}" if error.bad else ""
        except Exception:  # that is the failure itself, and no bad number
            pass
        finally:
            one.clear()
        return ""

    def _add_state(
        self, gauges: List[Gauge], step: int, stopped: str, exact: Optional[Tensor]
    ) -> None:
        first, count = gauges[0], gauges[0].moments.count
        coordinates, projector = first.coordinates, first.draws.projector
        size = len(first.moments.mean) if projector is None else len(projector)
        num_tests = size * max(1, len(gauges) - 1) * (2 if self.steps is None else len(self.steps))

        def threshold(gauge: Gauge) -> float:
            count = max(2, gauge.moments.count)
            z = z_threshold(self.failure_rate, num_tests, count)
            # Beyond the root of their number, a few skewed draws that happen to be alike have scores
            # that no correction mends: of a million coordinates some have, with 40 draws.
            return z * max(1.0, z**2 / count)

        self.threshold = max(self.threshold, threshold(first))
        results = [gauge.result(first, threshold(gauge), exact) for gauge in gauges]
        if results[0].biased:
            self.notes.append(
                f"{self.reference} disagrees with enumeration at step {step} (z = "
                f"{results[0].bias_z:.1f}), so the losses were compared to it instead."
            )
            exact = None
            results = [gauge.result(first, threshold(gauge)) for gauge in gauges]
        unbiased = [g for g, row in zip(gauges, results) if not row.biased and not row.error]
        signal = find_signal(unbiased) if exact is None else coordinates.sums(exact.square())
        ratios = steps_ratios([gauge for gauge in gauges if gauge.failure is None], signal)
        for row in results:
            if not row.error:
                row.steps_ratio, row.steps_ratio_blocks = ratios[row.name]
                row.steps_ratio_error = root_sum_of_squares(row.steps_ratio_blocks)
        share = noise_share(first.blocks(), signal, coordinates.sizes)
        self.states.append(StateResult(step, results, count, stopped, share))

    def _deadline(self, step: int, states_left: int) -> Optional[float]:
        """An equal share of the time that is left, but for the training that is to come."""
        if self.plan.deadline is None:
            return None
        now = time.perf_counter()
        seconds = self.states[-1].losses[0].seconds if self.states else None
        last = MOST_STEPS if self.steps is None else self.steps[-1]
        training = min((last - step) * (seconds or 0.0), self.plan.deadline - now if self.steps else MOST_SECONDS)
        return now + max(0.0, self.plan.deadline - now - training) / states_left

    def _exact_gradient(self, coordinates: Coordinates) -> Optional[Tensor]:
        """
        The gradient by enumeration of the guide, ``[Q]``; None if it is not the same at each
        evaluation, for example because data are subsampled, or cannot be had.
        """
        found: List[Tensor] = []
        for seed in range(3):
            one = self.problem.sampler(make_loss(with_options(ENUMERATED, self.reference)))
            seed_generators(seed)
            try:
                one.step()
            except Exception as error:
                one.clear()
                self.notes.append(f"No exact gradient, enumeration failed: {one_line(error)}")
                return None
            found.append(coordinates.vector(one.collect()))
        largest = max(vector.abs().max().item() for vector in found)
        rounding = rounding_error(largest, found[0].dtype)
        spread = (torch.stack(found) - found[0]).abs().max().item()
        return found[0].double() if spread <= rounding else None
