# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A model and guide that are ready to be run, again and again: :func:`prepared`."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Mapping, Optional

import torch
from torch import Tensor

from pyro_rb.diagnostics.run.arguments import Arguments
from pyro_rb.diagnostics.run.sampler import GradientSampler
from pyro_rb.diagnostics.run.sites import (
    Sites,
    check_sites,
    leaves,
    parameters_of,
    read_sites,
    run_traces,
    settle_plates,
)
from pyro_rb.diagnostics.run.state import Snapshot, preserve_state
from pyro_rb.infer.generators import seed_generators


@dataclass(frozen=True)
class Problem:
    """
    A model and guide with their arguments, run once. See :func:`prepared`.

    :param Sites sites: What that has shown.
    :param dict parameters: As :func:`~pyro_rb.diagnostics.run.parameters.find_parameters` returns them.
    :param bool any_site: Whether any of them is a ``pyro.param`` site.
    :param int seed: By which the first run was seeded.
    """

    model: Callable
    guide: Callable
    args: Arguments
    kwargs: Dict[str, Any]
    sites: Sites
    parameters: Dict[str, Tensor]
    any_site: bool
    seed: int
    snapshot: Snapshot

    def sampler(self, loss: Any) -> GradientSampler:
        """Draws gradients of a loss."""
        settle_plates(loss, self.sites)
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
    """
    kwargs = dict(kwargs or {})
    with preserve_state(model, guide, args, kwargs) as snapshot:
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        seed_generators(seed)
        with snapshot.watch():
            traces = run_traces(model, guide, args, kwargs)
        snapshot.add_tensors(leaves(traces))
        if must_match:
            check_sites(traces)
        found, any_site = parameters_of(traces, model, guide)
        found = found if parameters is None else dict(parameters)
        _check_parameters(found)
        sites = read_sites(traces)
        del traces  # the values at all sites, and a graph
        yield Problem(model, guide, args, kwargs, sites, found, any_site, seed, snapshot)


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ValueError(
            "model and guide have no parameter that requires a gradient: "
            "expected a pyro.param() or a torch.nn.Parameter in one of them"
        )
    for name, tensor in parameters.items():
        if not (tensor.is_leaf and tensor.requires_grad):
            raise ValueError(
                f"parameters[{name!r}] is not a leaf that requires a gradient; "
                "of a constrained parameter give the unconstrained tensor, "
                "pyro.param(name).unconstrained()"
            )
