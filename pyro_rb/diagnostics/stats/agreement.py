# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Whether the mean gradients of two losses agree. There are two references and two tests.

* The reference is the mean gradient of another loss, paired draw by draw; or the exact
  gradient, by enumeration, which has no noise.
* Where each draw moves all coordinates, as reparameterised draws do, each coordinate of the
  gradient is tested. Draws of a discrete site move the coordinates of the value drawn, and
  a value that was never drawn would look like a bias without noise. Then a few random
  projections of each parameter's gradient are tested instead, which mix rare and common
  values; and a projection whose spread is due to very few draws tells nothing.

Gradients with respect to scales are skewed, as squares of normal variables are, and there are
as many tests as coordinates. So all z-scores are corrected for skewness, as those of
:class:`~pyro_rb.diagnostics.stats.mean_test.MeanTest` are.
"""

import math
from typing import List, NamedTuple, Optional

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.mean_test import (
    MeanTest,
    one_sample_test,
    rounding_error,
)
from pyro_rb.diagnostics.stats.moments import SkewedMoments
from pyro_rb.diagnostics.stats.projections import Projector

LEAST_EVENTS = 30


class Verdict(NamedTuple):
    """
    :param float z: The largest absolute z-score.
    :param str at: Where it was found.
    :param float difference: The absolute difference of the means there.
    :param float detectable: A bias of this size would have been seen; infinite if none.
    """

    z: float
    at: str
    difference: float
    detectable: float


class Agreement:
    """
    Gathers the draws of one loss that its test needs.

    :param Coordinates coordinates: Which are followed.
    :param Projector projector: To test projections; None to test coordinates.
    """

    def __init__(self, coordinates: Coordinates, projector: Optional[Projector]) -> None:
        self.coordinates, self.projector = coordinates, projector
        self.dtype = torch.double
        self.difference = SkewedMoments()  # to the reference, draw by draw
        self.projected: List[Tensor] = []

    def update(self, vector: Tensor, reference: Tensor) -> None:
        """Adds one draw ``[Q]`` of this loss and one of the reference."""
        self.dtype = vector.dtype
        if self.projector is None:
            self.difference.update(vector - reference)
        else:
            self.projected.append(self.projector(vector))

    def verdict(
        self, reference: "Agreement", exact: Optional[Tensor], threshold: float, largest: float
    ) -> Verdict:
        """
        :param Agreement reference: That of the reference loss.
        :param ~torch.Tensor exact: The exact gradient ``[Q]``, needs projections; or None.
        :param float threshold: The z-score beyond which means are said to differ.
        :param float largest: The largest root-mean-square coordinate, for the rounding.
        """
        rounding = rounding_error(largest, self.dtype)
        if self.projector is not None:
            return self._of_projections(reference, exact, threshold, rounding)
        difference = self.difference
        error = difference.standard_error
        test = MeanTest(difference.mean, error, difference.count, rounding, difference.skewness)
        worst = int(test.z.abs().argmax())
        size = abs(test.difference[worst].item())
        detectable = test.detectable_bias(threshold).max().item()
        return Verdict(test.max_abs_z, self.coordinates.label(worst), size, detectable)

    def _of_projections(
        self, reference: "Agreement", exact: Optional[Tensor], threshold: float, rounding: float
    ) -> Verdict:
        assert self.projector is not None
        draws = torch.stack(self.projected)
        if exact is None:
            draws = draws - torch.stack(reference.projected[: len(draws)])
            expected = torch.zeros_like(draws[0])
        else:
            expected = self.projector(exact)
        labels, widths = self.projector.labels, self.projector.widths
        test = one_sample_test(draws, expected)
        exactly = test.difference.abs() <= rounding * widths
        # The number of draws that make up the spread, as their kurtosis tells.
        squares = (draws - draws.mean(0)).square()
        events = squares.sum(0).square() / squares.square().sum(0)
        # A normal variable has a third of the draws.
        tells = exactly | (events >= min(LEAST_EVENTS, len(draws) / 6))
        z = torch.where(exactly | ~tells, torch.zeros_like(events), test.z.abs())
        worst = int(z.argmax())
        detectable = (test.detectable_bias(threshold) + rounding) * widths
        detectable = torch.where(tells, detectable, torch.full_like(events, math.inf))
        size = abs(test.difference[worst].item()) * widths[worst].item()
        return Verdict(z.max().item(), labels[worst], size, detectable.max().item())
