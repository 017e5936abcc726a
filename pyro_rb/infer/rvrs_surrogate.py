# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The gradient of the ELBO of an RVRSGuide, from the proposals that were accepted.
"""

from contextlib import ExitStack
from typing import List, NamedTuple, Optional, Tuple

import torch

from pyro_rb.infer.rvrs_proposals import LogJoint, Proposer
from pyro_rb.infer.rvrs_sampler import Accepted, cat, take
from pyro_rb.ops.rejection import Weights, gradient_weights

#: In the place of a weight of zero, through which no gradient by latents would pass.
_LEAST_WEIGHT = 1e-6


class Surrogate(NamedTuple):
    """Each ``[*batch]``: empty, or the items of the local plate."""

    #: Unbiased estimate of the ELBO less the log normalizer.
    mean_f: torch.Tensor
    #: Its gradient is that of the ELBO, less that of the model's log density at the
    #: draws that are emitted. None if gradients are disabled.
    gradient: Optional[torch.Tensor]
    #: Log density of the model at the emitted draws, summed.
    log_p: torch.Tensor


def compute_surrogate(
    proposer: Proposer, accepted: Accepted, epsilon: float, num_emitted: int
) -> Surrogate:
    """
    :param accepted: S draws.
    :param num_emitted: P, the number of draws at which the ELBO evaluates the model.
    """
    weights = gradient_weights(accepted.log_weight, accepted.T, epsilon)
    mean_f = weights.f.mean(0)
    log_p, joints, sizes = _log_joint(proposer, accepted)
    emitted = log_p.detach()[:num_emitted].sum(0)
    if not torch.is_grad_enabled():
        return Surrogate(mean_f, None, emitted)

    path, model = _scaled(weights, num_emitted)
    ratio = path / model
    if sum(sizes) > len(ratio):
        shape = (sum(sizes),) + ratio.shape[1:]
        ratio = ratio.new_zeros(shape).scatter_(0, accepted.position, ratio)
    # Gradients by model parameters have one weight, those by latents another.
    for joint, factor in zip(joints, ratio.split(sizes) if len(sizes) > 1 else [ratio]):
        joint.rescale.factor = factor
    gradient = (model * log_p).sum(0) - _through_draws(proposer, accepted, path)
    return Surrogate(mean_f, gradient, emitted)


def _log_joint(
    proposer: Proposer, accepted: Accepted
) -> Tuple[torch.Tensor, List[LogJoint], List[int]]:
    """The log joint of accepted draws ``[S, *batch]``, and of what size it was evaluated."""
    joints = [r.joint for r in accepted.rounds]
    # Where the density is zero its derivatives need not be finite, whatever their weight.
    has_graph = joints and all(joint.log_p.requires_grad for joint in joints)
    if not has_graph or accepted.num_invalid:
        size = len(accepted.log_weight)
        joint = proposer.evaluate(size, take(proposer, accepted, proposer.latents))
        return joint.log_p, [joint], [size]
    log_p = cat([joint.log_p for joint in joints]).gather(0, accepted.position)
    return log_p, joints, [len(r.log_weight) for r in accepted.rounds]


def _scaled(weights: Weights, num_emitted: int) -> Tuple[torch.Tensor, torch.Tensor]:
    share = num_emitted / len(weights.f)
    model = share * weights.model
    # The ELBO adds the model's log density at the emitted draws with a gradient of its own.
    model[:num_emitted] -= 1
    return share * weights.path, model.masked_fill_(model == 0, _LEAST_WEIGHT)


def _through_draws(
    proposer: Proposer, accepted: Accepted, weight: torch.Tensor
) -> torch.Tensor:
    """
    A surrogate ``[*batch]`` for the part of the gradient of log q that goes through the
    draws. The other part has the mean zero, and would count twice.
    """
    values: List[torch.Tensor] = []
    taps = [r.tap for r in accepted.rounds if r.tap is not None]
    for tap in taps:
        tap.path.raise_if_edited()
        values.extend(tap.path.values.values())
    zero = weight.new_zeros(weight.shape[1:])
    log_q = cat([r.log_q for r in accepted.rounds])
    if not (values and log_q.requires_grad):
        return zero
    with ExitStack() as gates:
        for tap in taps:
            gates.enter_context(tap.path.closed())
        root = (weight * log_q.gather(0, accepted.position)).sum()
        grads = torch.autograd.grad(root, values, retain_graph=True, allow_unused=True)
    terms = [
        proposer.sum_to_batch(grad * value)
        for grad, value in zip(grads, values)
        if grad is not None
    ]
    return sum(terms, zero)
