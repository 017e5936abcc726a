# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Whether means agree: z-tests, coordinate by coordinate. Tensors in, tensors and numbers out.

Throughout, ``samples`` is a tensor of shape ``[N, *shape]`` with one draw a row, and a
*coordinate* is one element of ``shape``.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Optional, Union

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats.moments import SkewedMoments, skewness

# Differences below this many units in the last place, relative to the largest coordinate,
# are rounding and not bias.
ROUNDING_UNITS = 32


def z_threshold(
    failure_rate: float, num_tests: int = 1, num_samples: Optional[int] = None
) -> float:
    """
    The value that the largest of ``num_tests`` two-sided z-scores exceeds with probability
    at most ``failure_rate`` when all means agree (Bonferroni).

    :param float failure_rate: Probability of a false alarm in any of the tests.
    :param int num_tests: Number of z-scores.
    :param int num_samples: The number of draws from which each standard error was
        estimated. The threshold is then the quantile of Student's t with one less degree
        of freedom, by the approximation of Wallace (1959). Default: the normal quantile.
    :returns: The threshold.
    :rtype: float

    **Example**

    >>> round(z_threshold(0.05), 3)
    1.96
    >>> round(z_threshold(0.05, num_tests=100, num_samples=50), 2)
    3.73
    """
    if not 0 < failure_rate < 1:
        raise ValueError(f"failure_rate must lie between 0 and 1, got {failure_rate}")
    z = -NormalDist().inv_cdf(failure_rate / (2 * max(num_tests, 1)))
    if num_samples is None:
        return z
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    df = num_samples - 1
    corrected = z * (8 * df + 3) / (8 * df + 1)
    return math.sqrt(df * math.expm1(corrected**2 / df))


@dataclass(frozen=True)
class MeanTest:
    """
    A z-test, coordinate by coordinate, of whether two means agree.

    :param ~torch.Tensor difference: The difference of the means.
    :param ~torch.Tensor standard_error: Its standard error, same shape.
    :param int num_samples: Number of draws behind the standard error.
    :param float rounding: Differences up to this size count as exact agreement.
    :param ~torch.Tensor skewness: The skewness of ``difference``, same shape: that of one
        draw, over the root of their number. Default: zero.
    """

    difference: Tensor
    standard_error: Tensor
    num_samples: int
    rounding: float = 0.0
    skewness: Optional[Tensor] = None

    @property
    def z(self) -> Tensor:
        """
        The z-scores. A difference that is no more than rounding scores 0; a larger one
        in a coordinate without variance scores infinity.

        Heavy tails alone make the score too small and not too large; skewness makes it too
        large on one side. So of the plain score and the one that is corrected for skewness
        (Hall 1992, "On the removal of skewness by transformation"), the smaller counts.
        """
        z = self.difference / self.standard_error
        z = torch.where(self.difference.abs() <= self.rounding, torch.zeros_like(z), z)
        if self.skewness is None:
            return z
        w = self.skewness
        corrected = z + w * z**2 / 3 + w**2 * z**3 / 27 + w / 6
        # Where the correction changes the sign, the score says nothing.
        size = torch.minimum(z.abs(), (corrected * z.sign()).clamp(min=0))
        return torch.where(z.isfinite(), size * z.sign(), z)

    @property
    def max_abs_z(self) -> float:
        """The largest absolute z-score; 0 without coordinates, NaN if any is NaN."""
        return self.z.abs().max().item() if self.z.numel() else 0.0

    def threshold(self, failure_rate: float, num_tests: Optional[int] = None) -> float:
        """:func:`z_threshold` for this test; ``num_tests`` defaults to its coordinates."""
        num_tests = self.difference.numel() if num_tests is None else num_tests
        return z_threshold(failure_rate, num_tests, self.num_samples)

    def detectable_bias(
        self, threshold: float, power: float = 0.95, either_sign: bool = True
    ) -> Tensor:
        """
        Per coordinate, the size of a bias that would have crossed the threshold with
        probability ``power``. Smaller ones may have gone unseen.

        :param float threshold: What the absolute z-score is compared with.
        :param float power: Probability of detection.
        :param bool either_sign: Whether that holds for biases of either sign. If not, it holds
            for the sign that skewness does not make harder to see.
        :returns: A tensor of the coordinates' shape, in units of the gradient.
        :rtype: ~torch.Tensor
        """
        needed: Any = threshold
        if self.skewness is not None and either_sign:
            # What the plain score must be for the corrected one to cross the threshold, on
            # the side where that is harder.
            w = self.skewness.abs()
            root = 1 - w * (threshold - w / 6)
            skewed = (1 - root.sign() * root.abs() ** (1 / 3)) * 3 / w
            needed = torch.where(w > 1e-6, skewed, threshold * torch.ones_like(w))
            needed = needed.clamp(min=threshold)
        return (needed + NormalDist().inv_cdf(power)) * self.standard_error + self.rounding


def compare_moments(mine: SkewedMoments, other: Union[SkewedMoments, Tensor], rounding: float) -> MeanTest:
    """
    :param other: Moments of independent draws, whose variance may differ (Welch), or exact values.
    :param float rounding: Differences up to this size count as exact agreement.
    """
    if isinstance(other, Tensor):
        return MeanTest(mine.mean - other, mine.standard_error, mine.count, rounding, mine.skewness)
    error = (mine.standard_error**2 + other.standard_error**2).sqrt()
    skewed = skewness(mine.third_cumulant - other.third_cumulant, error)
    return MeanTest(mine.mean - other.mean, error, min(mine.count, other.count), rounding, skewed)


def rounding_error(size: float, dtype: torch.dtype) -> float:
    """The difference that rounding alone may cause in gradients of up to this size."""
    return ROUNDING_UNITS * torch.finfo(dtype).eps * size


def largest(value: Tensor) -> float:
    """0 if there is none."""
    return value.max().item() if value.numel() else 0.0
