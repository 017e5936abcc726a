# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The importance-weighted bound of pairs of traces, with the parts of its gradient.
"""

import math
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from pyro_rb.infer.util import sample_sites
from pyro_rb.ops.importance import normalize, stack, sum_to, unsqueeze_right

Traces = Sequence[Tuple[Any, Any]]
Partials = Sequence[Optional[torch.Tensor]]


def _common_plates(traces: Traces) -> Set[Any]:
    """The plates of all sites, in model and guide: their items are independent."""
    stacks = [
        set(site["cond_indep_stack"])
        for pair in traces
        for trace in pair
        for _, site in sample_sites(trace)
    ]
    return set.intersection(*stacks) if stacks else set()


def check_reparameterized(guide_trace: Any) -> None:
    for name, site in sample_sites(guide_trace):
        score_function = site["score_parts"].score_function
        if getattr(score_function, "requires_grad", False):
            raise NotImplementedError(
                f"The guide draws site '{name}' from {type(site['fn']).__name__} without a "
                "(full) reparameterization, and its log_prob depends on a parameter. Expected "
                "a distribution with rsample; RenyiELBO would leave that parameter without a "
                "gradient. Enumerate or marginalize the site, fix its parameters, or use "
                "Trace_ELBO or STLTrace_ELBO, whose objective is the ELBO."
            )


class Draw(NamedTuple):
    """The tapped value of one site in one run, with its normalized weights."""

    site: str
    value: torch.Tensor  # batch_shape + event_shape
    log_q: torch.Tensor  # by item
    weight: torch.Tensor  # by item, detached
    event_dim: int

    @property
    def weighted_log_q(self) -> torch.Tensor:
        return (self.weight * self.log_q).sum()

    @property
    def broad_weight(self) -> torch.Tensor:
        """Can be broadcast to ``value``."""
        return unsqueeze_right(self.weight, self.event_dim)


class Surrogate:
    """
    The parts of the loss whose gradient is wanted: ``kept``, the weighted sum of all log
    densities but those of the tapped sites, with the sign of a loss; and the draws.
    """

    def __init__(self) -> None:
        self.kept: Any = 0.0
        self.draws: List[Draw] = []
        self._taps: List[Any] = []

    def add(self, run: "_Run", weight: torch.Tensor) -> None:
        self.kept = self.kept - (weight * run.kept).sum()
        self._taps.append(run.tap)
        for name, log_q in run.log_q.items():
            # In a loop, a particle may lack dimensions of size 1 that others have.
            own = weight.reshape(log_q.shape)
            draw = Draw(name, run.tap.path.values[name], log_q, own, run.event_dims[name])
            self.draws.append(draw)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within, nothing flows through a draw into what it was made of."""
        with ExitStack() as gates:
            for tap in self._taps:
                gates.enter_context(tap.path.closed())
            yield

    def partials_of_kept(self) -> List[torch.Tensor]:
        """Derivatives of ``kept`` by each draw, at fixed parameters and other draws."""
        return self._partials([self.kept], [None])

    def partials_of_log_q(self) -> List[torch.Tensor]:
        """The same of the sum of ``weighted_log_q``."""
        terms = [d for d in self.draws if d.log_q.requires_grad]
        return self._partials([d.log_q for d in terms], [d.weight for d in terms])

    def _partials(self, terms: List[Any], weights: List[Any]) -> List[torch.Tensor]:
        values = [draw.value for draw in self.draws]
        if not any([getattr(term, "requires_grad", False) for term in terms]):
            return [torch.zeros_like(z) for z in values]
        with self.closed():
            found = torch.autograd.grad(
                terms, values, weights, retain_graph=True, allow_unused=True
            )
        return [torch.zeros_like(z) if g is None else g for z, g in zip(values, found)]


class _Run(NamedTuple):
    """One pair of traces: one particle, or all of them if vectorized. By item."""

    tap: Any
    event_dims: Dict[str, int]  # of the tapped sites
    log_q: Dict[str, torch.Tensor]  # of the tapped sites
    kept: Any  # log p, less log q of the other sites
    log_weight: Any  # detached


def _compute_run(model_trace: Any, guide_trace: Any, dims: Set[int]) -> _Run:
    tap, log_q = guide_trace.tap, {}
    kept: Any = 0.0
    for _, site in sample_sites(model_trace):
        kept = kept + sum_to(site["log_prob"], dims)
    for name, site in sample_sites(guide_trace):
        term = sum_to(site["log_prob"], dims)
        if name in tap.path.values:
            log_q[name] = term
        else:
            kept = kept - term
    event_dims = {name: guide_trace.nodes[name]["fn"].event_dim for name in log_q}
    log_weight: Any = kept - sum(log_q.values())
    if isinstance(log_weight, torch.Tensor):
        log_weight = log_weight.detach()
    return _Run(tap, event_dims, log_q, kept, log_weight)


def compute_bound(traces: Traces, particle_dim: Optional[int]) -> Tuple[float, Surrogate]:
    """
    :param traces: of model and guide, the latter with a ``tap``: a pair for each particle.
    :param particle_dim: the dimension of the particles, if one pair holds all of them.
    :return: minus the bound, and a surrogate for its gradient.
    """
    plates = _common_plates(traces)
    dims = {plate.dim for plate in plates if plate.vectorized}
    # Subsampling multiplies the bounds of the items, not their log weights.
    ratios = [p.full_size / p.size for p in plates if p.full_size not in (None, p.size)]
    scale = math.prod(ratios)
    runs = [_compute_run(*pair, dims) for pair in traces]
    surrogate = Surrogate()
    if not any(isinstance(run.log_weight, torch.Tensor) for run in runs):
        return 0.0, surrogate  # there are no sites
    log_weights = [run.log_weight / scale for run in runs]
    if particle_dim is None:
        log_mean, stacked = normalize(stack(log_weights), 0)
        weights = list(stacked.unbind(0))
    else:
        log_mean, weight = normalize(log_weights[0], particle_dim)
        weights = [weight]
    for run, weight in zip(runs, weights):
        surrogate.add(run, weight)
    return -scale * log_mean.sum().item(), surrogate
