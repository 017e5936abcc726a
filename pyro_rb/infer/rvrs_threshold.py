# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Dict, Optional, Tuple

import torch

from pyro_rb.infer.rvrs_proposals import Proposer
from pyro_rb.infer.rvrs_sampler import (
    BLOCK,
    Accepted,
    RejectionSamplingError,
    largest_round,
)
from pyro_rb.ops.rejection_threshold import adapt_threshold, solve_threshold

#: Proposals from which a threshold is solved, at least and at most: of a global guide,
#: and of each local item; for these, as many as give the threshold this standard error,
#: in nats, if log weights are normal.
NUM_PILOTS = (64, 1024)
NUM_LOCAL_PILOTS = (4, 32)
PILOT_ERROR = 0.12

#: Share of the latest call in running means, after as many calls.
_FORGET = 0.01
#: As many steps are as good as the pilots from which a threshold was solved.
_PILOT_AGE = 10.0


def solve_by_pilot(
    proposer: Proposer, target: float, epsilon: float
) -> torch.Tensor:
    """
    :return: the threshold ``[*batch]`` of ``target`` acceptance among proposals that are
        discarded, so that it does not depend on the draws that it will be used for.
    :raises RejectionSamplingError: if no proposal has a finite log weight.
    """
    is_local = proposer.structure.plate is not None
    least, most = NUM_LOCAL_PILOTS if is_local else NUM_PILOTS
    with torch.no_grad():
        log_weight = proposer.propose(least, False, is_checked=False).log_weight
        wanted = largest_round(proposer)
        if is_local:
            variance = log_weight.var(0).mean().item()
            wanted = math.ceil(variance / PILOT_ERROR**2) if math.isfinite(variance) else most
        elif not log_weight.isfinite().any():
            wanted = least
        if wanted > least:
            more = proposer.propose(
                min(wanted, most) - least, False, is_checked=False
            ).log_weight
            log_weight = torch.cat([log_weight, more])
        blocks = log_weight.reshape(len(log_weight), -1).split(BLOCK, 1)
        # For local items, more steps would be for less than the noise.
        num_steps = 2 if is_local else 100
        T = torch.cat([solve_threshold(x, target, epsilon, num_steps) for x in blocks])
        T = T.reshape(log_weight.shape[1:])
    if T.isnan().any():
        raise RejectionSamplingError(
            f"Found no finite log density among {len(log_weight)} proposals"
            + (f", for {int(T.isnan().sum())} of {T.numel()} items" if is_local else "")
            + ". Expected some, to find the threshold T. Start the guide where the "
            "model has a density: choose its init_loc_fn, or fit it by SVI first."
        )
    return T


