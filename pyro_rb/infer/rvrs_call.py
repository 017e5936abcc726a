# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings
from typing import Callable, Dict, Optional, Sequence, Tuple, TypeVar

import torch

from pyro_rb.infer.generators import get_generators, set_generators
from pyro_rb.infer.rvrs_proposals import Proposer
from pyro_rb.infer.rvrs_sampler import Accepted, RejectionSamplingError, sample
from pyro_rb.infer.rvrs_signature import Structure, StructureChanged, shapes
from pyro_rb.infer.rvrs_structure import find_structure, look, unstable
from pyro_rb.infer.rvrs_threshold import ThresholdMixin

Result = TypeVar("Result")


class CallMixin(ThresholdMixin):
    """
    What calls of an :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide` have in common. Model and
    guide are looked at in the first of them, and again when they are found to be different.
    """

    model: Callable
    num_samples: int
    max_steps: int
    #: That of the last call, and all that were found, by what model and guide look like.
    _structure: Optional[Structure]
    _structures: Dict[Tuple, Structure]
    _num_proposed: torch.Tensor
    _num_invalid: int
    _has_warned: bool

    @property
    def guide(self) -> Callable:
        """The proposal."""
        raise NotImplementedError

    def _attempt(self, use: Callable[[Proposer], Result], args: Tuple, kwargs: Dict) -> Result:
        """
        :param use: is called again if model or guide turn out to be different. Must not
            have made any site visible by then, but for those of :meth:`_draw_globals`.
        """
        is_new = self._prepare(args, kwargs)
        proposer = self._new_proposer(args, kwargs)
        try:
            self._draw_globals(proposer)
            return use(proposer)
        except RejectionSamplingError:
            raise
        except (StructureChanged, IndexError, RuntimeError, ValueError) as e:
            has_changed = isinstance(e, StructureChanged)
            before = self._structure
            if not (is_new and not has_changed):
                self._look(args, kwargs, anew=has_changed)
            if self._structure is before and not has_changed:
                raise
        assert self._structure is not None
        proposer.structure = self._structure
        try:
            self._draw_globals(proposer)
            return use(proposer)
        except StructureChanged as e:
            raise unstable(e) from e

    def _make_proposer(self, args: Tuple, kwargs: Dict) -> Proposer:
        self._prepare(args, kwargs)
        proposer = self._new_proposer(args, kwargs)
        self._draw_globals(proposer)
        return proposer

    def _prepare(self, args: Tuple, kwargs: Dict) -> bool:
        """:return: whether model and guide were looked at."""
        if self._structure is not None and self._structure.arguments == shapes(args, kwargs):
            return False
        self._look(args, kwargs)
        return True

    def _new_proposer(self, args: Tuple, kwargs: Dict) -> Proposer:
        assert self._structure is not None
        return Proposer(self.model, self.guide, args, kwargs, self._structure)

    def _draw_globals(self, proposer: Proposer) -> None:
        if proposer.structure.has_globals and not proposer.globals:
            proposer.draw_globals()

    def _look(self, args: Tuple, kwargs: Dict, anew: bool = False) -> None:
        """:param anew: whether not to trust what is known of the same sites."""
        # A copy goes on with the random numbers of the original. In the very first call,
        # parameters may be made of them.
        states = None if self.Z.isnan() else get_generators()
        found = look(self.model, self.guide, args, kwargs)
        structure = self._structures.get(found.signature)
        if structure is None or anew:
            structure = find_structure(
                self.model, self.guide, args, kwargs, self.local_plate, found
            )
        self._structures[found.signature] = self._structure = structure
        if states is not None:
            set_generators(states)

    def _sample(
        self,
        proposer: Proposer,
        num_samples: int,
        with_grad: bool = False,
        is_step: bool = False,
        names: Optional[Sequence[str]] = None,
    ) -> Accepted:
        accepted = sample(
            proposer,
            num_samples,
            lambda: self._find_threshold(proposer, is_step),
            self.epsilon,
            self._guess_acceptance(),
            self.max_steps * math.ceil(num_samples / self.num_samples),
            with_grad,
            () if torch.is_grad_enabled() else names or proposer.latents,
            is_checked=not names,  # draws of these are evaluated again
        )
        self._warn_of_invalid(accepted)
        return accepted

    def _guess_acceptance(self) -> float:
        """
        The acceptance from which the size of rounds is chosen, one of few values: a graph that
        is captured is for one of them.
        """
        Z = math.nan if self.adaptation == "Z_target" else self.Z.item()
        return self.Z_target if math.isnan(Z) else 2.0 ** (math.floor(2 * math.log2(Z)) / 2)

    def _warn_of_invalid(self, accepted: Accepted) -> None:
        self._num_proposed.add_(accepted.num_log_weights)
        if not accepted.num_invalid or self._has_warned:
            return
        self._num_invalid += accepted.num_invalid
        if self._num_proposed >= 100 and self._num_invalid > 0.01 * self._num_proposed:
            self._has_warned = True
            warnings.warn(
                f"{self._num_invalid} of {self._num_proposed} proposals had a log density "
                "that is -inf, +inf or NaN; they were rejected. Where the density of the "
                "model ends at a hard edge, the pathwise gradient of the guide is biased. "
                "Expected a latent site whose distribution has the support of the "
                "posterior, which automatic guides transform to the real line."
            )
