# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The score as a control variate: how much of it to leave in a gradient.

A path gradient ``h`` and a score ``s``, whose mean is zero, make a family of
unbiased gradients ``h + (1 - c) s``. The scale ``c`` of least variance is found by
least squares of ``h`` on ``s``, from earlier draws, so that no bias enters.
"""

import math
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

START_UP = 3  # updates during which c = 0
EAGER_UPDATES = 50  # the first updates are made at every step,
INTERVAL = 16  # later ones at every 16th: an update costs about as much as a step
DISCOUNT = 0.97  # of one update against the next
MAX_SCALE = 10.0
WORTH_IT = 0.95  # the scales 0 and 1 save a pass through the guide's densities

NameOf = Callable[[torch.Tensor], Optional[str]]


def _nameless(parameter: torch.Tensor) -> None:
    return None


class Moments:
    """
    What earlier draws tell about the parts ``h`` and ``s`` of one parameter's gradient: discounted
    means of both, and of their products about these means.

    Means of sparse gradients are not kept, as they would fill up; that of ``s`` is zero.

    :param shape: of the parameter.
    :param str name: of the parameter, if it has one.

    >>> Moments(shape=[3]).scale
    0.0
    """

    def __init__(self, shape: Sequence[int], name: Optional[str] = None) -> None:
        self.name = name
        self.shape = list(shape)
        #: What was found for the parameter and those that it shares a scale with.
        self.scale = 0.0
        self.steps_left = 0
        self.updates = 0
        self.weight = 0.0
        self.hh = self.hs = self.ss = 0.0
        #: Of ``h - e s``, with the slopes ``e`` as they stood before each draw.
        self.loss = 0.0
        self._mean_h = self._mean_s = torch.zeros((), device="cpu")  # they follow the gradients

    @property
    def device(self) -> torch.device:
        """Where the gradients of the last draw were."""
        return self._mean_s.device

    def is_due(self) -> bool:
        """Counts one step. Returns whether an update should be made at it."""
        self.steps_left -= 1
        return self.steps_left < 0

    def center(self, h: torch.Tensor, s: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Centers both before they are multiplied, so that float32 keeps its digits."""
        h, s = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (h, s))
        if h.is_sparse:
            return h.coalesce(), s.coalesce()
        return h - self._mean_h.to(h), s - self._mean_s.to(s)

    def add(
        self, dh: torch.Tensor, ds: torch.Tensor, products: Sequence[float], slope: float
    ) -> None:
        """
        :param dh: from :meth:`center`.
        :param ds: likewise.
        :param products: sums of ``dh * dh``, ``dh * ds`` and ``ds * ds``.
        :param slope: of ``h`` on ``s``, from earlier draws.
        """
        self.updates += 1
        self.weight = DISCOUNT * self.weight + 1.0
        share = 1.0 / self.weight
        fresh = 1.0  # share of the draw that is not in the means
        if not dh.is_sparse:
            fresh = 1.0 - share
            self._mean_h = self._mean_h.to(dh) + share * dh
            self._mean_s = self._mean_s.to(ds) + share * ds
        hh, hs, ss = [fresh * product for product in products]
        self.hh += share * (hh - self.hh)
        self.hs += share * (hs - self.hs)
        self.ss += share * (ss - self.ss)
        self.loss += share * (hh - 2.0 * slope * hs + slope * slope * ss - self.loss)


