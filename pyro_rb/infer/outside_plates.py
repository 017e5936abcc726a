# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Which costs depend on a guide site from outside of its plates, or on a sum over its slots?

``Dice`` multiplies a cost by the weights of the sites in whose plates the cost is, and of
those slots that the cost has a dim for. It takes the cost to be independent of all
others. Whether it is cannot be told by shapes: ``b.sum()`` has no dim of the site ``b``.
So values are followed from where they are drawn to the costs.
"""

import math
from contextlib import nullcontext
from queue import LifoQueue
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import torch
from pyro.poutine import Trace

from pyro_rb.infer.generators import get_torch_generators, set_torch_generators
from pyro_rb.infer.traces import PARTICLES, Cost, Ordinal, compute_costs, sample_sites
from pyro_rb.ops.provenance import Provenance
from pyro_rb.poutine import ProvenanceMessenger

#: One of so many runs is watched where Python reads no number that was drawn.
PERIOD = 16

#: Guide sites, and the sites whose costs depend on them; ``""`` as in :class:`Cost`.
Dependents = Dict[str, Set[str]]


class Terms(NamedTuple):
    """Traces of model and guide; packed, with the terms of the ELBO, if these have weights."""

    model_trace: Trace
    guide_trace: Any
    costs: Sequence[Cost] = ()
    ordering: Mapping[str, Ordinal] = {}
    #: Knows what each cost was computed from. None if the run was not watched.
    provenance: Optional[Provenance] = None


def needs_weights(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether not all terms of the ELBO count once."""
    return bool(_weighted_sites(guide_trace) or _model_enumerated(model_trace, guide_trace))


def find_dependents(terms: Terms, provenance: Provenance) -> Dependents:
    """Pairs of guide site and cost that ``Dice`` takes to be independent, and are not."""
    weighted = _weighted_sites(terms.guide_trace)
    own = {name: provenance.source(name) for name in weighted}
    by_symbol = {symbol: own[name] for name, symbol in weighted.items() if symbol is not None}
    slots = sum(by_symbol.values())
    # The last cost with the name of a guide site is its own log q, on which the weights
    # depend of the costs that depend on it, even where its values are all there are.
    by_site = {cost.site: provenance.sources(cost.value) for cost in terms.costs}
    upstream = dict(own)
    for name in weighted:
        for other in provenance.names(by_site[name]):
            upstream[name] |= upstream.get(other, 0)

    outside_of = {
        ordinal: sum(bit for name, bit in own.items() if not terms.ordering[name] <= ordinal)
        for ordinal in {cost.ordinal for cost in terms.costs}
    }
    found: Dependents = {}
    for cost in terms.costs:
        sources = provenance.sources(cost.value)
        has_dim = sum(by_symbol.get(symbol, 0) for symbol in cost.value._pyro_dims)
        summed = sources & slots & (provenance.reduced(sources) | ~has_dim)
        outside = 0
        if outside_of[cost.ordinal]:
            for name in provenance.names(sources):
                outside |= upstream.get(name, 0) & outside_of[cost.ordinal]
        for name in provenance.names(summed | outside):
            found.setdefault(name, set()).add(cost.site)
    return found


def check_particles(terms: Terms, provenance: Provenance) -> None:
    """
    :raises ValueError: naming the site, if a cost depends on a sum over particles.
    """
    for cost in terms.costs:
        for name in provenance.names(provenance.reduced(provenance.sources(cost.value))):
            site = terms.guide_trace.nodes.get(name)
            frames = () if site is None else site["cond_indep_stack"]
            if any(frame.name == PARTICLES for frame in frames):
                raise ValueError(
                    f"Site '{cost.site}' depends on a sum over all of guide site '{name}', "
                    "which with vectorize_particles=True is one over all particles. "
                    "Expected sums over dims that are counted from the right. "
                    "Name the dims, as in .sum(-1), or set vectorize_particles=False."
                )


