# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What takes the place of ``-log q`` in the surrogate: the path gradients of guide sites.

With ``l`` the log density of a site, weighted and summed, and ``c`` the scale of its
score, ``-l`` becomes ``-(1 - c) l - c <dl/dz, z>``, with the derivative by all draws
``z``, at fixed parameters, and detached. A site without a path gradient of its own whose
score has a baseline has ``c = 1``: its score has mean zero, but what its density passes
on to earlier draws is needed for the noise to vanish at the optimum.
"""

from typing import Any, Dict, Mapping, Union

import torch

from pyro_rb.ops.quiet_grad import quiet_grad
from pyro_rb.poutine import PathGradient

#: Of a score. A tensor of no dims in a graph that is used again, where it is learned.
Scale = Union[float, torch.Tensor]


def is_exactly(scale: Scale, value: float) -> bool:
    """Whether a scale is known to have a value."""
    return not isinstance(scale, torch.Tensor) and scale == value


def rest_of(scale: Scale, term: torch.Tensor, whole: float) -> torch.Tensor:
    """``whole - scale`` times a term."""
    rest = whole - scale
    return (rest.to(term) if isinstance(rest, torch.Tensor) else rest) * term


def _as_tensor(scale: Scale, term: torch.Tensor) -> torch.Tensor:
    """Of the shape and the type of a term."""
    if isinstance(scale, torch.Tensor):
        return scale.to(term).expand(term.shape)
    return torch.full_like(term, scale)


def path_terms(
    log_q: Mapping[str, torch.Tensor], path: PathGradient, scales: Mapping[str, Scale]
) -> Dict[str, torch.Tensor]:
    """
    :param log_q: the log density of each site, weighted, a scalar.
    :param path: has tapped the draws.
    :param scales: of the score of each of the sites.
    :return: ``<sum of c dl/dz, z>`` for each tapped draw.
    """
    log_q = {
        n: term for n, term in log_q.items() if term.requires_grad and not is_exactly(scales[n], 0.0)
    }
    if not log_q:
        return {}
    weights = None
    if not all(is_exactly(scales[name], 1.0) for name in log_q):
        weights = [_as_tensor(scales[name], term) for name, term in log_q.items()]
    draws = path.values
    partials: Any
    with path.closed():
        outputs = list(log_q.values())
        known = path.find_partial(outputs)
        if known is not None:
            partials = [known if weights is None else weights[0] * known]
        else:
            partials = quiet_grad(outputs, list(draws.values()), weights, between=outputs)
    return {
        name: partial.reshape(-1) @ z.reshape(-1) if z.dim() else partial * z
        for (name, z), partial in zip(draws.items(), partials)
        if partial is not None
    }