class ControlVariate:
    """
    One scale ``c`` for the gradients of some parameters, from the moments of each.

    Least squares, with an intercept for each coordinate, gives the slope ``e = c - 1`` of
    ``h`` on ``s``; ``c`` is kept within 0 and 10. Least squares over few or heavy-tailed
    draws can be far off. So the two fixed scales 0 and 1 compete with it: each new draw first
    scores all three, as they stood before that draw. Least squares is used where its mean square is
    the least by 5 percent.

    >>> variate = ControlVariate([Moments(shape=[1])])
    >>> for s in torch.tensor([[1.0], [-1.0], [2.0], [0.5], [-3.0]]):
    ...     variate.update(h=[2.0 - 0.5 * s], s=[s])
    >>> round(variate.scale, 6)
    0.5
    """

    def __init__(self, moments: Sequence[Moments]) -> None:
        self._moments = moments

    @property
    def _oldest(self) -> Moments:
        return max(self._moments, key=lambda m: m.updates)

    def is_due(self) -> bool:
        """Counts one step. Returns whether an update should be made at it."""
        return self._oldest.is_due()

    def _sum(self, name: str) -> float:
        return sum(getattr(m, name) for m in self._moments)

    @property
    def slope(self) -> float:
        """The slope of least squares."""
        ss = self._sum("ss")
        scale = 1.0 + self._sum("hs") / ss if ss > 0.0 else 0.0
        return min(max(scale, 0.0), MAX_SCALE) - 1.0

    @property
    def scale(self) -> float:
        """The scale to use for the next draw."""
        # A parameter that is new takes over what was learned of the others.
        if self._oldest.updates < START_UP:
            return 0.0
        hh = self._sum("hh")
        at_0, at_1 = hh + 2.0 * self._sum("hs") + self._sum("ss"), hh
        if self._sum("loss") < WORTH_IT * min(at_0, at_1):
            return 1.0 + self.slope
        return 0.0 if at_0 < at_1 else 1.0

    def update(self, h: Sequence[torch.Tensor], s: Sequence[torch.Tensor]) -> None:
        """
        Takes in one draw. Draws that are not finite are left out.

        :param h: path gradients, one for each parameter and of its shape.
        :param s: the scores of the same draw, likewise.
        """
        pairs = [m.center(*pair) for m, *pair in zip(self._moments, h, s)]
        dots = [_dot(*pair) for dh, ds in pairs for pair in ((dh, dh), (dh, ds), (ds, ds))]
        values = torch.stack([dot.to(dots[0].device) for dot in dots]).tolist()
        if not all(map(math.isfinite, values)):
            return
        slope = self.slope
        for i, (m, pair) in enumerate(zip(self._moments, pairs)):
            m.add(*pair, values[3 * i : 3 * i + 3], slope)
        scale = self.scale
        steps_left = 0 if self._oldest.updates < EAGER_UPDATES else INTERVAL - 1
        for m in self._moments:
            m.scale, m.steps_left = scale, steps_left


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).sum() if a.is_sparse else a.reshape(-1) @ b.reshape(-1)


class AdaptiveScale:
    """
    The :class:`Moments` of parameters, kept with the tensors, weakly: one object may serve
    several models.

    In a pickle or a :meth:`state_dict` they have the names of the parameters. What is
    loaded goes to the tensor that has that name and shape; among tensors without a name, to
    those of that shape in the order in which they come up.

    >>> adaptive, loc = AdaptiveScale(), torch.zeros(1, requires_grad=True)
    >>> variate = adaptive.find([loc])
    >>> for s in torch.tensor([[1.0], [-1.0], [2.0], [0.5], [-3.0]]):
    ...     variate.update(h=[2.0 - 0.5 * s], s=[s])
    >>> round(adaptive.find([loc]).scale, 6)
    0.5
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._variates = WeakTensorKeyDictionary()
        self._loaded: Dict[Tuple, List[Moments]] = {}

    def moments(self, parameter: torch.Tensor, name_of: NameOf = _nameless) -> Moments:
        """
        :param name_of: the name of a parameter, or None.
        :return: what is known of the parameter.
        """
        found = self._variates.get(parameter)
        shape = list(parameter.shape)
        if found is None or found.shape != shape:
            name = name_of(parameter)
            waiting = self._loaded.pop((name, *shape), [])
            if name is None and waiting[1:]:
                self._loaded[(name, *shape)] = waiting[1:]
            # Of several with one name, all but the last have been replaced.
            found = waiting[0 if name is None else -1] if waiting else Moments(shape, name)
            self._variates[parameter] = found
        return found

    def postpone(self, parameters: Iterable[torch.Tensor]) -> None:
        """Puts off the update of parameters that have come up."""
        for parameter in parameters:
            self._variates[parameter].steps_left = INTERVAL - 1

    def find(
        self, parameters: Sequence[torch.Tensor], name_of: NameOf = _nameless
    ) -> ControlVariate:
        """The control variate of parameters that share a scale."""
        return ControlVariate([self.moments(p, name_of) for p in parameters])

    def state_dict(self) -> List[Dict[str, Any]]:
        """What was learned, in plain tensors, numbers and strings."""
        waiting = [m for moments in self._loaded.values() for m in moments]
        return [dict(vars(m)) for m in [*self._variates.values(), *waiting]]

    def load_state_dict(self, state: Sequence[Dict[str, Any]]) -> None:
        """Forgets what was learned, for what :meth:`state_dict` returned."""
        self._forget()
        for values in state:
            moments = Moments(values["shape"], values["name"])
            vars(moments).update(values)
            key = (moments.name, *moments.shape)
            self._loaded.setdefault(key, []).append(moments)

    def __getstate__(self) -> Dict[str, Any]:
        return {"state": self.state_dict()}

    def __setstate__(self, pickled: Dict[str, Any]) -> None:
        self.load_state_dict(pickled["state"])
