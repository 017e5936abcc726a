# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Measures one loss at one state of the parameters: :class:`Gauge`."""

import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from pyro_rb.diagnostics.compare.report import LossResult
from pyro_rb.diagnostics.run.memory import peak_memory
from pyro_rb.diagnostics.run.sampler import GradientSampler, choose_clock
from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.bias import Draws, Verdict, judge
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.moments import RunningMoments
from pyro_rb.diagnostics.stats.progress import root_sum_of_squares, steps_ratio
from pyro_rb.diagnostics.stats.projections import Projector
from pyro_rb.infer.generators import seed_generators


class Draw(NamedTuple):
    vector: Tensor  # one gradient, as far as it is followed: [Q]
    seconds: float
    loss: float


class Gauge:
    """
    Measures one loss at one state.

    :param str name: The loss.
    :param GradientSampler sampler: Draws its gradients.
    :param Coordinates coordinates: What is followed of them.
    :param Projector projector: See :mod:`~pyro_rb.diagnostics.stats.bias`.
    """

    def __init__(
        self,
        name: str,
        sampler: GradientSampler,
        coordinates: Coordinates,
        projector: Optional[Projector] = None,
    ) -> None:
        self.name = name
        self.sampler = sampler
        self.coordinates = coordinates
        self.failure: Optional[str] = None
        self.is_dropped = False
        self.moments = RunningMoments()
        self.draws = Draws(coordinates, projector)  # for the test of bias
        self.losses = RunningMoments()
        self.bad_losses = 0
        self.seconds: List[float] = []
        self.deviations: List[float] = []  # of each gradient from the mean, squared
        self.block = RunningMoments()
        self.block_variances: List[Tensor] = []  # each [number of parameters]
        self.cuda = any(tensor.is_cuda for tensor in sampler.tensors)
        self.clock = choose_clock(sampler.tensors)
        self.memory: Optional[int] = None

    @property
    def is_live(self) -> bool:
        """Whether it is measured any further."""
        return self.failure is None and not self.is_dropped

    def draw(self, seed: int) -> Draw:
        """
        :raises ValueError: If the gradient is not finite.
        """
        seed_generators(seed)
        self._wait()
        start = self.clock()
        loss = self.sampler.step()
        self._wait()
        seconds = self.clock() - start
        gradients = self.sampler.collect()
        for name, gradient in zip(self.sampler.names, gradients):
            if not gradient.isfinite().all():
                raise ValueError(f"the gradient of {name!r} is not finite")
        return Draw(self.coordinates.vector(gradients), seconds, loss)

    def update(self, draw: Draw, reference: Draw) -> None:
        """Adds one draw of this loss and one of the reference."""
        self.seconds.append(draw.seconds)
        if math.isfinite(draw.loss):
            self.losses.update(torch.tensor(draw.loss, dtype=torch.double, device="cpu"))
        else:
            self.bad_losses += 1
        self.deviations.append(self.block.update(draw.vector).item())
        self.draws.add(draw.vector - reference.vector if self.draws.projector is None else draw.vector)

    def measure_memory(self, seed: int) -> None:
        """Of one more step."""
        seed_generators(seed)
        try:
            self.memory = peak_memory(self.sampler.step, self.sampler.tensors[0].device)
        except Exception:  # an operation that cannot be followed is no reason to stop
            pass
        finally:
            self.sampler.clear()

    def end_block(self) -> None:
        if self.block.count > 1:
            self.block_variances.append(self.coordinates.sums(self.block.variance))
        self.moments.merge(self.block)
        self.block = RunningMoments()

    def ratio_to(self, reference: "Gauge") -> Tuple[float, float]:
        """Of the total variances, with its standard error."""
        blocks = self.blocks().sum(1)
        return stats.ratio_of_means(blocks, reference.blocks().sum(1)[: len(blocks)])

    def time_to(self, reference: "Gauge") -> Tuple[float, float]:
        """The time of a step over that of the reference, with its standard error."""
        ratios = [mine / other for mine, other in zip(self.seconds, reference.seconds)]
        return stats.median_and_error(torch.tensor(ratios, dtype=torch.double, device="cpu"))

    def time_needed(self, reference: "Gauge", steps: float, parts: List[float]) -> Tuple[float, float]:
        """For the same precision as the reference, over its own, with its standard error; of :func:`steps_ratios`."""
        time, error = self.time_to(reference)
        return steps * time, root_sum_of_squares([steps * error, *(time * part for part in parts)])

    def blocks(self) -> Tensor:
        """Variances by block and parameter."""
        return torch.stack(self.block_variances)

    def squared_mean(self) -> Tensor:
        """The squared length of each parameter's mean gradient, estimated without bias."""
        noise = self.moments.variance / self.moments.count
        return self.coordinates.sums(self.moments.mean.square() - noise)

    def verdict(self, reference: "Gauge", threshold: float, exact: Optional[Tensor] = None) -> Verdict:
        """Whether it is biased."""
        largest = max(self.moments.rms.max().item(), reference.moments.rms.max().item())
        return judge(self.draws, reference.draws, exact, threshold, largest)

    def result(
        self,
        reference: "Gauge",
        threshold: float,
        exact: Optional[Tensor] = None,
    ) -> LossResult:
        """
        All but ``steps_ratio``, which needs to know the mean gradient.

        :param Gauge reference: Of the reference.
        :param float threshold: The z-score beyond which a loss is called biased.
        :param ~torch.Tensor exact: The exact gradient ``[Q]``, if it is known.
        """
        if self.failure is not None:
            return LossResult(self.name, error=self.failure)
        result = LossResult(self.name, reference=self is reference)
        by_parameter = self.blocks()
        result.variance = self.coordinates.sums(self.moments.variance).sum().item()
        result.variance_ratio, result.variance_ratio_error = self.ratio_to(reference)
        if result.variance > 0:
            shares = by_parameter.sum(0) / by_parameter.sum()
            result.variance_shares = dict(zip(self.sampler.names, shares.tolist()))
        deviations = torch.tensor(self.deviations, dtype=torch.double, device="cpu")
        if len(deviations) >= 100:
            result.tail_share = stats.tail_share(deviations)
        result.num_samples = len(self.seconds)
        result.seconds = statistics.median(self.seconds)
        result.time_ratio, result.time_ratio_error = self.time_to(reference)
        result.cost_ratio = result.variance_ratio * result.time_ratio
        result.loss = self.losses.mean.item() if self.losses.count else math.nan
        result.bad_losses = self.bad_losses
        result.loss_error = self.losses.standard_error.item()
        result.loss_deviation = result.loss_error * math.sqrt(self.losses.count)
        result.memory = self.memory
        if self.memory is not None and reference.memory:
            result.memory_ratio = self.memory / reference.memory
        if exact is not None or not result.reference:
            self._add_bias(result, reference, threshold, exact)
        return result

    def _add_bias(
        self, result: LossResult, reference: "Gauge", threshold: float, exact: Optional[Tensor]
    ) -> None:
        verdict = self.verdict(reference, threshold, exact)
        result.bias_z, result.bias_at, result.bias_threshold = verdict.z, verdict.at, threshold
        result.biased = verdict.z > threshold
        size = self.coordinates.sums(reference.moments.rms.square()).sum().sqrt().item()
        if size > 0:
            result.bias_size = verdict.difference / size
            result.detectable_bias = verdict.detectable / size

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def find_signal(gauges: Sequence[Gauge]) -> Tensor:
    """The squared length of each parameter's mean gradient, of the loss whose mean has the least noise."""
    quiet = min(gauges, key=lambda gauge: gauge.moments.standard_error.square().sum().item())
    return quiet.squared_mean().clamp(min=0.0)


def steps_ratios(gauges: Sequence[Gauge], signal: Tensor) -> Dict[str, Tuple[float, List[float]]]:
    """
    What :func:`~pyro_rb.diagnostics.stats.progress.steps_ratio` returns for each, by name; the first is the reference.
    """
    base, sizes = gauges[0].blocks(), gauges[0].coordinates.sizes
    return {gauge.name: steps_ratio(gauge.blocks(), base, signal, sizes) for gauge in gauges}