def find_below_model_enumeration(model_trace: Trace, guide_trace: Trace) -> Dependents:
    """
    Enumerated guide sites in plates that a site that the model enumerates is outside of:
    the sum over its values depends on them. ``TraceEnum_ELBO`` has no costs for these.
    """
    plates = [
        {frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        for site in _model_enumerated(model_trace, guide_trace).values()
    ]
    if not plates:
        return {}
    common = set.intersection(*plates)
    return {
        name: {""}
        for name, site in sample_sites(guide_trace)
        if site["infer"].get("_enumerate_dim") is not None
        and any(f.vectorized and f.name not in common for f in site["cond_indep_stack"])
    }


def may_have_dependents(terms: Terms, known: Dependents) -> bool:
    """
    Whether a cost comes after a guide site that ``Dice`` takes it to be independent of,
    other than pairs that are ``known`` to depend.
    """
    weighted, ordering = _weighted_sites(terms.guide_trace), terms.ordering
    for trace in (terms.guide_trace, terms.model_trace):
        drawn: Dict[Ordinal, List[str]] = {}
        slotted: Dict[Ordinal, List[str]] = {}
        for name, site in sample_sites(trace):
            dims = site["packed"]["log_prob"]._pyro_dims
            for ordinal, sources in drawn.items():
                if ordinal <= ordering[name]:
                    sources = slotted.get(ordinal, [])
                    sources = [s for s in sources if weighted[s] not in dims]
                if any(name not in known.get(source, ()) for source in sources):
                    return True
            if name in weighted:
                drawn.setdefault(ordering[name], []).append(name)
                if weighted[name] is not None:
                    slotted.setdefault(ordering[name], []).append(name)
    # A sum over values that the model enumerates may leave the plates of its terms.
    return any(
        not ordering[source] <= ordering[name] and "" not in known.get(source, ())
        for name in _model_enumerated(terms.model_trace, terms.guide_trace)
        for source in weighted
    )


def _weighted_sites(guide_trace: Trace) -> Dict[str, Optional[str]]:
    """Guide sites that ``Dice`` has a weight for, and the symbols of their slots."""
    return {
        name: site["infer"].get("_enumerate_symbol")
        for name, site in sample_sites(guide_trace)
        if site["infer"].get("enumerate")
        or isinstance(site["score_parts"].score_function, torch.Tensor)
    }


def _model_enumerated(model_trace: Trace, guide_trace: Trace) -> Dict[str, Any]:
    return {
        name: site
        for name, site in sample_sites(model_trace)
        if name not in guide_trace.nodes and site["infer"].get("_enumerate_dim") is not None
    }


def _structure(terms: Terms) -> int:
    """The same for runs with the same sites in the same plates, with the same dims."""
    return hash(
        tuple(
            (name, terms.ordering[name], site["packed"]["log_prob"]._pyro_dims)
            for trace in (terms.guide_trace, terms.model_trace)
            for name, site in sample_sites(trace)
        )
    )


class OutsidePlates:
    """
    Runs model and guide, watches some of the runs, and remembers what was found.

    The first run of each structure is watched. If a cost comes after a site that it must
    not depend on, it might depend on it in another run: then all are watched if Python
    has read a number that was drawn, which may have decided what it did, and one of
    :data:`PERIOD` if not.
    """

    def __init__(self) -> None:
        #: What was found. The guide sites are to have a single draw.
        self.dependents: Dependents = {}
        #: The same in words, by guide site.
        self.reasons: Dict[str, str] = {}
        #: Whether there were runs, and none had weights.
        self.is_idle = False
        self._is_due = True  # the next run is to be watched
        self._periods: Dict[int, float] = {}  # by structure
        self._num_unwatched = 0

    def get_terms(
        self, get_traces: Callable[..., Tuple[Trace, Trace]], traces: LifoQueue
    ) -> Iterator[Terms]:
        """
        The runs of a particle: one, but for sites that are enumerated in a loop.

        :param get_traces: makes packed traces of model and guide, under handlers of
            theirs if given.
        :param traces: the queue from which the guide takes traces to complete.
        """
        is_watched, is_begun = self._is_due, False
        kept: List[Terms] = []
        generators = get_torch_generators()
        traces.put(Trace())
        while not traces.empty():
            terms = self._get_terms(get_traces, is_watched, is_begun)
            if terms is None:
                # The particle begins anew, and with the same random numbers: a rare
                # structure would be rarer, were it not used when it is first seen.
                set_torch_generators(generators)
                traces.queue.clear()
                traces.put(Trace())
                is_watched, kept = self._is_due, []
            elif is_watched:
                kept.append(terms)
            else:
                is_begun = True
                yield terms
        yield from kept

    def _get_terms(
        self, get_traces: Callable[..., Tuple[Trace, Trace]], is_watched: bool, must: bool
    ) -> Optional[Terms]:
        """
        :param must: whether another run of the particle is in use already.
        :return: None if the run is of no use.
        """
        provenance = Provenance() if is_watched else None
        with provenance or nullcontext():
            pair = _watch(get_traces, provenance) if provenance else get_traces()
            has_weights = pair[1].run.has_weights  # type: ignore[attr-defined]
            self.is_idle = not (has_weights or self._periods)
            if not has_weights:
                return Terms(*pair)
            if self._remember(find_below_model_enumeration(*pair)) and not must:
                return None
            terms = Terms(*pair, *compute_costs(*pair), provenance)
        return terms if self._accept(terms) or must else None

    def _remember(self, found: Dependents) -> bool:
        """:return: whether any of it is new."""
        is_new = False
        for name, sites in found.items():
            known = self.dependents.setdefault(name, set())
            is_new |= not sites <= known
            known |= sites
            users = (f"'{site}'" if site else "a sum over model sites" for site in sorted(known))
            self.reasons[name] = (
                "used outside of its plates, summed up or read as a number for " + ", ".join(users)
            )
        return is_new

    def _accept(self, terms: Terms) -> bool:
        structure = _structure(terms)
        is_new = structure not in self._periods
        provenance = terms.provenance
        if provenance is not None:
            self._num_unwatched = 0
            check_particles(terms, provenance)
            if self._remember(find_dependents(terms, provenance)):
                self._is_due = True
                return False
            period = 1 if provenance.has_read else PERIOD
            may_have = may_have_dependents(terms, self.dependents)
            self._periods[structure] = period if may_have else math.inf
        elif is_new and _weighted_sites(terms.guide_trace):
            self._is_due = True
            return False
        self._num_unwatched += 1
        self._is_due = is_new or self._num_unwatched >= self._periods[structure]
        return True


def _watch(get_traces: Callable, provenance: Provenance) -> Tuple[Trace, Trace]:
    """Makes traces whose log probabilities are marked by what they were computed from."""
    handlers = [ProvenanceMessenger(provenance) for _ in range(2)]
    pair = get_traces(*handlers)
    for trace, handler in zip(pair, handlers):
        for name, site in sample_sites(trace):
            # What is read by now was read to compute log probabilities.
            read = handler.read.get(name, 0) | provenance.read
            provenance.add(site["log_prob"], read)
            provenance.add(site["unscaled_log_prob"], read)
    return pair
