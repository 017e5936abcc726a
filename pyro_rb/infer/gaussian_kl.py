# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Analytic entropies and expected log priors of Gaussian guide sites, in traces."""

import math
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from pyro.distributions import constraints
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.poutine import Trace
from torch.distributions import Independent, Normal

from pyro_rb.infer.report import SiteReport
from pyro_rb.infer.traces import sample_sites
from pyro_rb.ops.family import find_kl, is_exactly, strip_independent
from pyro_rb.ops.gaussian import entropy_path, prior_path
from pyro_rb.poutine import Projection
from pyro_rb.poutine.densities import compute_score_parts, put_log_prob
from pyro_rb.poutine.gaussian_site import GaussianSite, View
from pyro_rb.poutine.local_draws import LocalDraws

#: By guide site: sites of model and guide with what the path gradient has beyond the analytic
#: terms, given the results of projected uses. Its gradient has mean zero.
JointTerms = Dict[str, List[Tuple[Any, torch.Tensor]]]


def compute_log_prob(
    model_trace: Trace, guide_trace: Trace, projection: Projection, order: Sequence[str]
) -> Tuple[Set[str], JointTerms]:
    """
    Computes the log densities and score parts of traces that have none so far. Of the
    guide sites that a projection drew, and of the model's sites whose prior allows it, means
    take the place of values in the terms that are differentiated. ``log_prob`` has the
    values where score functions are multiplied with it.

    :return: names of the guide sites of which a log prior has no formula; and what may be added
        to the gradient.
    """
    drawn: List[Any] = []
    joint: JointTerms = {}
    moments = {}
    for name, ours in projection.sites.items():
        if projection.leaves_to_path(ours):
            continue
        site: Any = guide_trace.nodes[name]
        drawn.append(site)
        entropy = ours.draw.entropy(len(site["fn"].batch_shape))
        put_log_prob(site, -entropy)
        if projection.has_path and ours.has_moments:
            moments[name] = ours.moments()
            path = _sum_event(entropy_path(ours.draw, *moments[name]), site["fn"])
            joint[name] = [(site, scale_and_mask(path, site["scale"], site["mask"]))]
    compute_score_parts(guide_trace)
    has_score_function = any(
        not is_identically_zero(site["score_parts"].score_function)
        for site in guide_trace.nodes.values()
        if site["type"] == "sample"
    )

    left = set()
    latest = -1
    position = {name: i for i, name in enumerate(order)}
    for name, site in model_trace.iter_stochastic_nodes():
        view = projection.find(site["value"])
        place = position.get(name if view is None else view.site.name)
        if view is not None and place is not None and not projection.leaves_to_path(view.site):
            expected = None
            # The prior depends on earlier sites, which must not depend on this noise.
            if latest < place or (latest == place and _is_apart(view, site["fn"])):
                expected = _expected_log_prob(name, site["fn"], view, guide_trace)
            if expected is None:
                left.add(view.site.name)
            else:
                put_log_prob(site, expected)
                drawn.append(site)
                prior = strip_independent(site["fn"])
                if view.site.name in moments and is_exactly(prior, Normal):
                    draw = view.site.draw
                    parts = (draw.loc, draw.scale, *moments[view.site.name])
                    path = prior_path([view.replay(x) for x in parts], prior.loc, prior.scale)
                    path = _sum_event(path, site["fn"])
                    path = scale_and_mask(path, site["scale"], site["mask"])
                    joint[view.site.name].append((site, path))
        if place is not None:
            latest = max(latest, place)
    model_trace.compute_log_prob()
    if has_score_function and not projection.has_path:
        with torch.no_grad():
            for site in drawn:
                value = site["fn"].log_prob(site["value"])
                site["log_prob"] = scale_and_mask(value, site["scale"], site["mask"])
    return left, joint


def _is_apart(view: View, prior: Any) -> bool:
    """Whether the noise of a value is not that of others of its site, in the prior."""
    if view.site.draw.is_diagonal:
        return True
    base = strip_independent(prior)
    return is_exactly(base, Normal) and not (base.loc.requires_grad or base.scale.requires_grad)


