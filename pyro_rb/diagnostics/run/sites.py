# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What kinds of latent sites a model and guide have: :func:`read_sites`."""

import math
from typing import Any, List, NamedTuple, Tuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.util import site_is_subsample

from pyro_rb.infer.run_mixin import RunMixin


class Sites(NamedTuple):
    """
    Names of latent sites, as read from a pair of traces.

    :param list discrete: In the guide.
    :param list countable: Those of them that Pyro can enumerate.
    :param list annotated: Those of them for which ``infer["enumerate"]`` is set.
    :param list scored: In the guide, without a reparameterised draw.
    :param list jacobians: In the guide: Deltas with a log density.
    :param list summed: In the model only, which it enumerates.
    """

    discrete: List[str]
    countable: List[str]
    annotated: List[str]
    scored: List[str]
    jacobians: List[str]
    summed: List[str]


def read_sites(traces: Tuple[poutine.Trace, poutine.Trace]) -> Sites:
    """
    Reads latent sites from traces.

    :param traces: Of guide and model.
    :rtype: Sites
    """
    guide, model = (latent_sites(trace) for trace in traces)
    names = {name for name, _ in guide}
    discrete = [(name, site) for name, site in guide if _is_discrete(site["fn"])]
    countable = [(name, site) for name, site in discrete if site["fn"].has_enumerate_support]
    return Sites(
        discrete=[name for name, _ in discrete],
        countable=[name for name, _ in countable],
        annotated=[name for name, site in countable if site["infer"].get("enumerate")],
        scored=[name for name, site in guide if not _is_reparameterized(site["fn"])],
        jacobians=[name for name, site in guide if _has_log_density(site["fn"])],
        summed=[
            name
            for name, site in model
            if name not in names and (site["infer"] or {}).get("enumerate")
        ],
    )


def enclosing_subsamples(traces: Tuple[poutine.Trace, poutine.Trace]) -> List[str]:
    """
    Names of the plates that subsample and hold all sites, observed ones too.

    :param traces: Of guide and model.
    """
    sites: List[Any] = [s for t in traces for s in t.nodes.values() if s["type"] == "sample"]
    subsampled = {s["name"] for s in sites if site_is_subsample(s) and len(s["value"]) < s["fn"].size}
    held = [{f.name for f in s["cond_indep_stack"]} for s in sites if not site_is_subsample(s)]
    return sorted(name for name in subsampled if all(name in names for names in held))


def settle_plates(loss: Any, traces: Tuple[poutine.Trace, poutine.Trace]) -> None:
    """
    Tells a loss how deep the plates are nested, if it would guess. It would say so in the log, each
    time that one is made.
    """
    guesses = isinstance(loss, (TraceEnum_ELBO, RunMixin)) or getattr(loss, "vectorize_particles", False)
    if guesses and loss.max_plate_nesting == math.inf:
        sites = [site for trace in traces for site in trace.nodes.values()]
        frames = [f for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"]]
        depth = max([-frame.dim for frame in frames if frame.dim is not None], default=0)
        loss.max_plate_nesting = depth + (loss.vectorize_particles and loss.num_particles > 1)


def latent_sites(trace: poutine.Trace) -> List[Tuple[str, Any]]:
    """Sample sites with their names, without observed ones and subsampling."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    ]


def _is_discrete(fn: Any) -> bool:
    if getattr(fn, "has_enumerate_support", False):
        return True
    try:
        return not _is_reparameterized(fn) and bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _is_reparameterized(fn: Any) -> bool:
    return bool(getattr(fn, "has_rsample", False))


def _has_log_density(fn: Any) -> bool:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta) and bool(torch.any(torch.as_tensor(fn.log_density) != 0))
