# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The importance-weighted bound of pairs of traces.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch

from pyro_rb.infer.importance_surrogate import Surrogate
from pyro_rb.infer.traces import sample_sites
from pyro_rb.ops.importance import normalize, stack, sum_to

Traces = Sequence[Tuple[Any, Any]]
#: An item of the sequential plates that hold all sites: its place in each, by name.
Item = Tuple[Tuple[str, int], ...]


class _Part:
    """What one run has of one item: a run is one particle, or all if vectorized."""

    def __init__(self) -> None:
        self.kept: Any = 0.0  # log p, less log q of the sites that are not tapped
        self.log_q: Dict[str, torch.Tensor] = {}  # of the tapped sites

    def log_weight(self) -> Any:
        total = self.kept - sum(self.log_q.values())
        return total.detach() if isinstance(total, torch.Tensor) else total


def _common_plates(traces: Traces) -> Set[Any]:
    """The plates of all sites, in model and guide: their items are independent."""
    stacks = [
        # The counter of a sequential plate tells its items apart.
        {f if f.vectorized else f._replace(counter=0) for f in site["cond_indep_stack"]}
        for pair in traces
        for trace in pair
        for _, site in sample_sites(trace)
    ]
    return set.intersection(*stacks) if stacks else set()


def _find_parts(
    model_trace: Any, guide_trace: Any, plates: Set[Any]
) -> Dict[Item, _Part]:
    dims = {plate.dim for plate in plates if plate.vectorized}
    sequential = {plate.name for plate in plates if not plate.vectorized}
    parts: Dict[Item, _Part] = {}

    def find(site: Any) -> _Part:
        frames = [f for f in site["cond_indep_stack"] if f.name in sequential]
        # A plate that is run through a second time goes on counting.
        item = tuple(sorted((f.name, (f.counter - 1) % f.size) for f in frames))
        return parts.setdefault(item, _Part())

    for _, site in sample_sites(model_trace):
        part = find(site)
        part.kept = part.kept + sum_to(site["log_prob"], dims)
    for name, site in sample_sites(guide_trace):
        part, log_q = find(site), sum_to(site["log_prob"], dims)
        if name in guide_trace.tap.path.values:
            part.log_q[name] = log_q
        else:
            part.kept = part.kept - log_q
    return parts


def compute_bound(traces: Traces, particle_dim: Optional[int]) -> Tuple[float, Surrogate]:
    """
    :param traces: of model and guide, the latter with a ``tap``: a pair for each particle.
    :param particle_dim: the dimension of the particles, if one pair holds all of them.
    :return: minus the bound, and a surrogate for its gradient, which is empty if gradients
        are disabled.
    """
    plates = _common_plates(traces)
    # Subsampling multiplies the bounds of the items, not their log weights.
    ratios = [p.full_size / p.size for p in plates if p.full_size not in (None, p.size)]
    scale = math.prod(ratios)
    runs = [_find_parts(*pair, plates) for pair in traces]
    dim = 0 if particle_dim is None else particle_dim
    log_mean: Any = 0.0
    weights: List[Tuple[List[_Part], torch.Tensor]] = []
    for item in dict.fromkeys(item for run in runs for item in run):
        parts = [run.get(item) or _Part() for run in runs]
        log_weights = [part.log_weight() / scale for part in parts]
        if not any(isinstance(log_weight, torch.Tensor) for log_weight in log_weights):
            continue
        stacked = stack(log_weights) if particle_dim is None else log_weights[0]
        log_means, normalized = normalize(stacked, dim)
        log_mean = log_mean + log_means.sum()
        weights.append((parts, normalized))
    if not weights or not torch.is_grad_enabled():
        return -scale * float(log_mean), Surrogate()
    least = torch.stack([normalized.min() for _, normalized in weights]).min()
    value, least_weight = torch.stack([-scale * log_mean, least]).tolist()
    surrogate = Surrogate(has_zeros=least_weight == 0.0)
    # Where the density is zero its derivatives need not be finite, whatever their weight.
    leave_out = surrogate.has_zeros and value < math.inf
    for parts, normalized in weights:
        rows = normalized.unbind(0) if particle_dim is None else [normalized]
        for part, (_, guide_trace), weight in zip(parts, traces, rows):
            if not leave_out or weight.any():
                surrogate.add(part.kept, part.log_q, weight, scale, guide_trace)
    return value, surrogate
