# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Do the mean gradients of two losses agree? The reference is another loss, draw by draw with the same random numbers or
with others, or the exact gradient.

Where each draw moves all coordinates, as reparameterized draws do, each coordinate is tested. Draws of a discrete site
move the coordinates of the value drawn, and a value that was never drawn would look like a bias without noise. Then a
few random projections are tested instead, which mix rare and common values.

Gradients with respect to scales are skewed, as squares of normal variables are, and there are as many tests as
coordinates. So all z-scores are corrected for skewness, see :class:`~pyro_rb.diagnostics.stats.mean_test.MeanTest`.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.mean_test import (
    MeanTest,
    compare_moments,
    largest,
    rounding_error,
)
from pyro_rb.diagnostics.stats.moments import RunningMoments, SkewedMoments
from pyro_rb.diagnostics.stats.projections import Projector

#: Name under which projections of the whole gradient stand in for its coordinates.
PROJECTIONS = "projections"
#: A projection whose spread is due to fewer draws tells nothing.
LEAST_EVENTS = 30


class CheckError(AssertionError):
    """
    A test of bias that has failed.

    :param ~pyro_rb.diagnostics.check.unbiased.BiasCheck check: The numbers, in ``check``, if
        :func:`~pyro_rb.diagnostics.check.unbiased.check_unbiased` has raised it.
    """

    def __init__(self, message: str, check: Any = None) -> None:
        super().__init__(message)
        self.check = check


class BiasError(CheckError):
    """A mean gradient differs from its reference by more than chance."""


class LowPowerError(CheckError):
    """There are too few draws to see a bias of the size that was asked for."""


class Draws:
    """
    Draws of a gradient, or differences of two, as far as a test of their mean needs them.

    :param Coordinates coordinates: What is followed of the gradient.
    :param Projector projector: To test projections; None to test coordinates.

    **Example**

    >>> import torch
    >>> draws = Draws(Coordinates(["loc"], [torch.zeros(2)]))
    >>> for row in torch.tensor([[1.0, 2.0], [3.0, 2.0]]):
    ...     draws.add(row)
    >>> draws.tested.mean.tolist(), draws.label(1)
    ([2.0, 2.0], 'loc[1]')
    """

    def __init__(self, coordinates: Coordinates, projector: Optional[Projector] = None) -> None:
        self.coordinates, self.projector = coordinates, projector
        self.moments: RunningMoments = SkewedMoments() if projector is None else RunningMoments()
        self.projected: List[Tensor] = []
        self._deviations: List[Tensor] = []

    def add(self, vector: Tensor) -> None:
        """:param ~torch.Tensor vector: One draw, ``[Q]``."""
        self._deviations.append(self.moments.update(vector))
        if self.projector is not None:
            self.projected.append(self.projector(vector))

    @property
    def tested(self) -> SkewedMoments:
        """Moments of what is tested."""
        if self.projector is not None:
            return SkewedMoments.of(torch.stack(self.projected))
        assert isinstance(self.moments, SkewedMoments)
        return self.moments

    def label(self, place: int) -> str:
        """What is tested there."""
        return self.coordinates.label(place) if self.projector is None else self.projector.label(place)

    def tail_share(self) -> float:
        """See :func:`~pyro_rb.diagnostics.stats.summary.tail_share`."""
        if self.projector is None:
            return stats.tail_share(torch.stack(self._deviations))
        rows = torch.stack(self.projected)
        return stats.tail_share((rows - rows.mean(0)).square().sum(1))


@dataclass(frozen=True)
class BiasTest:
    """
    The outcome of :func:`test_bias`.

    :param MeanTest test: Of the coordinates, or of projections.
    :param callable label: Names each of them.
    :param ~torch.Tensor differences: Of the means, by coordinate.
    :param Coordinates coordinates: Names each of these.
    :param float scale: The euclidean norm of the mean of the reference.
    :param float failure_rate: Probability of a false alarm in any of the tests.
    """

    test: MeanTest
    label: Callable[[int], str]
    differences: Tensor
    coordinates: Coordinates
    scale: float
    failure_rate: float

    @property
    def threshold(self) -> float:
        """What the absolute z-scores are compared with."""
        return self.test.threshold(self.failure_rate)

    @property
    def worst(self) -> int:
        """The place of the largest absolute z-score."""
        return int(self.test.z.abs().argmax())

    def detectable_bias(self, either_sign: bool = True) -> Tuple[str, float]:
        """
        Where a bias is hardest to see, and the size, in units of the gradient, that one would have to have there to be
        seen in 95 of 100 cases.

        :param bool either_sign: See :meth:`~pyro_rb.diagnostics.stats.mean_test.MeanTest.detectable_bias`.
        """
        sizes = self.test.detectable_bias(self.threshold, either_sign=either_sign)
        return self.label(int(sizes.argmax())), sizes.max().item()

    def raise_if_biased(self) -> None:
        """
        :raises BiasError: naming parameter, coordinate, z-score and size of the bias, and
            the size that could have been seen.
        """
        for name, part in zip(self.coordinates.names, self.differences.split(self.coordinates.counts)):
            if not part.isfinite().all():
                raise BiasError(f"the mean of {name} is not finite")
        test, index = self.test, self.worst
        if not test.max_abs_z > self.threshold:
            return
        size = test.difference[index].item()
        message = (
            f"biased in {self.label(index)}: z = {test.z[index]:.1f} (threshold {self.threshold:.1f}), difference "
            f"{size:.4g} +/- {test.standard_error[index]:.2g}, {self.share(size)}, N = {test.num_samples}"
        )
        if self.label(index).startswith(PROJECTIONS):
            place = int(self.differences.abs().argmax())
            most = f"{self.coordinates.label(place)}, by {self.differences[place]:.4g}"
            message += f"; the means differ most in {most}"
        raise BiasError(message)

    def raise_if_blind(self, detect: float, scale: Optional[float] = None, either_sign: bool = True) -> None:
        """
        :param float detect: The smallest bias that must be seen, as a share of ``scale``.
        :param float scale: Default: that of the test.
        :param bool either_sign: As in :meth:`detectable_bias`.
        :raises LowPowerError: naming the parameter, and the number of draws that it takes.
        """
        scale = self.scale if scale is None else scale
        if not scale > 0:
            raise LowPowerError(
                "the expected gradient is zero, so that detect has no scale: give scale=..., or detect=None"
            )
        name, seen = self.detectable_bias(either_sign)
        if seen > detect * scale:
            num_samples = self.test.num_samples
            needed = math.ceil(num_samples * (seen / (detect * scale)) ** 2)
            raise LowPowerError(
                f"too little power in {name}: a bias below {seen:.3g} would have gone "
                f"unseen, asked for was {detect} x {scale:.3g} = {detect * scale:.3g}; "
                f"raise N from {num_samples} to about {needed}"
            )

    def share(self, difference: float) -> str:
        """Its size relative to that of the gradient, in words."""
        if not self.scale > 0:
            return "the gradient is zero"
        return f"{100 * abs(difference) / self.scale:.3g}% of the gradient's norm"


