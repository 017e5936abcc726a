# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch

from pyro_rb.infer.rvrs_options import check_count
from pyro_rb.infer.rvrs_proposals import Proposer, Structure, strip
from pyro_rb.infer.rvrs_sampler import (
    MAX_ROUND,
    Accepted,
    RejectionSamplingError,
    sample,
    solve_by_pilot,
)
from pyro_rb.infer.rvrs_structure import find_structure
from pyro_rb.ops.rejection import adapt_threshold, estimate_bound
from pyro_rb.poutine import ProposalMessenger

#: Draws from which medians and quantiles are taken.
NUM_QUANTILE_SAMPLES = 1000

#: Share of the latest call in the running mean of the acceptance.
_FORGET = 0.1


class PosteriorMixin:
    """
    The accepted draws of an :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`, and their
    threshold.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_rb import RVRSGuide
    >>> def model():
    ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
    >>> guide = RVRSGuide(model, AutoNormal(model, init_scale=1.0))
    >>> guide.sample_posterior(5)["z"].shape
    torch.Size([5])
    >>> value, error = guide.elbo(500)
    """

    model: Callable
    T: torch.Tensor
    Z: torch.Tensor
    num_samples: int
    epsilon: float
    Z_target: float
    adaptation: str
    T_lr: float
    max_steps: int
    local_plate: Optional[str]
    local_size: Optional[int]
    _structure: Optional[Structure]
    _num_proposed: int
    _num_invalid: int
    _has_warned: bool
    _has_one_threshold: bool

    @property
    def guide(self) -> Callable:
        """The proposal."""
        raise NotImplementedError

    # -- What users ask of the guide ------------------------------------------

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        Draws of the guide: proposals that were accepted, independent of one another. With
        a local plate, each has a draw of the global latents, and a subsample, of its own
        if there are any.

        :param int num_samples: number of draws, ``>= 1``.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: a dict of tensors ``[num_samples, *site]``, by name of the latent site.
        :raises ValueError: if ``num_samples`` is no positive int.
        :raises RejectionSamplingError: if acceptance is too low.
        """
        check_count("num_samples", num_samples, 1)
        draws: List[Dict[str, torch.Tensor]] = []
        with ProposalMessenger():  # nothing is seen from outside
            while sum(len(next(iter(d.values()))) for d in draws) < num_samples:
                proposer = self._make_proposer(args, kwargs)
                size = 1 if self._is_mixed(proposer) else num_samples
                accepted = self._sample(proposer, size)
                sites = accepted.rounds[0].joint.run.sites
                draw = {
                    name: value.unsqueeze(0)
                    for name, (value, _) in proposer.globals.items()
                    if name in sites
                }
                for name, value in accepted.values.items():
                    draw[name] = strip(sites[name], value)
                draws.append(draw)
        return {name: torch.cat([d[name] for d in draws]) for name in draws[0]}

    def _is_mixed(self, proposer: Proposer) -> bool:
        """Whether draws of one call share a global latent or a subsample."""
        return proposer.structure.has_globals or proposer.structure.is_subsampled

    def median(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """
        :return: the median of each latent site, of 1,000 draws by :meth:`sample_posterior`.
        """
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(
        self, quantiles: Union[Sequence[float], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        :param quantiles: between 0 and 1.
        :return: quantiles of each latent site, ``[len(quantiles), *site]``, of 1,000
            draws by :meth:`sample_posterior`.
        """
        draws = self.sample_posterior(NUM_QUANTILE_SAMPLES, *args, **kwargs)
        return {
            name: torch.quantile(x, torch.as_tensor(quantiles).to(x), dim=0)
            for name, x in draws.items()
        }

    @torch.no_grad()
    def elbo(self, num_samples: int, *args: Any, **kwargs: Any) -> Tuple[float, float]:
        """
        Evaluates the ELBO on fresh proposals, all of which are used, accepted or not: much
        more precise than the loss of a step. The bias is of the order of
        ``1 / num_samples``. The threshold stays as it is.

        :param int num_samples: number of proposals, ``>= 2``. With a local plate, for
            each item; if there are global latents or subsamples, they are shared out
            among draws of these, about 256 for each, and there must be 8 or more.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: the ELBO and its standard error.
        :raises ValueError: if ``num_samples`` is too small.
        :raises RejectionSamplingError: if no proposal has a finite log density.
        """
        check_count("num_samples", num_samples, 2)
        with ProposalMessenger():
            proposer = self._make_proposer(args, kwargs)
            if not self._is_mixed(proposer):
                return self._estimate(proposer, num_samples)
            check_count("num_samples", num_samples, 8)
            num_passes = max(4, num_samples // MAX_ROUND)
            values = []
            for _ in range(num_passes):
                value, _ = self._estimate(proposer, num_samples // num_passes)
                values.append(value)
                proposer = self._make_proposer(args, kwargs)
        x = torch.tensor(values, dtype=torch.float64)
        return x.mean().item(), (x.std() / num_passes**0.5).item()

    def _estimate(self, proposer: Proposer, num_samples: int) -> Tuple[float, float]:
        num_left = num_samples
        chunks = []
        while num_left:
            size = min(num_left, MAX_ROUND)
            chunks.append(proposer.propose(size, with_grad=False).log_weight.double())
            num_left -= size
        log_weight = torch.cat(chunks)
        if (log_weight == -math.inf).all(0).any():
            raise RejectionSamplingError(
                f"Found no finite log density among {num_samples} proposals. Expected some: "
                "raise num_samples, or fit the guide by plain SVI first."
            )
        T = self._find_threshold(proposer).double()
        bound = estimate_bound(log_weight, T, self.epsilon)
        value, error = bound.value.sum(), bound.standard_error.square().sum().sqrt()
        if proposer.plate is not None:
            scale = (proposer.plate.full_size or proposer.plate.size) / proposer.plate.size
            value, error = scale * value, scale * error
            if proposer.globals:
                value = value + proposer.log_ratio_of_globals()
        return value.item(), error.item()

    # -- Shared with the loss ---------------------------------------------------

    def _make_proposer(self, args: Tuple, kwargs: Dict) -> Proposer:
        if self._structure is None:
            self._structure = find_structure(
                self.model, self.guide, args, kwargs, self.local_plate
            )
        proposer = Proposer(self.model, self.guide, args, kwargs, self._structure)
        if self._structure.has_globals:
            proposer.draw_globals()
        return proposer

    def _sample(
        self,
        proposer: Proposer,
        num_samples: int,
        with_grad: bool = False,
    ) -> Accepted:
        guess = self.Z.item()
        accepted = sample(
            proposer,
            num_samples,
            lambda: self._find_threshold(proposer),
            self.epsilon,
            self.Z_target if math.isnan(guess) else guess,
            self.max_steps * math.ceil(num_samples / self.num_samples),
            proposer.structure.num_items,
            with_grad,
        )
        self._warn_of_invalid(accepted)
        return accepted

    def _find_threshold(self, proposer: Proposer) -> torch.Tensor:
        """``[*batch]``, for the items of this call."""
        if self.local_plate is not None and self.local_size is None:
            if self._has_one_threshold:
                return self.T
            return solve_by_pilot(proposer, self.Z_target, self.epsilon)
        index = self._find_items(proposer)
        T = self.T[index] if self.T.dim() else self.T
        is_unknown = T.isnan()
        if is_unknown.any():
            solved = solve_by_pilot(proposer, self.Z_target, self.epsilon)
            T = solved.to(T).where(is_unknown, T)
            self._set_threshold(index, T)
        return T

    def _find_items(self, proposer: Proposer) -> Any:
        """What ``T`` is to be indexed by, unless there is one for all."""
        if self.local_plate is None:
            return None
        frame = proposer.plate
        assert frame is not None
        size = frame.full_size or frame.size
        if size != self.local_size:
            raise ValueError(
                f"Found local_size={self.local_size}, and plate '{frame.name}' of size "
                f"{size}. Expected the same: one threshold for each item of the plate. For "
                "items that come without their numbers, or were not trained on, leave "
                "local_size=None; thresholds are then found at each call."
            )
        return proposer.subsamples[frame.name]

    def _set_threshold(self, index: Any, T: torch.Tensor) -> None:
        # Out of place: a graph may hold the old one.
        new = T.to(self.T.dtype)
        if self.T.dim():
            new = self.T.index_put((index,), new)
        self.T = new.detach()

    def _adapt(self, proposer: Proposer, accepted: Accepted) -> None:
        T = accepted.T
        mean = accepted.acceptance.mean().to(self.Z)
        self.Z = mean if self.Z.isnan() else self.Z + _FORGET * (mean - self.Z)
        if self.local_plate is not None and self.local_size is None:
            self.T = T.mean().to(self.T)  # for information
        elif self.adaptation == "Z_target":
            new = adapt_threshold(
                accepted.all_log_weights,
                T,
                self.Z_target,
                self.epsilon,
                self.T_lr,
                accepted.acceptance,
            )
            self._set_threshold(self._find_items(proposer), new)

    def _warn_of_invalid(self, accepted: Accepted) -> None:
        self._num_invalid += accepted.num_invalid
        self._num_proposed += accepted.all_log_weights.numel()
        share = self._num_invalid / self._num_proposed
        if share > 0.01 and self._num_proposed >= 100 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._num_invalid} of {self._num_proposed} proposals had a log density "
                "that is -inf, +inf or NaN; they were rejected. Where the density of the "
                "model ends at a hard edge, the pathwise gradient of the guide is biased. "
                "Expected a latent site whose distribution has the support of the "
                "posterior, which automatic guides transform to the real line."
            )
