# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Rejection sampling of the proposals of a guide, and the gradient of the ELBO from those
that were accepted.
"""

import math
from typing import Any, Callable, List, NamedTuple, Optional

import torch

from pyro_rb.infer.rvrs_proposals import LogJoint, Proposals, Proposer, Values
from pyro_rb.ops.rejection import (
    Weights,
    acceptance,
    first_accepted,
    gradient_weights,
    solve_threshold,
)

#: Proposals in a round, unless more samples are wanted.
MAX_ROUND = 256

#: Proposals from which a threshold is solved: of a global guide, and of each local item.
NUM_PILOTS = 64
NUM_LOCAL_PILOTS = 32

#: Smallest weight of a log density through which a gradient by latents can be passed.
_LEAST_WEIGHT = 1e-6


class RejectionSamplingError(RuntimeError):
    """Too few proposals were accepted within ``max_steps``."""


class Accepted(NamedTuple):
    """S accepted proposals. ``batch`` is empty, or the items of the local plate."""

    #: ``[S, *batch]``
    log_weight: torch.Tensor
    #: Positions among all proposals, ``[S, *batch]``.
    position: torch.Tensor
    #: Proposals up to and including the last one that was accepted, ``[*batch]``.
    num_proposed: torch.Tensor
    #: Of the latents of the model, each ``[S, *plates, *event]``.
    values: Values
    #: All proposals.
    rounds: List[Proposals]
    #: How many log weights were not finite.
    num_invalid: int
    #: The threshold, ``[*batch]`` or a scalar.
    T: torch.Tensor

    @property
    def all_log_weights(self) -> torch.Tensor:
        return torch.cat([r.log_weight for r in self.rounds])


def solve_by_pilot(
    proposer: Proposer, target: float, epsilon: float
) -> torch.Tensor:
    """
    :return: the threshold ``[*batch]`` of ``target`` acceptance among proposals that are
        discarded, so that it does not depend on the draws that it will be used for.
    :raises RejectionSamplingError: if no proposal has a finite log weight.
    """
    is_local = proposer.structure.plate is not None
    size = NUM_LOCAL_PILOTS if is_local else NUM_PILOTS
    with torch.no_grad():
        T = solve_threshold(proposer.propose(size, False).log_weight, target, epsilon)
    if T.isnan().any():
        raise RejectionSamplingError(
            f"Found no finite log density among {size} proposals"
            + (f", for {int(T.isnan().sum())} of {T.numel()} items" if is_local else "")
            + ". Expected some, to find the threshold T. Start the guide where the "
            "model has a density: choose its init_loc_fn, or fit it by SVI first."
        )
    return T


def sample(
    proposer: Proposer,
    num_samples: int,
    find_T: Callable[[], torch.Tensor],
    epsilon: float,
    guess: float,
    max_steps: int,
    num_items: int = 1,
    with_grad: bool = False,
) -> Accepted:
    """
    Proposes in rounds, until enough are accepted.

    :param num_samples: S.
    :param find_T: gives the threshold ``[*batch]``, after the first proposals were made
        and before they are looked at.
    :param guess: of the mean acceptance, from which the size of the rounds is chosen.
    :param max_steps: proposals at most.
    :param num_items: of the local plate.
    :param with_grad: whether proposals are to have the graph of the log joint.
    """
    largest = max(MAX_ROUND, num_samples)
    # So that a second round is rarely needed; for many items, the slowest counts.
    spare = math.sqrt(num_samples) + math.log(num_items)
    size = math.ceil((num_samples + spare) / max(guess, epsilon))
    rounds: List[Proposals] = []
    accepted: List[torch.Tensor] = []
    num_accepted: Any = 0
    T: Any = None
    least = num_proposed = num_invalid = 0
    while least < num_samples:
        size = min(size, largest, max_steps - num_proposed)
        if size <= 0:
            raise _exhausted(rounds, num_accepted, num_samples, T, epsilon, max_steps)
        proposals = proposer.propose(size, with_grad)
        log_weight = proposals.log_weight
        if T is None:
            T = find_T().to(log_weight)
        a = acceptance(log_weight, T, epsilon)
        is_accepted = torch.rand_like(a) < a
        rounds.append(proposals)
        accepted.append(is_accepted)
        num_accepted = num_accepted + is_accepted.sum(0)
        least, invalid = torch.stack([num_accepted.min(), proposals.num_invalid]).tolist()
        num_invalid += invalid
        num_proposed += size
        size = 2 * size
    index, num_needed = first_accepted(_cat(accepted), num_samples)
    log_weight = _cat([r.log_weight for r in rounds]).gather(0, index)
    values = {
        name: _take(_cat([r.values[name] for r in rounds]), index, proposer)
        for name in rounds[0].values
    }
    return Accepted(log_weight, index, num_needed, values, rounds, num_invalid, T)


def _cat(xs: List[torch.Tensor]) -> torch.Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(xs)


def _take(value: torch.Tensor, index: torch.Tensor, proposer: Proposer) -> torch.Tensor:
    """
    :param value: ``[M, *plates, *event]``.
    :param index: ``[S, *batch]``.
    :return: ``[S, *plates, *event]``.
    """
    if index.dim() == 1:
        return value[index]
    index = proposer.like(index, value).expand(index.shape[:1] + value.shape[1:])
    return value.gather(0, index)


def _exhausted(
    rounds: List[Proposals],
    num_accepted: torch.Tensor,
    num_samples: int,
    T: torch.Tensor,
    epsilon: float,
    max_steps: int,
) -> RejectionSamplingError:
    log_weight = torch.cat([r.log_weight for r in rounds])
    worst = ""
    if log_weight.dim() > 1:
        item = int(num_accepted.argmin())
        worst = f" for item {item} of {num_accepted.numel()}, the worst"
        log_weight, T = log_weight[:, item], T.expand(num_accepted.shape)[item]
    a = acceptance(log_weight, T, epsilon)
    finite = log_weight[log_weight.isfinite()]
    mean = finite.mean().item() if len(finite) else -math.inf
    return RejectionSamplingError(
        f"Accepted {int(num_accepted.min())} of the {num_samples} samples wanted{worst}, "
        f"after {len(log_weight)} proposals (max_steps={max_steps}). Mean acceptance "
        f"{a.mean().item():.3g} at T = {T.item():.4g}; mean log weight {mean:.4g}, "
        f"{len(log_weight) - len(finite)} of them not finite. Expected T near minus the log "
        "weights. Fit the proposal by plain SVI first, leave T=None to have it found, or "
        "raise epsilon, T or max_steps."
    )


class Surrogate(NamedTuple):
    """Of an accepted batch, each ``[*batch]``."""

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
    :param num_emitted: P, the number of draws at which the ELBO evaluates the model.
    """
    log_weight = accepted.log_weight
    weights = gradient_weights(log_weight, accepted.T, epsilon)
    mean_f = weights.f.mean(0)
    joints = [r.joint for r in accepted.rounds]
    # Where the density is zero its derivatives need not be finite, whatever their weight.
    has_graph = joints[0].log_p.requires_grad and not accepted.num_invalid
    again: Optional[LogJoint] = None
    if torch.is_grad_enabled() and not has_graph:
        again = proposer.evaluate(len(log_weight), accepted.values)
    if again is None:
        log_p = _cat([j.log_p.detach() for j in joints]).gather(0, accepted.position)
    else:
        log_p = again.log_p.detach()
    emitted = log_p[:num_emitted].sum(0)
    if not torch.is_grad_enabled():
        return Surrogate(mean_f, None, emitted)
    path, model = _scaled(weights, num_emitted)
    rows = accepted.position
    sizes = [len(r.log_weight) for r in accepted.rounds]
    shape = (sum(sizes),) + rows.shape[1:]
    all_path = _scatter(shape, rows, path).split(sizes)
    if again is not None:
        gradient = _weigh_model(again, path, model)
    else:
        all_model = _scatter(shape, rows, model).split(sizes)
        gradient = sum(map(_weigh_model, joints, all_path, all_model))
    for proposals, weight in zip(accepted.rounds, all_path):
        gradient = gradient - _weigh_guide(proposer, proposals, weight)
    return Surrogate(mean_f, gradient, emitted)


