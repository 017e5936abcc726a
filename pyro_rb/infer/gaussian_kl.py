# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Analytic entropies and expected log priors of Gaussian guide sites, in finished traces."""

import math
from typing import Any, Optional, Set

import torch
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from torch.distributions import kl_divergence

from pyro_rb.ops.gaussian import strip_independent
from pyro_rb.poutine import R2G2Messenger
from pyro_rb.poutine.gaussian_site import View


def replace_kl(
    model_trace: Trace, guide_trace: Trace, handler: R2G2Messenger
) -> Set[str]:
    """
    Puts the mean of the log density in the place of its value, in the terms that are
    differentiated, of the guide sites that a handler drew, and of the model's sites whose
    prior allows it. ``log_prob`` stays, as factors of score functions are made of it.

    :return: names of the guide sites of which a log prior is left as it is.
    """
    for name, drawn in handler.sites.items():
        site: Any = guide_trace.nodes[name]
        entropy = drawn.draw.entropy(len(site["fn"].batch_shape))
        term = scale_and_mask(-entropy, site["scale"], site["mask"])
        site["log_prob_sum"] = term.sum()
        site["score_parts"] = site["score_parts"]._replace(entropy_term=term)

    left = set()
    latest = -1
    for name, site in model_trace.iter_stochastic_nodes():
        view = handler.find(site["value"])
        order = handler.order.get(name if view is None else view.site.name)
        if view is not None and order is not None:
            expected = None
            # The prior depends on earlier sites, which must not depend on this noise.
            if latest < order or (latest == order and _is_apart(view, site["fn"])):
                expected = _expected_log_prob(name, site["fn"], view, guide_trace)
            if expected is None:
                left.add(view.site.name)
            else:
                term = scale_and_mask(expected, site["scale"], site["mask"])
                site["log_prob_sum"] = term.sum()
        if order is not None:
            latest = max(latest, order)
    return left


def _is_apart(view: View, prior: Any) -> bool:
    """Whether the noise of a value is not that of others of its site, in the prior."""
    if view.site.draw.is_diagonal:
        return True
    base = strip_independent(prior)
    parameters = [getattr(base, name, None) for name in base.arg_constraints]
    return not any(isinstance(p, torch.Tensor) and p.requires_grad for p in parameters)


def _expected_log_prob(
    name: str, prior: Any, view: View, guide_trace: Trace
) -> Optional[torch.Tensor]:
    """In the shape of the prior's batch; None if there is no formula."""
    base, draw = strip_independent(prior), view.site.draw
    if type(base).log_prob is torch.distributions.Normal.log_prob:
        loc, variance = view.replay(draw.loc), view.replay(draw.variance)
        if prior.batch_shape + prior.event_shape != loc.shape:
            return None
        square = (loc - base.loc).square() + variance
        expected = -0.5 * square / base.scale.square() - base.scale.log()
        return sum_rightmost(expected - 0.5 * math.log(2 * math.pi), prior.event_dim)
    if view.tensor is not draw.value or name != view.site.name:
        return None
    guide: Any = guide_trace.nodes[name]["fn"]
    is_real = strip_support(prior) in (constraints.real, constraints.real_vector)
    if not is_real or guide.batch_shape != prior.batch_shape:
        return None
    try:
        kl = kl_divergence(guide, prior)
    except NotImplementedError:
        return None
    return -kl - draw.entropy(len(prior.batch_shape))


def strip_support(fn: Any) -> Any:
    """The support of a distribution, of one element if it is a product."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
