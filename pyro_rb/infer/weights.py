# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
How much each term of the ELBO counts, where guide sites hold several values or need a
score function.

Pyro's ``Dice`` weighs the terms by the product of the weights of slots. It does so on
tensors without a graph: its derivative with respect to a term is the weight of the term,
and that with respect to the weight of a slot is the downstream cost, from which the score
part of the gradient is made.
"""

from typing import Any, Collection, Dict, List, NamedTuple, Optional, Tuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.poutine import Trace

from pyro_rb.infer.gaussian_kl import JointTerms
from pyro_rb.infer.outside_plates import Dependents, Terms
from pyro_rb.infer.particle_baseline import Draw
from pyro_rb.infer.traces import PARTICLES, Ordinal, sample_sites
from pyro_rb.infer.util import compute_baseline
from pyro_rb.ops.antithetic import pair_score
from pyro_rb.ops.topk import Slots
from pyro_rb.ops.topk_baseline import (
    leave_one_out_baseline,
    probe_baseline,
    score_coefficients,
)
from pyro_rb.ops.transforms import is_inside_of_func, outside_of_transforms, plain
from pyro_rb.poutine.topk_table import as_bits

Group = Tuple[Ordinal, str]  # an ordinal and packed dims: costs of a group have one weight


class Baselines(NamedTuple):
    """What is subtracted from costs, at sites that do not say so themselves."""

    #: For slots; None is for no baseline at all.
    kind: Optional[str]
    num_particles: int

    def over_particles(self, site: Any) -> bool:
        """Whether a site has the mean cost of the other particles for its baseline."""
        is_left = site["infer"].get("rao_blackwell") is False
        has_others = self.kind is not None and self.num_particles > 1 and not is_left
        return has_others and is_single_draw(site) and not has_own_baseline(site)

    def any(self, site: Any) -> bool:
        is_treated = _is_paired(site) or self.kind is not None and "_topk" in site["infer"]
        return is_treated or has_own_baseline(site) or self.over_particles(site)


def _score_function(site: Any) -> Any:
    """
    ``log q`` of a site that has a score function, neither scaled nor masked; for antithetic pairs
    what takes its place.
    """
    if _is_paired(site):
        dim, fn = site["infer"]["_enumerate_dim"], site["fn"]
        return pair_score(site["value"], as_bits(fn).logits, dim, fn.event_dim)
    return site["score_parts"].score_function


def _is_paired(site: Any) -> bool:
    return site["infer"].get("_is_paired", False)


def is_single_draw(site: Any) -> bool:
    """Whether a site of a guide has a score, and neither slots nor other values."""
    is_drawn = site["infer"].get("enumerate") is None and not site["is_observed"]
    return is_drawn and not getattr(site["fn"], "has_rsample", False)


def has_own_baseline(site: Any) -> bool:
    """Whether ``infer={"baseline": ...}`` is to be followed: where there is a score."""
    is_drawn = is_single_draw(site) or "_topk" in site["infer"]
    return is_drawn and bool(site["infer"].get("baseline"))


def set_apart(
    guide_trace: Any, baselines: Baselines, tapped: Collection[str], joint: JointTerms
) -> None:
    """
    Detaches ``log q`` in the cost of each site that has a path gradient or a baseline. Its
    own gradient has mean zero, and would be the only noise left where the guide is the
    posterior. What was there, packed, is in ``guide_trace.apart``.

    :param tapped: names of the sites with a path gradient.
    :param joint: further terms, which are no cost.
    """
    guide_trace.apart = {}
    guide_trace.joint = {
        name: [(s["name"], packed.pack(x, s["infer"]["_dim_to_symbol"])) for s, x in terms]
        for name, terms in joint.items()
    }
    for name, site in sample_sites(guide_trace):
        if name in tapped or baselines.any(site):
            log_prob = site["packed"]["log_prob"]
            cost, apart = log_prob.detach(), log_prob
            if getattr(site["scale"], "requires_grad", False):  # a gradient of another mean, which stays
                cost, apart = _split_scale(site)
            site["packed"]["log_prob"] = _with_dims(cost, log_prob)
            guide_trace.apart[name] = _with_dims(apart, log_prob)


def _split_scale(site: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """The packed log density of a site, with the gradient of its scale only, and with that of ``log q`` only."""
    log_q, scale = site["unscaled_log_prob"], site["scale"]
    pairs = ((log_q.detach(), scale), (log_q, scale.detach()))
    dims = site["infer"]["_dim_to_symbol"]
    cost, apart = (packed.pack(scale_and_mask(*pair, site["mask"]), dims) for pair in pairs)
    return cost, apart


def _with_dims(x: Any, other: Any) -> Any:
    """Marks ``x`` as packed along the same dims as another tensor."""
    x._pyro_dims = other._pyro_dims
    return x


def _set_dice_factors(guide_trace: Trace) -> Dict[str, torch.Tensor]:
    """
    Puts new leaves in the place of all log weights and scores from which ``Dice`` makes
    its weights. Returns them, laid out as ``log_prob``.
    """
    factors = {}
    for name, site in sample_sites(guide_trace):
        score = site["score_parts"].score_function
        if not isinstance(score, torch.Tensor):
            continue
        slots = site["infer"].get("_topk")
        factor = plain(score if slots is None else slots.log_weight)
        factors[name] = factor.requires_grad_()
        parts = site["packed"]["score_parts"]
        factor = packed.pack(factor, site["infer"]["_dim_to_symbol"])
        site["packed"]["score_parts"] = parts._replace(score_function=factor)
    return factors


def _grouped(terms: Terms) -> Dict[Group, Any]:
    """The sums of costs that have the same weights."""
    groups: Dict[Group, Any] = {}
    for cost in terms.costs:
        key = (cost.ordinal, cost.value._pyro_dims)
        total = groups[key] + cost.value if key in groups else cost.value
        groups[key] = _with_dims(total, cost.value)
    return groups


def _by_ordinal(terms: List[Tuple[Ordinal, Any]]) -> Dict[Ordinal, List[Any]]:
    """Laid out for ``Dice``."""
    costs: Dict[Ordinal, List[Any]] = {}
    for ordinal, term in terms:
        costs.setdefault(ordinal, []).append(term)
    return costs


def _dot(coefficient: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """The sum of products, where 0 times infinity is 0."""
    return (coefficient * term.masked_fill(coefficient == 0, 0.0)).sum()


def _outside_cost(
    name: str, terms: Terms, probs: Dict[Group, Any], dependents: Dependents
) -> Any:
    """
    What depends on a guide site from outside of its plates: the full cost, as
    ``Trace_ELBO`` has it, laid out as ``log_prob``.

    :param probs: the weights of costs.
    """
    site: Any = terms.guide_trace.nodes[name]
    dims = site["packed"]["log_prob"]._pyro_dims
    symbol_to_dim = {symbol: dim for dim, symbol in site["infer"]["_dim_to_symbol"].items()}
    total: Any = 0.0
    for cost in terms.costs:
        prob = probs.get((cost.ordinal, cost.value._pyro_dims))
        is_outside = cost.site in dependents[name] and not terms.ordering[name] <= cost.ordinal
        if is_outside and prob is not None:
            value: Any = prob * cost.value.detach().masked_fill(prob == 0, 0.0)
            kept = "".join(d for d in cost.value._pyro_dims if d in dims)
            value = torch.einsum(f"{cost.value._pyro_dims}->{kept}", value)
            value._pyro_dims = kept
            total = total + packed.unpack(value, symbol_to_dim)
    return total


def _own_baseline(
    name: str, site: Any, grad: torch.Tensor, ones: torch.Tensor
) -> Tuple[torch.Tensor, Any]:
    """
    What ``infer={"baseline": ...}`` says, times the weights of slots.

    :param grad: weight times downstream cost.
    :param ones: weight times 1.
    """
    slots: Optional[Slots] = site["infer"].get("_topk")
    upstream = ones
    if slots is not None:
        dim = site["infer"]["_enumerate_dim"]
        upstream = ones.sum(dim, keepdim=True)
        grad = grad.sum(dim, keepdim=True)
    cost = torch.where(upstream > 0, grad / upstream, torch.zeros_like(grad))
    shape = cost.shape
    while cost.dim() and cost.shape[0] == 1:
        cost = cost.squeeze(0)
    value, loss = compute_baseline(name, site, cost)
    baseline = value.detach().reshape(shape) * ones
    return (baseline if slots is None else baseline * slots.is_sampled), loss


def _coefficients(
    site: Any, grad: torch.Tensor, baseline: Optional[str], own: Optional[torch.Tensor]
) -> torch.Tensor:
    """What ``log q`` has to be multiplied by in the surrogate."""
    slots: Optional[Slots] = site["infer"].get("_topk")
    if slots is None:
        return grad if own is None else grad - own
    if _is_paired(site):
        return grad
    dim = site["infer"]["_enumerate_dim"]
    weight = slots.log_weight.exp()
    if own is None and baseline == "loo":
        own = leave_one_out_baseline(grad, weight, slots.is_top, slots.is_sampled, dim, slots.share)
    elif own is None and baseline == "reinforce+":
        own = probe_baseline(grad, weight, slots.is_sampled, dim)
    return score_coefficients(grad, weight, slots.is_top, slots.is_sampled, dim, own)


def compute_elbo(terms: Terms) -> Any:
    """The weighted sum over slots, without a gradient for the parameters."""
    with torch.no_grad(), outside_of_transforms():
        _set_dice_factors(terms.guide_trace)
        leaves = [(c.ordinal, _with_dims(plain(c.value), c.value)) for c in terms.costs]
        costs = _by_ordinal(leaves)
        return Dice(terms.guide_trace, terms.ordering).compute_expectation(costs)


class Weighted(NamedTuple):
    """A surrogate, but for what some guide sites add to it."""

    elbo: Any  # a scalar
    surrogate: Any  # of the same value
    #: The weighted sum of ``log q`` of each site whose density was set apart; of the joint terms
    #: of each site that has such.
    log_q: Dict[str, torch.Tensor]
    #: Sites whose scores have to wait for the other particles.
    draws: List[Draw]


def weigh(terms: Terms, baselines: Baselines, dependents: Dependents) -> Weighted:
    """
    :param dependents: for guide sites that have a single draw, costs outside of their plates.
    """
    guide_trace: Any = terms.guide_trace
    ordering = terms.ordering
    sites = dict(sample_sites(guide_trace))
    is_simple = not (guide_trace.apart or guide_trace.joint or is_inside_of_func())
    if is_simple and not any(
        "_topk" in site["infer"] or name in dependents for name, site in sites.items()
    ):
        costs = _by_ordinal([(cost.ordinal, cost.value) for cost in terms.costs])
        elbo = Dice(guide_trace, ordering).compute_expectation(costs)
        return Weighted(elbo, elbo, {}, [])
    groups = _grouped(terms)
    with outside_of_transforms():
        factors = _set_dice_factors(guide_trace)
        dice = Dice(guide_trace, ordering)
        leaves = {k: _with_dims(plain(x).requires_grad_(), x) for k, x in groups.items()}
        elbo = dice.compute_expectation(_by_ordinal([(k[0], x) for k, x in leaves.items()]))
        if not isinstance(elbo, torch.Tensor):
            return Weighted(elbo, elbo, {}, [])
        inputs = [*factors.values(), *leaves.values()]
        grads = torch.autograd.grad(elbo, inputs, allow_unused=True)
    probs = dict(zip(groups, grads[len(factors) :]))

    # The expectation is linear in the costs, so that this has its value.
    surrogate, draws = torch.zeros_like(elbo), []
    for key, term in groups.items():
        if probs[key] is not None:
            surrogate = surrogate + _dot(probs[key], term)
    for (name, factor), grad in zip(factors.items(), grads):
        site, own = sites[name], None
        if name in dependents:
            grad = _outside_cost(name, terms, probs, dependents) + (
                torch.zeros_like(factor) if grad is None else grad
            )
        if grad is None:
            continue
        if has_own_baseline(site):
            weight = _upstream_weight(name, terms, dice, factor)
            own, loss = _own_baseline(name, site, grad, weight)
            surrogate = surrogate - without_value(loss)
        elif baselines.over_particles(site):
            weight = _upstream_weight(name, terms, dice, factor)
            frames = {frame.name: frame for frame in site["cond_indep_stack"]}
            dim = frames[PARTICLES].dim if PARTICLES in frames else None
            is_subsampled = any((f.full_size or 0) > f.size for f in frames.values())
            draws.append(Draw(name, grad, weight, _score_function(site), dim, is_subsampled))
            continue
        coefficient = _coefficients(site, grad, baselines.kind, own)
        score = _dot(coefficient, _score_function(site))
        surrogate = surrogate + without_value(score)
    log_q: Dict[str, Any] = {}
    apart = [(name, name, term) for name, term in guide_trace.apart.items()]
    apart += [(name, *pair) for name, pairs in guide_trace.joint.items() for pair in pairs]
    for name, where, term in apart:
        prob = probs.get((ordering[where], term._pyro_dims))
        if prob is not None:
            log_q[name] = log_q.get(name, 0.0) + _dot(prob, term)
    return Weighted(elbo.detach(), surrogate, log_q, draws)


def _upstream_weight(name: str, terms: Terms, dice: Dice, factor: torch.Tensor) -> torch.Tensor:
    """The product of the weights of the slots before a site, times its own weight."""
    site: Any = terms.guide_trace.nodes[name]
    log_prob = site["packed"]["log_prob"]
    if set(log_prob._pyro_dims) <= terms.ordering[name] and not dice.log_denom:
        return torch.ones_like(factor)
    with outside_of_transforms():
        ones = _with_dims(torch.ones_like(plain(log_prob)), log_prob)
        total = dice.compute_expectation({terms.ordering[name]: [ones]})
        return torch.autograd.grad(total, [factor])[0]


def without_value(x: Any) -> Any:
    return x - x.detach() if isinstance(x, torch.Tensor) else 0.0
