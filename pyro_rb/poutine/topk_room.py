# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""How many values may be looked at, all sites together."""

import math
from typing import Any, Collection, Dict, Iterable, List, Mapping, NamedTuple, Optional

import torch

from pyro_rb.poutine.draw_messenger import Declined

#: Dims for slots; a tensor has at most 64 in all.
MAX_DIMS = 40
#: Slots of all sites that a site might depend on, multiplied. No more are risked.
MAX_JOINT = 2**20
#: The same, of sites whose values are all summed by ``sum_up_to``; and times the sizes of plates and
#: of the event of a site. Up to here, a step takes hardly longer than one with few slots.
MAX_SUMMED, MAX_SUMMED_ELEMENTS = 256, 2**18


class TooManySummed(Exception):
    """
    Says that some sites are not to be summed.

    :param dict reasons: by their names.
    """

    def __init__(self, reasons: Dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


class Enumerated(NamedTuple):
    """A site that was enumerated, in full or in part."""

    name: str
    dim: int
    num_slots: int
    counters: Dict[str, int]  # of the sequential plates around it
    has_table: bool  # whether its values can be listed
    is_summed: bool  # whether it would have less slots, were it not for sum_up_to
    is_markov: bool  # whether it is inside of pyro.markov
    plates: List[str]  # the others around it


class Room:
    """
    The sites of a run of a guide that have slots, and whether there is room for others.

    :param int max_evaluations: the largest cartesian product of slots.
    :param dict never_summed: names of sites that ``sum_up_to`` does not apply to, with the reasons.
    """

    def __init__(self, max_evaluations: int, never_summed: Mapping[str, str]) -> None:
        self.max_evaluations = max_evaluations
        self.never_summed = never_summed
        self.first_available_dim = -1
        self.sites: List[Enumerated] = []

    def check(self, msg: Any, num_slots: int) -> None:
        """
        :raises Declined: with the reason, if there is no room for the slots of another site.
        :raises ValueError: if the product of slots is too large.
        """
        counters = sequential_counters(msg)
        self._check_room(num_slots, counters)
        self.check_product(msg["name"], msg["fn"].batch_shape, num_slots)

    def why_not_summed(self, msg: Any, num_values: int) -> str:
        """Why not all values are looked at that would be by ``sum_up_to``; empty if they are."""
        if msg["name"] in self.never_summed:
            return f"; all would be {self.never_summed[msg['name']]}"
        joint = num_values * self._count_joint(
            sequential_counters(msg), msg["infer"].get("_markov_scope")
        )
        num_plate_dims = -1 - self.first_available_dim
        shape = msg["fn"].batch_shape
        elements = joint * math.prod(shape[max(0, len(shape) - num_plate_dims) :])
        if joint > MAX_SUMMED:
            return f"; all would be {joint} evaluations, with earlier sites"
        return f"; all would be {elements} elements" if elements > MAX_SUMMED_ELEMENTS else ""

    def _count_joint(
        self, counters: Mapping[str, int], markov_scope: Optional[Collection[str]] = None
    ) -> int:
        """
        The product of the slots of sites that another one might depend on.

        :param markov_scope: the sites inside of :func:`pyro.markov` that count; None for all.
        """
        # Iterations of a sequential plate do not depend on one another, and sites that
        # share a dim, as steps of a Markov chain do, are summed one after the other.
        sizes: Dict[int, int] = {}
        for site in self.sites:
            is_seen = markov_scope is None or not site.is_markov or site.name in markov_scope
            if is_seen and all(site.counters.get(p, c) == c for p, c in counters.items()):
                sizes[site.dim] = max(site.num_slots, sizes.get(site.dim, 1))
        return math.prod(sizes.values())

    def _check_room(self, num_slots: int, counters: Mapping[str, int]) -> None:
        if any(-site.dim >= MAX_DIMS for site in self.sites):
            raise Declined("no tensor dim is left")
        joint = self._count_joint(counters)
        if joint > 1 and joint * num_slots > MAX_JOINT:
            self._raise_if_summed(self.sites, "too many with later sites")
            raise Declined(f"with earlier sites there might be more than {MAX_JOINT} terms")

    def _raise_if_summed(self, sites: Iterable[Enumerated], reason: str) -> None:
        reasons = {site.name: reason for site in sites if site.is_summed}
        if reasons:
            raise TooManySummed(reasons)

    def _sites_of(self, shape: torch.Size) -> List[Enumerated]:
        """The sites that have slots in a batch shape."""
        return [s for s in self.sites if len(shape) >= -s.dim and shape[s.dim] > 1]

    def check_elements(self, name: str, fn: Any) -> None:
        """
        :param fn: the distribution of a site of the model.
        :raises TooManySummed: if it has too many elements, and values that are summed.
        """
        num_elements = math.prod(fn.batch_shape + fn.event_shape)
        if num_elements > MAX_SUMMED_ELEMENTS:
            reason = f"{num_elements} elements at site '{name}'"
            self._raise_if_summed(self._sites_of(fn.batch_shape), reason)

    def check_product(self, name: str, shape: torch.Size, num_slots: int = 1) -> None:
        """
        :param name: of a site.
        :param shape: its batch shape.
        :param num_slots: its own slots, if they are not yet in the shape.
        :raises ValueError: if the shape has too many slots of several sites.
        """
        num_enum_dims = max(0, len(shape) + self.first_available_dim + 1)
        product = num_slots * math.prod(shape[:num_enum_dims])
        if product <= self.max_evaluations:
            return
        self._raise_if_summed(self._sites_of(shape), f"{product} evaluations at site '{name}'")
        sites = {site.name: site.num_slots for site in self._sites_of(shape)}
        if num_slots > 1:
            sites[name] = num_slots
        if len(sites) > 1:
            raise ValueError(
                f"Site '{name}' needs {product} evaluations, the product over the guide "
                f"sites that it depends on, {sites}. Expected at most "
                f"max_evaluations={self.max_evaluations}. Set infer={{'topk': 0}}, a plain "
                "draw, at most of these sites, or raise max_evaluations."
            )


def sequential_counters(msg: Any) -> Dict[str, int]:
    return {f.name: f.counter for f in msg["cond_indep_stack"] if not f.vectorized}
