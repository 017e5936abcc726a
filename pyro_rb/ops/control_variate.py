# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The score as a control variate: how much of it to leave in a gradient.

A path gradient ``h`` and a score ``s``, whose mean is zero, make a family of
unbiased gradients ``h + (1 - c) s``. The scale ``c`` of least variance is found by
least squares of ``h`` on ``s``, from earlier draws, so that no bias enters.
"""

import math
from typing import AbstractSet, Optional, Sequence, Tuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_rb.ops.graph import Node, leaves

START_UP = 3  # updates during which c = 0
EAGER_UPDATES = 50  # the first updates are made at every step,
INTERVAL = 16  # later ones at every 16th: an update costs about as much as a step
DISCOUNT = 0.97  # of one update against the next
MAX_SCALE = 10.0
WORTH_IT = 0.95  # the scales 0 and 1 save a pass through the guide's densities


class ControlVariate:
    """
    Learns one scale ``c`` for a pair of random vectors ``h`` and ``s``.

    Discounted sums give the slope ``e = c - 1`` of ``h`` on ``s``, with an intercept
    for each coordinate; ``c`` is kept within 0 and 10. Least squares over few or
    heavy-tailed draws can be far off. So the two fixed scales 0 and 1 compete with
    it: each new draw first scores all three, as they stood before it. Least squares
    is used where its discounted sum of squares is the least by 5 percent.

    >>> variate = ControlVariate()
    >>> for s in torch.tensor([[1.0], [-1.0], [2.0], [0.5], [-3.0]]):
    ...     variate.update(h=2.0 - 0.5 * s, s=s)
    >>> round(variate.scale, 6)
    0.5
    """

    def __init__(self) -> None:
        #: The scale to use for the next draw.
        self.scale = 0.0
        self._updates = 0
        self._steps_left = 0
        self._weight = 0.0
        self._hs = self._ss = 0.0
        self._slopes = [-1.0, -1.0, 0.0]  # of c = 0, least squares, c = 1
        self._losses = [0.0, 0.0, 0.0]
        self._mean_h = self._mean_s = torch.zeros(())

    def is_due(self) -> bool:
        """Counts one step. Returns whether an update should be made at it."""
        self._steps_left -= 1
        return self._steps_left < 0

    def update(self, h: torch.Tensor, s: torch.Tensor) -> None:
        """
        Takes in one draw. Draws that are not finite are left out.

        :param h: a path gradient of shape ``(size,)``.
        :param s: the score of the same draw, of shape ``(size,)``.
        """
        # Centred before they are multiplied, so that float32 keeps its digits.
        dh, ds = h - self._mean_h, s - self._mean_s
        hh, hs, ss = torch.stack([dh @ dh, dh @ ds, ds @ ds]).tolist()
        if not math.isfinite(hh + ss):
            return
        self._updates += 1
        self._weight = DISCOUNT * self._weight + 1.0
        self._mean_h = self._mean_h + dh / self._weight
        self._mean_s = self._mean_s + ds / self._weight
        fresh = 1.0 - 1.0 / self._weight  # share of the draw that is not in the means
        self._losses = [
            DISCOUNT * loss + fresh * (hh - 2.0 * e * hs + e * e * ss)
            for loss, e in zip(self._losses, self._slopes)
        ]
        self._hs = DISCOUNT * self._hs + fresh * hs
        self._ss = DISCOUNT * self._ss + fresh * ss
        if self._ss > 0.0:
            scale = 1.0 + self._hs / self._ss
            self._slopes[1] = min(max(scale, 0.0), MAX_SCALE) - 1.0
        if self._updates >= START_UP:
            at_0, at_least_squares, at_1 = self._losses
            if at_least_squares < WORTH_IT * min(at_0, at_1):
                self.scale = 1.0 + self._slopes[1]
            else:
                self.scale = 0.0 if at_0 < at_1 else 1.0
        self._steps_left = 0 if self._updates < EAGER_UPDATES else INTERVAL - 1


class AdaptiveScale:
    """
    Control variates for the scores of a guide, one for each set of parameters.

    Scores that have a parameter in common, directly or through others, share a
    :class:`ControlVariate`. It is kept with the parameter tensors, weakly: one object
    may serve several models. A pickled one starts afresh.

    >>> adaptive, loc = AdaptiveScale(), torch.zeros(1, requires_grad=True)
    >>> for s in torch.tensor([[1.0], [-1.0], [2.0], [0.5], [-3.0]]):
    ...     adaptive.learn([loc], path=[2.0 - 0.5 * s], score=[s])
    >>> round(adaptive.find((2.0 * loc).sum(), stop=set()).scale, 6)
    0.5
    """

    def __init__(self) -> None:
        self._variates = WeakTensorKeyDictionary()

    def __reduce__(self) -> Tuple:
        return AdaptiveScale, ()

    def find(
        self, term: torch.Tensor, stop: AbstractSet[Optional[Node]]
    ) -> Optional[ControlVariate]:
        """
        :param term: a scalar ``log q``.
        :param stop: graph nodes of the draws, which the score holds fixed.
        :return: what was learned of the score of ``term``; a blank one where nothing
            was; None where ``term`` has no parameter, and so no score.
        """
        # Any one parameter will do: all of a term's share one control variate.
        parameter = next(leaves(term, stop), None)
        if parameter is None:
            return None
        return self._variates.get(parameter) or ControlVariate()

    def learn(
        self,
        parameters: Sequence[torch.Tensor],
        path: Sequence[torch.Tensor],
        score: Sequence[torch.Tensor],
    ) -> None:
        """
        :param parameters: tensors that share a control variate.
        :param path: their path gradients, of the same shapes.
        :param score: their scores at the same draw, of the same shapes.
        """
        known = {id(v): v for v in map(self._variates.get, parameters)}
        (variate,) = known.values() if len(known) == 1 else (None,)
        if variate is None:  # nothing was known, or they did not share before
            variate = ControlVariate()
            for parameter in parameters:
                self._variates[parameter] = variate
        variate.update(_flat(path), _flat(score))


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device
    return torch.cat([tensor.detach().reshape(-1).to(device) for tensor in tensors])
