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

from itertools import chain
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Tuple

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.poutine import Trace

from pyro_rb.infer.util import (
    Ordinal,
    compute_baseline,
    compute_costs,
    compute_dice_elbo,
    sample_sites,
)
from pyro_rb.ops.topk import (
    Slots,
    leave_one_out_baseline,
    probe_baseline,
    score_coefficients,
)

Costs = Dict[Ordinal, List[Any]]  # of packed tensors


def _score_function(site: Any) -> Any:
    """``log q`` of a site that has a score function, neither scaled nor masked."""
    return site["score_parts"].score_function


def has_own_baseline(site: Any) -> bool:
    """Whether ``infer={"baseline": ...}`` is to be followed: where there is a score."""
    infer = site["infer"]
    is_drawn = infer.get("enumerate") is None or "_topk" in infer
    has_score = not (site["is_observed"] or site["fn"].has_rsample)
    return is_drawn and has_score and bool(infer.get("baseline"))


def _has_something_to_do(guide_trace: Trace) -> bool:
    return any(
        "_topk" in site["infer"] or has_own_baseline(site)
        for _, site in sample_sites(guide_trace)
    )


def needs_weights(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether not all terms of the ELBO count once."""
    return any(
        site["infer"].get("enumerate") or site["infer"].get("_enumerate_dim") is not None
        for trace in (model_trace, guide_trace)
        for _, site in sample_sites(trace)
    ) or any(
        not is_identically_zero(_score_function(site)) for _, site in sample_sites(guide_trace)
    )


def _check_plates(
    model_trace: Trace, guide_trace: Trace, ordering: Dict[str, Ordinal]
) -> None:
    """``Dice`` would leave such weights out, without a word."""
    treated = {
        site["infer"]["_enumerate_symbol"]: name
        for name, site in sample_sites(guide_trace)
        if "_topk" in site["infer"]
    }
    for trace in (guide_trace, model_trace):
        for name, site in sample_sites(trace):
            for symbol in set(site["packed"]["log_prob"]._pyro_dims) & set(treated):
                source = treated[symbol]
                if not ordering[source] <= ordering[name]:
                    plates = [f.name for f in guide_trace.nodes[source]["cond_indep_stack"]]
                    raise ValueError(
                        f"Site '{name}' depends on guide site '{source}', which is inside of "
                        f"plates {plates} that '{name}' is outside of. Expected, as in "
                        "TraceEnum_ELBO, that nothing outside of a plate depends on what "
                        "is inside. Use Trace_ELBO or TraceGraph_ELBO for this model."
                    )


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
        score = _score_function(site)
        if not isinstance(score, torch.Tensor):
            continue
        slots = site["infer"].get("_topk")
        factor = (score if slots is None else slots.log_weight).detach()
        factors[name] = factor.requires_grad_()
        parts = site["packed"]["score_parts"]
        factor = packed.pack(factor, site["infer"]["_dim_to_symbol"])
        site["packed"]["score_parts"] = parts._replace(score_function=factor)
    return factors


def _set_apart(
    guide_trace: Trace, baseline: Optional[str], tapped: Collection[str]
) -> Dict[str, Any]:
    """
    Detaches ``log q`` in the cost of each site that has a path gradient or a baseline. Its
    own gradient has mean zero. Returns what was there, packed.
    """
    apart = {}
    for name, site in sample_sites(guide_trace):
        is_treated = baseline is not None and "_topk" in site["infer"]
        if is_treated or has_own_baseline(site) or name in tapped:
            apart[name] = log_prob = site["packed"]["log_prob"]
            site["packed"]["log_prob"] = _with_dims(log_prob.detach(), log_prob)
    return apart


def _group(costs: Costs) -> Costs:
    """Adds up what has the same dims, and so the same weights."""
    groups: Costs = {}
    for ordinal, terms in costs.items():
        by_dims: Dict[str, Any] = {}
        for term in terms:
            dims = term._pyro_dims
            total = by_dims[dims] + term if dims in by_dims else term
            by_dims[dims] = _with_dims(total, term)
        groups[ordinal] = list(by_dims.values())
    return groups


def _compute_costs(
    model_trace: Trace, guide_trace: Trace
) -> Tuple[Costs, Dict[str, Ordinal]]:
    try:
        costs, ordering = compute_costs(model_trace, guide_trace)
    except ValueError as e:
        if "guide enumeration" not in str(e):
            raise
        raise ValueError(f"{e} Or set infer={{'topk': 0}} at that guide site.") from e
    _check_plates(model_trace, guide_trace, ordering)
    return _group(costs), ordering


def _dot(coefficient: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """The sum of products, where 0 times infinity is 0."""
    return (coefficient * term.masked_fill(coefficient == 0, 0.0)).sum()


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
    dim = site["infer"]["_enumerate_dim"]
    weight = slots.log_weight.exp()
    if own is None and baseline == "loo":
        own = leave_one_out_baseline(grad, weight, slots.is_top, slots.is_sampled, dim)
    elif own is None and baseline == "reinforce+":
        own = probe_baseline(grad, weight, slots.is_sampled, dim)
    return score_coefficients(grad, weight, slots.is_top, slots.is_sampled, dim, own)


def compute_elbo(model_trace: Trace, guide_trace: Trace) -> Any:
    """The weighted sum over slots, without a gradient for the parameters."""
    with torch.no_grad():
        if not _has_something_to_do(guide_trace):
            return compute_dice_elbo(model_trace, guide_trace)
        costs, ordering = _compute_costs(model_trace, guide_trace)
        _set_dice_factors(guide_trace)
        return Dice(guide_trace, ordering).compute_expectation(costs)


class Weighted(NamedTuple):
    """A surrogate, but for what the densities of some guide sites pass on."""

    elbo: Any  # a scalar
    surrogate: Any  # of the same value
    #: The weighted sum of ``log q`` of each site whose density is to be passed on.
    log_q: Dict[str, torch.Tensor]


def weigh(
    model_trace: Trace, guide_trace: Trace, baseline: Optional[str], tapped: Collection[str]
) -> Weighted:
    """
    :param tapped: guide sites with a path gradient. Their densities, and those of the sites
        with a baseline, are without a gradient in the surrogate.
    """
    if not (_has_something_to_do(guide_trace) or tapped):
        elbo = compute_dice_elbo(model_trace, guide_trace)
        return Weighted(elbo, elbo, {})
    apart = _set_apart(guide_trace, baseline, tapped)
    costs, ordering = _compute_costs(model_trace, guide_trace)
    factors = _set_dice_factors(guide_trace)
    dice = Dice(guide_trace, ordering)
    leaves = {
        ordinal: [_with_dims(term.detach().requires_grad_(), term) for term in terms]
        for ordinal, terms in costs.items()
    }
    elbo = dice.compute_expectation(leaves)
    if not isinstance(elbo, torch.Tensor):
        return Weighted(elbo, elbo, {})
    inputs = [*factors.values(), *chain(*leaves.values())]
    grads = torch.autograd.grad(elbo, inputs, allow_unused=True)

    # The expectation is linear in the costs, so that this has its value.
    surrogate = torch.zeros_like(elbo)
    probs = {}
    for (ordinal, term), prob in zip(_flatten(costs), grads[len(factors) :]):
        if prob is not None:
            probs[ordinal, term._pyro_dims] = prob
            surrogate = surrogate + _dot(prob, term)
    for (name, factor), grad in zip(factors.items(), grads):
        if grad is None:
            continue
        site = guide_trace.nodes[name]
        own: Optional[torch.Tensor] = None
        if has_own_baseline(site):
            log_prob = site["packed"]["log_prob"]
            ones = _with_dims(torch.ones_like(log_prob), log_prob)
            total = dice.compute_expectation({ordering[name]: [ones]})
            (weights,) = torch.autograd.grad(total, [factor])
            own, loss = _own_baseline(name, site, grad, weights)
            surrogate = surrogate - without_value(loss)
        coefficient = _coefficients(site, grad, baseline, own)
        score = _dot(coefficient, _score_function(site))
        surrogate = surrogate + without_value(score)
    log_q = {}
    for name, term in apart.items():
        prob = probs.get((ordering[name], term._pyro_dims))
        if prob is not None:
            log_q[name] = _dot(prob, term)
    return Weighted(elbo.detach(), surrogate, log_q)


def _flatten(costs: Costs) -> List[Tuple[Ordinal, Any]]:
    return [(ordinal, term) for ordinal, terms in costs.items() for term in terms]


def without_value(x: Any) -> Any:
    return x - x.detach() if isinstance(x, torch.Tensor) else 0.0
