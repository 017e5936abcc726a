# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Traces of model and guide: how they are made, checked, packed, and taken apart into the terms of the ELBO.
"""

from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Tuple

import torch
from pyro import poutine
from pyro.infer.traceenum_elbo import shared_intermediates
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape

from pyro_rb.infer.util import check_tmc_elbo_constraint, compute_model_factors
from pyro_rb.ops.transforms import is_inside_of_func

#: The plate that Pyro puts around vectorized particles.
PARTICLES = "num_particles_vectorized"
#: Names of the vectorized plates that a site is in, as symbols.
Ordinal = FrozenSet[str]


def sample_sites(trace: Trace) -> Iterator[Tuple[str, Any]]:
    """Names and sites of a trace, of type sample: latent, observed and subsampling."""
    return ((n, site) for n, site in trace.nodes.items() if site["type"] == "sample")


def shapes(*traces: Trace) -> Tuple:
    """Of log densities and values, with the names of the sites."""
    return tuple(
        (name, site["log_prob"].shape, getattr(site["value"], "shape", None))
        for trace in traces
        for name, site in sample_sites(trace)
    )


def site_values(*traces: Trace) -> List[torch.Tensor]:
    """The tensors that sample statements and :func:`pyro.param` statements returned."""
    nodes = [site for trace in traces for site in trace.nodes.values()]
    values = [site["value"] for site in nodes if site["type"] in ("sample", "param")]
    return [value for value in values if isinstance(value, torch.Tensor)]


def is_guide_messenger(guide: Any) -> bool:
    """Whether a guide runs the model inside of itself."""
    return isinstance(poutine.unwrap(guide), Messenger)


def get_traces(model: Any, guide: Any, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[Trace, Trace]:
    """Runs a guide, and a model against it, as ``pyro.infer.enum.get_importance_trace`` does."""
    if is_guide_messenger(guide):
        guide(*args, **kwargs)
        return poutine.unwrap(guide).get_traces()  # type: ignore[attr-defined]
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def prune(model_trace: Trace, guide_trace: Trace, max_plate_nesting: Any) -> Tuple[Trace, Trace]:
    """
    What ``pyro.infer.enum.get_importance_trace`` does before it computes log densities: compares
    the traces, if validation is on, and leaves out subsampling.
    """
    if is_validation_enabled():
        model, guide = (_pad_shapes(trace, max_plate_nesting) for trace in (model_trace, guide_trace))
        check_model_guide_match(model, guide, max_plate_nesting)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def _pad_shapes(trace: Trace, max_plate_nesting: Any) -> Trace:
    """
    A trace for a comparison of shapes. Of a shape that is longer than ``max_plate_nesting`` and shorter
    than that and the event together, Pyro would drop dims of the event.
    """
    short: Dict[str, Any] = {}
    for name, site in sample_sites(trace):
        event_dim = getattr(site["fn"], "event_dim", 0)
        shape = site["fn"].shape(*site["args"], **site["kwargs"]) if event_dim > 1 else ()
        num_missing = max_plate_nesting + event_dim - len(shape)
        if max_plate_nesting < len(shape) and num_missing > 0:
            short[name] = {**site, "fn": _Shaped(event_dim, (1,) * num_missing + shape)}
    if not short:
        return trace
    padded = trace.copy()
    padded.nodes.update(short)
    return padded


class _Shaped(NamedTuple):
    """Stands for a distribution, where only its shape matters."""

    event_dim: int
    sizes: Tuple[int, ...]

    def shape(self, *args: Any, **kwargs: Any) -> torch.Size:
        return torch.Size(self.sizes)


def check_traces(model_trace: Trace, guide_trace: Trace, max_plate_nesting: Any, enumerates: bool) -> None:
    """
    What ``Trace_ELBO``, or ``TraceEnum_ELBO``, checks of traces with log densities, if
    validation is on; but for warnings that a site outside of a plate comes after one
    inside, which need not depend on it.
    """
    if is_validation_enabled():
        for _, site in [*sample_sites(model_trace), *sample_sites(guide_trace)]:
            check_site_shape(site, max_plate_nesting)
        if enumerates:
            check_tmc_elbo_constraint(model_trace, guide_trace)
        else:
            check_if_enumerated(guide_trace)


def pack_traces(model_trace: Trace, guide_trace: Trace) -> None:
    """
    Names the dims of densities by plates and sites, as terms of different weights need.

    :raises ValueError: naming a site, if its density has a dim that is that of no plate.
    """
    try:
        guide_trace.pack_tensors()
        model_trace.pack_tensors(guide_trace.plate_to_symbol)
    except ValueError as e:
        for name, site in [*sample_sites(guide_trace), *sample_sites(model_trace)]:
            shape = tuple(site["log_prob"].shape)
            known = {*site["infer"].get("_dim_to_symbol", ())}
            if any(size > 1 and i - len(shape) not in known for i, size in enumerate(shape)):
                dims = sorted(f.dim for f in site["cond_indep_stack"] if f.vectorized)
                raise ValueError(
                    f"Found log densities of shape {shape} at site '{name}', which has plates at the dims "
                    f"{dims}. Expected a plate for each dim of a size other than 1, since some sites "
                    "have several values, whose weights are by plate. Often an observation "
                    "of shape [N, 1] has a mean of shape [N]: give both the same shape, or make the dim part "
                    "of the event by .to_event(). Or use STLTrace_ELBO, R2G2_ELBO or Trace_ELBO, which add up all "
                    "elements, whatever they belong to."
                ) from e
        raise


class Cost(NamedTuple):
    """A term of the ELBO, as ``TraceEnum_ELBO`` takes its expectation."""

    #: The site of model or guide. Empty for a sum over sites that the model enumerates.
    site: str
    ordinal: Ordinal
    #: Packed.
    value: Any


def compute_costs(model_trace: Trace, guide_trace: Trace) -> Tuple[List[Cost], Dict[str, Ordinal]]:
    """
    The terms of the ELBO, of which ``pyro.infer.util.Dice`` takes the expectation.

    :param model_trace: packed, as by ``pack_tensors``.
    :param guide_trace: likewise.
    :return: log probabilities of the model, in which sites that the model enumerates are
        summed out, and negative ones of the guide; and the ordinal of each site.
    """
    names = {id(site["packed"]["log_prob"]): n for n, site in sample_sites(model_trace)}
    terms, log_factors, ordering, sum_dims, scale = compute_model_factors(model_trace, guide_trace)
    costs = [Cost(names[id(x)], t, x) for t, xs in terms.items() for x in xs]
    if log_factors and is_inside_of_func():
        summed = [
            name
            for name, site in sample_sites(model_trace)
            if name not in guide_trace and site["infer"].get("_enumerate_dim") is not None
        ]
        raise NotImplementedError(
            f"Found torch.func around a model that enumerates the sites {summed}, whose sums Pyro does "
            "not compute there. Expected these sites in the guide, or loss.backward()."
        )
    if log_factors:
        dim_to_size = {
            dim: size
            for terms in log_factors.values()
            for term in terms
            for dim, size in zip(term._pyro_dims, term.shape)
        }
        with shared_intermediates() as cache:
            ring = SampleRing(cache=cache, dim_to_size=dim_to_size)
            log_factors = contract_tensor_tree(log_factors, sum_dims, ring=ring)
        for ordinal, terms in log_factors.items():
            scaled = [packed.scale_and_mask(term, scale=scale) for term in terms]
            costs.extend(Cost("", ordinal, term) for term in scaled)
    for name, site in sample_sites(guide_trace):
        costs.append(Cost(name, ordering[name], packed.neg(site["packed"]["log_prob"])))
    return costs, ordering
