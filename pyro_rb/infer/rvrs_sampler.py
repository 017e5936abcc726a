# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Rejection sampling of the proposals of a guide.
"""

import math
from typing import Any, Callable, List, NamedTuple

import torch

from pyro_rb.infer.rvrs_proposals import Proposals, Proposer, Values
from pyro_rb.ops.rejection import (
    acceptance,
    first_accepted,
    solve_threshold,
)

#: Proposals in a round, unless more samples are wanted.
MAX_ROUND = 256

#: Proposals from which a threshold is solved: of a global guide, and of each local item.
NUM_PILOTS = 64
NUM_LOCAL_PILOTS = 32


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
    #: All proposals, with their log weights and acceptance probabilities ``[M, *batch]``.
    rounds: List[Proposals]
    all_log_weights: torch.Tensor
    acceptance: torch.Tensor
    #: How many log weights were not finite.
    num_invalid: int
    #: The threshold, ``[*batch]`` or a scalar.
    T: torch.Tensor


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
    probs: List[torch.Tensor] = []
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
        probs.append(a)
        accepted.append(is_accepted)
        num_accepted = num_accepted + is_accepted.sum(0)
        least = int(num_accepted.min() if num_accepted.dim() else num_accepted)
        num_invalid += proposals.num_invalid
        num_proposed += size
        size = 2 * size
    index, num_needed = first_accepted(cat(accepted), num_samples)
    all_weights = cat([r.log_weight for r in rounds])
    values = {
        name: _take(cat([r.values[name] for r in rounds]), index, proposer)
        for name in rounds[0].values
    }
    return Accepted(
        all_weights.gather(0, index),
        index,
        num_needed,
        values,
        rounds,
        all_weights,
        cat(probs),
        num_invalid,
        T,
    )


def cat(xs: List[torch.Tensor]) -> torch.Tensor:
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