def _expected_log_prob(
    name: str, prior: Any, view: View, guide_trace: Trace
) -> Optional[torch.Tensor]:
    """In the shape of the prior's batch; None if there is no formula."""
    base, draw = strip_independent(prior), view.site.draw
    if is_exactly(base, Normal):
        loc, variance = view.replay(draw.loc), view.replay(draw.variance)
        if prior.batch_shape + prior.event_shape != loc.shape:
            return None
        mean, scale = _shrink(base.loc), _shrink(base.scale)
        square = (loc - mean).square() + variance
        rest = scale.log() + 0.5 * math.log(2 * math.pi)
        if scale.dim() == 0:  # one for all elements, which need only be added up
            size = prior.event_shape.numel()
            return torch.addcdiv(-size * rest, _sum_event(square, prior), scale.square(), value=-0.5)
        expected = torch.addcdiv(-rest, square, scale.square(), value=-0.5)
        return _sum_event(expected, prior)
    if view.tensor is not draw.value or name != view.site.name:
        return None
    guide: Any = guide_trace.nodes[name]["fn"]
    if guide.batch_shape != prior.batch_shape or not _is_real(prior):
        return None
    guide = strip_independent(guide)
    event_dim = len(base.event_shape) - len(guide.event_shape)
    if event_dim > 0:
        guide = Independent(guide, event_dim)
    kl_divergence = find_kl(guide, base)
    if kl_divergence is None:
        return None
    return -_sum_event(kl_divergence(guide, base), prior) - draw.entropy(len(prior.batch_shape))


def _sum_event(x: torch.Tensor, fn: Any) -> torch.Tensor:
    """Sums over the dims that are right of the batch."""
    event = tuple(range(len(fn.batch_shape), x.dim()))
    return x.sum(event) if event else x


def _shrink(x: torch.Tensor) -> torch.Tensor:
    """One number, for a tensor that was expanded from one."""
    is_one = all(size == 1 or step == 0 for size, step in zip(x.shape, x.stride()))
    return x[(0,) * x.dim()] if is_one and x.numel() else x


def _is_real(fn: Any) -> bool:
    """Whether the density is positive everywhere; False if it does not say."""
    try:
        support = fn.support
    except NotImplementedError:
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def note_uses(
    model_trace: Trace, guide_trace: Trace, projection: Projection
) -> None:
    """Notes what can be seen of a run after it is over."""
    terms: Dict[Tuple[str, str], Any] = {}
    for name, site in sample_sites(model_trace):
        terms["model", name] = (site["value"], [site["log_prob_sum"]])
    has_score_function = False
    for name, site in sample_sites(guide_trace):
        parts = site["score_parts"]
        terms["guide", name] = (site["value"], [parts.score_function, parts.entropy_term])
        if not is_identically_zero(parts.score_function):
            has_score_function = True
    projection.note_hidden_uses(terms)
    if has_score_function:
        projection.note_score_functions()


def describe(
    site: GaussianSite, has_analytic_kl: bool, local: Optional[LocalDraws]
) -> SiteReport:
    treatment = "plain"
    if site.projected is not None:
        treatment = " and ".join(sorted(set(site.treatments.values())))
        if isinstance(site.projected, torch.Tensor):
            share = site.projected.double().mean().item()
            if share < 1.0:
                treatment += f" ({100 * share:.0f} %)"
    reasons = list(site.treatments) + site.reasons
    if not reasons:
        reasons = ["not used"]
    if local is not None and local.record is not None and "local" in treatment:
        reasons.append("rows are independent")
    if local is not None and local.why_shared(site.key):
        reasons.append(f"not local: {local.why_shared(site.key)}")
    if not has_analytic_kl:
        reasons.append("log prior not analytic")
    return SiteReport(site.name, treatment, "; ".join(reasons))
