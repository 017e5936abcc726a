# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch

from pyro_rb.ops.linear_call import LinearCall
from pyro_rb.poutine.gaussian_site import Elements, Plain, overlap
from pyro_rb.poutine.random_factor import RandomFactor


class LocalUse(NamedTuple):
    """A layer whose pre-activations were drawn row by row."""

    noise: torch.Tensor  # [rows, units]
    elements: Sequence[Tuple[Tuple, Elements]]  # of sites by name and shape


class LocalDraws:
    """
    Draws the pre-activations of linear layers with noise of their own for each row.

    :param shared: by name and shape, elements of sites that are not to be drawn so.
    :param bool keeps_record: whether the functions that are called leave a record.
    :param bool is_checked: whether the noise requires grad.
    :param shifts: by number of rows, what minus the noise takes the place of the noise; zero
        where it is left.
    :param str reason: why nothing is to be drawn so, if so.
    """

    def __init__(
        self,
        shared: Optional[Mapping[Tuple, Plain]] = None,
        keeps_record: bool = False,
        is_checked: bool = False,
        shifts: Optional[Mapping[int, torch.Tensor]] = None,
        reason: str = "",
    ) -> None:
        self.shared = {} if shared is None else shared
        self.is_checked = is_checked
        self._reason = reason
        #: Which functions were called one after the other, with which flags.
        self.record: Optional[int] = 0 if keeps_record else None
        self._shifts = {} if shifts is None else shifts
        #: What was drawn.
        self.uses: List[LocalUse] = []

    def note_call(self, func: Callable, args: Tuple, kwargs: Dict[str, Any]) -> None:
        """Adds a call to the record, if there is one."""
        if self.record is not None:
            flags = tuple(x for x in (*args, *kwargs.values()) if x is True or x is False)
            self.record = hash((self.record, func, flags))

    def allows(self, call: LinearCall, random: Sequence[RandomFactor]) -> bool:
        """Whether the call is such a layer."""
        is_layer = call.is_layer and random[0].position == 1 and not self._reason
        return is_layer and all(map(self._allows, random))

    def _allows(self, factor: RandomFactor) -> bool:
        if not (factor.site.draw.is_diagonal and factor.free is True):
            return False
        if factor.site.key not in self.shared:
            return True
        shared = self.shared[factor.site.key].elements
        if isinstance(shared, torch.Tensor):
            shared = shared.to(factor.site.draw.noise.device)
        return overlap(factor.view.elements, shared) is None

    def why_shared(self, key: Tuple) -> str:
        """Why elements of a site are not drawn so; empty if nothing speaks against it."""
        return self._reason or (self.shared[key].reason if key in self.shared else "")

    def draw(self, call: LinearCall, random: Sequence[RandomFactor]) -> torch.Tensor:
        """The pre-activations of a call."""
        mean = call({f.position: f.view.replay(f.site.draw.loc) for f in random})
        variances = {f.position: f.view.replay(f.site.draw.variance) for f in random}
        if call.term is not None and call.term not in variances:
            variances[call.term] = torch.zeros_like(call.args[call.term])
        variance = call({0: call.args[0].square(), **variances})
        # The slope of a square root is infinite at zero, where a unit has no noise.
        deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        noise = torch.randn_like(variance)
        if len(noise) in self._shifts:
            shift = self._shifts[len(noise)].to(noise).unsqueeze(-1)
            noise = torch.where(shift != 0, shift - noise, noise)
        if self.is_checked:
            noise.requires_grad_()
        self.uses.append(LocalUse(noise, [(f.site.key, f.view.elements) for f in random]))
        return torch.addcmul(mean, deviation, noise)
