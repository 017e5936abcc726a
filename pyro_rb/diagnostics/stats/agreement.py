# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Is a loss to be called biased? :func:`judge` says so, from draws of it and of the reference."""

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats.bias import Draws
from pyro_rb.diagnostics.stats.mean_test import compare_moments, rounding_error
from pyro_rb.diagnostics.stats.moments import SkewedMoments

#: A projection whose spread is due to fewer draws tells nothing.
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