class ThresholdMixin:
    """
    The threshold of an :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`.

    In training, thresholds follow the acceptance from step to step, and scatter. What is
    used otherwise is their mean, ``T``; a step uses ``T + T_step``.
    """

    T: torch.Tensor
    T_step: torch.Tensor
    #: Number of steps of which ``T`` is the mean.
    T_age: torch.Tensor
    Z: torch.Tensor
    epsilon: float
    Z_target: float
    adaptation: str
    T_lr: float
    local_plate: Optional[str]
    local_size: Optional[int]
    #: Whether the threshold is the user's, and stays.
    _is_given: bool
    #: What the threshold belongs to, None before it is known, and those of others.
    _key: Optional[int]
    _others: Dict[int, Tuple[torch.Tensor, ...]]

    def get_extra_state(self) -> torch.Tensor:
        """What the threshold belongs to, for ``state_dict``."""
        return torch.tensor(-1 if self._key is None else self._key)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Is called by ``load_state_dict``."""
        key = int(state)
        self._key, self._others = None if key < 0 else key, {}

    @property
    def _is_found_anew(self) -> bool:
        """Whether each call finds the thresholds of its items."""
        is_kept = self.local_plate is None or self.local_size is not None
        return not (is_kept or self._is_given)

    def _find_threshold(self, proposer: Proposer, is_step: bool = False) -> torch.Tensor:
        """
        ``[*batch]``, for the items of this call.

        :param is_step: whether the call is a step of training.
        """
        if not self._is_given:
            if self._is_found_anew:
                return solve_by_pilot(proposer, self.Z_target, self.epsilon)
            self._switch_to(proposer.structure.key)
        index = self._find_items(proposer)
        T, T_step = self.T[index], self.T_step[index]
        is_unknown = T.isnan()
        if is_unknown.any():
            solved = solve_by_pilot(proposer, self.Z_target, self.epsilon)
            T = solved.to(T).where(is_unknown, T)
            age = self.T_age[index].masked_fill(is_unknown, _PILOT_AGE)
            self._put(index, T, T_step, age)
            if self.Z.isnan():
                self.Z.fill_(self.Z_target)
        return T + T_step if is_step else T

    def _switch_to(self, key: int) -> None:
        """Puts the threshold of another key aside, that of other data for example."""
        if key == self._key:
            return
        if self._key is not None:
            state = self.T, self.T_step, self.T_age
            self._others[self._key] = state
            unknown = [torch.full_like(x, fill) for x, fill in zip(state, (math.nan, 0, 0))]
            self.T, self.T_step, self.T_age = self._others.pop(key, tuple(unknown))
        self._key = key

    def _find_items(self, proposer: Proposer) -> Any:
        """What ``T`` is to be indexed by."""
        if self.local_size is None:
            return ()
        structure = proposer.structure
        assert structure.plate is not None
        if structure.full_size != self.local_size:
            raise ValueError(
                f"Found local_size={self.local_size}, and plate '{structure.plate}' of size "
                f"{structure.full_size}. Expected the same: one threshold for each item of the plate. For "
                "items that come without their numbers, or were not trained on, leave "
                "local_size=None; thresholds are then found at each call."
            )
        if not (structure.is_subsampled or structure.is_chosen):
            return ()  # all of them
        return proposer.subsamples[structure.plate].to(self.T.device)

    def _put(self, index: Any, *state: torch.Tensor) -> None:
        """:param state: threshold, what a step adds to it, and age; of some items."""
        for name, new in zip(("T", "T_step", "T_age"), state):
            old = getattr(self, name)
            old[index] = new.detach().to(old)

    def _adapt(self, proposer: Proposer, accepted: Accepted) -> None:
        """Learns from the first proposals of a call, when its draws are made."""
        old, a = accepted.T, accepted.first_acceptance
        index = self._find_items(proposer)
        age = self.T_age[index].to(old)
        rate = (1 / (age + 1)).clamp(min=_FORGET)
        mean = a.mean()
        new_Z = mean if self.Z.isnan() else self.Z + rate.mean() * (mean - self.Z)
        self.Z.copy_(new_Z.detach())
        T, new = self.T[index].to(old), old
        if self._is_found_anew:
            T = new = old.mean()  # for information
        elif self.adaptation == "Z_target":
            new = self._take_step(accepted)
            # The mean starts anew where a step was longer than Newton's may be.
            has_jumped = (new - old).abs() > 2.01 * self.T_lr
            age = age.masked_fill(has_jumped, 0.0)
            T = torch.where(has_jumped, new, T + rate * (new - T))
        self._put(index, T, new - T, age + 1)

    def _take_step(self, accepted: Accepted) -> torch.Tensor:
        lw, T, a = accepted.first_log_weight, accepted.T, accepted.first_acceptance
        options = self.Z_target, self.epsilon, self.T_lr
        if T.dim() == 0:
            return adapt_threshold(lw, T, *options, a)
        blocks = zip(*(x.split(BLOCK, -1) for x in (lw, T, a)))
        return torch.cat([adapt_threshold(x, t, *options, y) for x, t, y in blocks])
