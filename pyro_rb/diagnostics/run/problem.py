# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A model and guide that are ready to be run, again and again: :func:`prepared`."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from pyro import poutine
from pyro.util import set_rng_seed
from torch import Tensor

from pyro_rb.diagnostics.run.parameters import (
    Arguments,
    check_parameters,
    check_sites,
    parameters_of,
    run_traces,
)
from pyro_rb.diagnostics.run.sampler import GradientSampler
from pyro_rb.diagnostics.run.sites import settle_plates
from pyro_rb.diagnostics.run.state import Snapshot, preserve_state


@dataclass(frozen=True)
class Problem:
    """
    A model and guide with their arguments, run once. See :func:`prepared`.

    :param traces: Of guide and model.
    :param dict parameters: As :func:`~pyro_rb.diagnostics.run.parameters.find_parameters` returns them.
    :param bool any_site: Whether any of them is a ``pyro.param`` site.
    :param int seed: By which the first run was seeded.
    """

    model: Callable
    guide: Callable
    args: Arguments
    kwargs: Dict[str, Any]
    traces: Tuple[poutine.Trace, poutine.Trace]
    parameters: Dict[str, Tensor]
    any_site: bool
    seed: int
    snapshot: Snapshot

    def sampler(self, loss: Any) -> GradientSampler:
        """Draws gradients of a loss."""
        settle_plates(loss, self.traces)
        return GradientSampler(
            loss, self.model, self.guide, self.args, self.kwargs, self.parameters, self.any_site
        )

    def preserved(self) -> Any:
        """A block after which all is as it was before the block."""
        return preserve_state(*self.snapshot.roots)


@contextmanager
def prepared(
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    seed: Optional[int] = None,
    parameters: Optional[Mapping[str, Tensor]] = None,
    must_match: bool = True,
) -> Iterator[Problem]:
    """
    Runs guide and model once. After the block all is as it was found, see
    :func:`~pyro_rb.diagnostics.run.state.preserve_state`.

    :param int seed: Default: taken from torch's generator, which is then put back.
    :param dict parameters: Unconstrained tensors by name. Default: all.
    :param bool must_match: Whether to insist on the same latent sites in both.
    :raises ValueError: If sites do not match, or there is no parameter.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.)), 1.))
    >>> with prepared(model, guide) as problem:
    ...     loss = problem.sampler(Trace_ELBO()).step()
    >>> list(problem.parameters), list(pyro.get_param_store())
    (['loc'], [])
    """
    kwargs = dict(kwargs or {})
    with preserve_state(model, guide, args, kwargs) as snapshot:
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        set_rng_seed(seed)
        with snapshot.watch():
            traces = run_traces(model, guide, args, kwargs)
        snapshot.add_tensors(_leaves(traces))
        if must_match:
            check_sites(traces)
        found, any_site = parameters_of(traces, model, guide)
        found = found if parameters is None else dict(parameters)
        check_parameters(found)
        yield Problem(model, guide, args, kwargs, traces, found, any_site, seed, snapshot)


def _leaves(traces: Tuple[poutine.Trace, poutine.Trace]) -> List[Tensor]:
    """The leaves of the graph behind all sites: what a backward pass gives gradients to."""
    tensors: List[Any] = []
    sites: List[Any] = [s for trace in traces for s in trace.nodes.values() if s["type"] == "sample"]
    for site in sites:
        tensors.append(site["value"])
        try:
            tensors.append(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
        except (ValueError, RuntimeError, NotImplementedError):  # then there is no gradient either
            pass
    queue = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    seen, found = set(queue), []
    while queue:
        function = queue.pop()
        if hasattr(function, "variable"):
            found.append(function.variable)
        following = {parent for parent, _ in function.next_functions if parent is not None} - seen
        seen |= following
        queue.extend(following)
    return found
