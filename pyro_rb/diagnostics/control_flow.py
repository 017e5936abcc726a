# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What :class:`~pyro.infer.tracegraph_elbo.TraceGraph_ELBO` cannot see."""

from typing import Any, Callable, List, Set

from pyro.infer import TraceGraph_ELBO
from pyro.ops.provenance import get_provenance

from pyro_rb.diagnostics.sites import latent_sites
from pyro_rb.infer.util import sample_sites


def without_dependents(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> List[str]:
    """
    Sites of the guide without a reparameterised draw, on which no other site depends as far as
    :class:`~pyro.infer.tracegraph_elbo.TraceGraph_ELBO` knows. It follows tensors. What a value
    decides by ``if``, ``while``, ``range()`` or ``.item()`` it takes for independent of it,
    leaves it out of the costs of that site, and its gradient is biased.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     loc = 1.0 if z > 0 else -1.0
    ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(0.2))
    >>> without_dependents(model, guide)
    ['z']
    """
    traces = TraceGraph_ELBO()._get_traces(model, guide, args, kwargs)
    model_trace, guide_trace = next(iter(traces))
    seen: Set[str] = set()
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        for name, site in sample_sites(trace):
            seen |= get_provenance(site["log_prob"]) - {name}
    scored = [n for n, s in latent_sites(guide_trace) if not getattr(s["fn"], "has_rsample", False)]
    return [name for name in scored if name not in seen]