def find_bias(mine: Draws, reference: Any, failure_rate: float, paired: bool = False) -> BiasTest:
    """
    Tests whether mean gradients agree.

    :param Draws mine: Of the loss; if paired, of its differences to the reference.
    :param reference: Draws of it, or its exact gradient ``[Q]``.
    :param bool paired: Whether ``mine`` has such differences.

    **Example**

    >>> import torch
    >>> draws = Draws(Coordinates(["loc"], [torch.zeros(1)]))
    >>> for value in torch.linspace(-1, 1, 50):
    ...     draws.add(value.reshape(1))
    >>> test = find_bias(draws, torch.ones(1), failure_rate=1e-3)
    >>> test.test.max_abs_z > test.threshold
    True
    """
    tested, projector, coordinates = mine.tested, mine.projector, mine.coordinates
    is_exact = isinstance(reference, Tensor)
    means = reference.double() if is_exact else reference.moments.mean
    expected = means if projector is None else projector(means).to(tested.mean.device)
    size = max(largest(tested.rms), largest(expected.abs() if is_exact else reference.tested.rms))
    rounding = rounding_error(size, coordinates.dtype)
    other = torch.zeros_like(tested.mean) if paired else expected if is_exact else reference.tested
    return BiasTest(
        compare_moments(tested, other, rounding),
        mine.label,
        mine.moments.mean - (0.0 if paired else means),
        coordinates,
        means.norm().item(),
        failure_rate,
    )


class Verdict(NamedTuple):
    """
    What :func:`judge` has found.

    :param float z: The largest absolute z-score.
    :param str at: Where it was found.
    :param float difference: The absolute difference of the means there.
    :param float detectable: A bias of this size would have been seen; infinite if none.
    """

    z: float
    at: str
    difference: float
    detectable: float


def judge(mine: Draws, reference: Draws, exact: Optional[Tensor], threshold: float, size: float) -> Verdict:
    """
    Whether a loss is to be called biased. Projections whose spread is due to very few draws tell nothing.

    :param Draws mine: Where coordinates are tested, of the differences to the reference.
    :param Draws reference: Of it.
    :param ~torch.Tensor exact: The exact gradient ``[Q]``, needs projections; or None.
    :param float threshold: The z-score beyond which means are said to differ.
    :param float size: The largest root-mean-square coordinate, for the rounding.
    """
    rounding, projector = rounding_error(size, mine.coordinates.dtype), mine.projector
    if projector is None:
        tested = mine.tested
        test = compare_moments(tested, torch.zeros_like(tested.mean), rounding)
        worst = int(test.z.abs().argmax())
        detectable = test.detectable_bias(threshold).max().item()
        return Verdict(test.max_abs_z, mine.label(worst), abs(test.difference[worst].item()), detectable)
    draws = torch.stack(mine.projected)
    if exact is None:
        draws = draws - torch.stack(reference.projected[: len(draws)])
    expected = torch.zeros_like(draws[0]) if exact is None else projector(exact)
    test = compare_moments(SkewedMoments.of(draws), expected, 0.0)
    exactly = test.difference.abs() <= rounding * projector.widths
    # The number of draws that make up the spread, as their kurtosis tells.
    squares = (draws - draws.mean(0)).square()
    events = squares.sum(0).square() / squares.square().sum(0)
    # A normal variable has a third of the draws.
    tells = exactly | (events >= min(LEAST_EVENTS, len(draws) / 6))
    z = torch.where(exactly | ~tells, torch.zeros_like(events), test.z.abs())
    worst = int(z.argmax())
    sizes = (test.detectable_bias(threshold) + rounding) * projector.widths
    sizes = torch.where(tells, sizes, torch.full_like(events, math.inf))
    difference = abs(test.difference[worst].item()) * projector.widths[worst].item()
    return Verdict(z.max().item(), mine.label(worst), difference, sizes.max().item())
