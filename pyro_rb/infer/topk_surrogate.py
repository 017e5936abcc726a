# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
From a pair of traces to one scalar: its value is the ELBO, its gradient the estimate.

The guide ran under a :class:`~pyro_rb.poutine.topk_messenger.TopKMessenger`. Pyro's
``Dice`` weighs the terms of the ELBO by the product of the weights of slots. It does so
on tensors without a graph: its derivative with respect to a weight is the downstream
cost, from which the score part of the gradient is made.
"""

from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.poutine import Trace

from pyro_rb.infer.util import Ordinal, compute_baseline, compute_costs
from pyro_rb.ops.topk import (
    Slots,
    leave_one_out_baseline,
    probe_baseline,
    score_coefficients,
)

Costs = Dict[Ordinal, List[Any]]  # of packed tensors


def _sample_sites(trace: Trace) -> Iterator[Tuple[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            yield name, site


def _score_function(site: Any) -> Any:
    """``log q`` of a site that has a score function, neither scaled nor masked."""
    return site["score_parts"].score_function


def has_own_baseline(site: Any) -> bool:
    """Whether ``infer={"baseline": ...}`` is to be followed: where there is a score."""
    infer = site["infer"]
    is_drawn = infer.get("enumerate") is None or "_topk" in infer
    has_score = not (site["is_observed"] or site["fn"].has_rsample)
    return is_drawn and has_score and bool(infer.get("baseline"))


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
    for name, site in _sample_sites(guide_trace):
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


def _drop_own_scores(guide_trace: Trace, baseline: Optional[str]) -> None:
    """
    Detaches ``log q`` in the cost of each site with a baseline. Its own gradient has mean
    zero, and would be the only noise left where the guide is the posterior.
    """
    for _, site in _sample_sites(guide_trace):
        is_treated = baseline is not None and "_topk" in site["infer"]
        if is_treated or has_own_baseline(site):
            log_prob = site["packed"]["log_prob"]
            site["packed"]["log_prob"] = _with_dims(log_prob.detach(), log_prob)


def _as_leaves(costs: Costs) -> Costs:
    leaves: Costs = {}
    for ordinal, terms in costs.items():
        for term in terms:
            leaf = _with_dims(term.detach().requires_grad_(), term)
            leaves.setdefault(ordinal, []).append(leaf)
    return leaves


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
    costs, ordering = compute_costs(model_trace, guide_trace)
    with torch.no_grad():
        _set_dice_factors(guide_trace)
        return Dice(guide_trace, ordering).compute_expectation(costs)


def compute_surrogate(
    model_trace: Trace, guide_trace: Trace, baseline: Optional[str]
) -> Any:
    """A scalar whose value is the ELBO and whose gradient is the estimate."""
    if not any(
        "_topk" in site["infer"] or has_own_baseline(site)
        for _, site in _sample_sites(guide_trace)
    ):
        costs, ordering = compute_costs(model_trace, guide_trace)
        return Dice(guide_trace, ordering).compute_expectation(costs)

    _drop_own_scores(guide_trace, baseline)
    costs, ordering = compute_costs(model_trace, guide_trace)
    factors = _set_dice_factors(guide_trace)
    leaves = _as_leaves(costs)
    dice = Dice(guide_trace, ordering)
    elbo = dice.compute_expectation(leaves)
    if not isinstance(elbo, torch.Tensor):
        return elbo
    cost_leaves = [leaf for terms in leaves.values() for leaf in terms]
    inputs = list(factors.values()) + cost_leaves
    grads = torch.autograd.grad(elbo, inputs, allow_unused=True)
    probs = dict(zip(map(id, cost_leaves), grads[len(factors) :]))

    # The expectation is linear in the costs, so that this has its value.
    surrogate = torch.zeros_like(elbo)
    for ordinal, terms in costs.items():
        for leaf, term in zip(leaves[ordinal], terms):
            prob = probs[id(leaf)]
            if prob is not None:
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
            surrogate = surrogate - _without_value(loss)
        coefficient = _coefficients(site, grad, baseline, own)
        score = _dot(coefficient, _score_function(site))
        surrogate = surrogate + _without_value(score)
    return surrogate


def _without_value(x: Any) -> Any:
    return x - x.detach() if isinstance(x, torch.Tensor) else 0.0