def _scaled(weights: Weights, num_emitted: int) -> List[torch.Tensor]:
    num_samples = len(weights.f)
    share = num_emitted / num_samples
    model = share * weights.model
    # The ELBO adds the model's log density at the emitted draws with a gradient of its own.
    model[:num_emitted] -= 1
    least = torch.copysign(torch.full_like(model, _LEAST_WEIGHT), model)
    return [share * weights.path, least.where(model.abs() < _LEAST_WEIGHT, model)]


def _scatter(shape: torch.Size, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(shape).scatter(0, index, x)


def _weigh_model(
    joint: LogJoint, path: torch.Tensor, model: torch.Tensor
) -> torch.Tensor:
    """Gradients by model parameters have one weight, those by latents another."""
    joint.rescale.factor = torch.where(model == 0, model, path / model)
    return (model * joint.log_p.masked_fill(model == 0, 0.0)).sum(0)


def _weigh_guide(
    proposer: Proposer, proposals: Proposals, weight: torch.Tensor
) -> torch.Tensor:
    """The part of the gradient of log q that goes through the draws."""
    tap = proposals.tap
    assert tap is not None
    tap.raise_if_edited()
    if not (tap.values and proposals.log_q.requires_grad):
        return weight.new_zeros(weight.shape[1:])
    values = list(tap.values.values())
    log_q = proposals.log_q.masked_fill(weight == 0, 0.0)
    with tap.closed():
        grads = torch.autograd.grad(
            (weight * log_q).sum(), values, retain_graph=True, allow_unused=True
        )
    terms = [
        proposer.sum_to_batch(grad * value)
        for grad, value in zip(grads, values)
        if grad is not None
    ]
    return sum(terms, weight.new_zeros(weight.shape[1:]))
