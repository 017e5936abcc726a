# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Log densities of the sites of a trace: where they are known without ``fn.log_prob``, and their scale."""

from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine import Trace
from pyro.poutine.util import is_validation_enabled
from pyro.util import warn_if_inf, warn_if_nan

from pyro_rb.ops.importance import unsqueeze_right
from pyro_rb.ops.zuko import as_transformed


def put_log_prob(site: Any, log_prob: torch.Tensor) -> None:
    """
    Puts the log density of a draw by ``rsample``, or an observation, into a site of a trace, as
    ``Trace.compute_score_parts`` does, with its warnings.
    """
    parts = ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]
    site["unscaled_log_prob"] = log_prob
    site["score_parts"] = parts = parts.scale_and_mask(site["scale"], site["mask"])
    site["log_prob"] = parts.log_prob
    site["log_prob_sum"] = total = parts.log_prob.sum()
    if is_validation_enabled():
        # These warn of gradients too, so that finite values need them as well.
        where = f"log_prob_sum at site '{site['name']}'"
        warn_if_nan(total, where)
        warn_if_inf(total, where, allow_neginf=True)


def compute_score_parts(guide_trace: Trace) -> None:
    """
    What ``guide_trace.compute_score_parts()`` computes. The elements of a value that a ``Delta``
    has drawn are not compared to those that it was made with: autoguides have such a site for each
    latent, and a network has its weights in them.
    """
    site: Any
    for site in guide_trace.nodes.values():
        if site["type"] == "sample" and "score_parts" not in site and _is_drawn_delta(site):
            put_log_prob(site, site["fn"].log_density)
    guide_trace.compute_score_parts()


def _is_drawn_delta(site: Any) -> bool:
    fn, value = site["fn"], site["value"]
    return (
        type(fn) is Delta
        and fn.log_density.shape == fn.batch_shape
        # Of integers or bits the density has another type than the log density that was given.
        and fn.log_density.dtype == fn.v.dtype
        and fn.v.is_floating_point()
        and isinstance(value, torch.Tensor)
        and _is_same(value, fn.v)
    )


def _is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are known to have the same elements in the same memory."""
    if x is y:
        return True
    bases = [z if z._base is None else z._base for z in (x, y)]
    return (
        bases[0] is bases[1]
        and x.dtype == y.dtype
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.storage_offset() == y.storage_offset()
    )


def find_density_scale(site: Any) -> Any:
    """
    The factor by which ``scale`` and all masks multiply the log density of a site's draw.

    :param site: of a trace, with a ``log_prob``.
    :return: a float, or a tensor that can be broadcast to the draw, or None if the factor
        has a gradient, or a mask is inside of a transform.

    >>> import pyro, pyro.distributions as dist
    >>> with pyro.poutine.trace() as tp, pyro.poutine.scale(scale=0.5):
    ...     _ = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> find_density_scale(tp.trace.nodes["z"])
    0.5
    """
    fn = site["fn"]
    mask = 1.0 if site["mask"] is None else site["mask"]
    factor = _sum_to(site["scale"] * mask, fn.batch_shape)
    if isinstance(factor, torch.Tensor):
        factor = unsqueeze_right(factor, fn.event_dim)
    layer, is_transformed = as_transformed(fn), False
    while layer is not None:
        if isinstance(layer, MaskedDistribution):
            if is_transformed:
                return None
            mask = layer._mask
            if isinstance(mask, torch.Tensor):
                mask = unsqueeze_right(mask, layer.event_dim)
            factor = factor * mask
        is_transformed |= isinstance(layer, torch.distributions.TransformedDistribution)
        layer = getattr(layer, "base_dist", None)
    if not isinstance(factor, torch.Tensor):
        return float(factor)
    return None if factor.requires_grad else factor


def _sum_to(factor: Any, batch_shape: torch.Size) -> Any:
    """A larger batch of factors than of draws multiplies each draw's density by their sum."""
    if not isinstance(factor, torch.Tensor):
        return factor
    shape = torch.broadcast_shapes(factor.shape, batch_shape)
    return factor if shape == batch_shape else factor.expand(shape).sum_to_size(batch_shape)
