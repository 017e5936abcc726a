# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch

from pyro_rb.infer.rvrs_call import CallMixin
from pyro_rb.infer.rvrs_options import check_count
from pyro_rb.infer.rvrs_proposals import Proposer, Values, strip
from pyro_rb.infer.rvrs_sampler import (
    RejectionSamplingError,
    largest_round,
    take,
)
from pyro_rb.ops.rejection import bound_of_moments, moments
from pyro_rb.poutine import ProposalMessenger

#: Draws from which medians and quantiles are taken, and how many elements of all of
#: them are kept, and sorted, at a time.
NUM_QUANTILE_SAMPLES = 1000
KEPT_ELEMENTS = 2**25
SORTED_ELEMENTS = 2**22

#: Proposals for each draw of global latents, from which a bound is estimated.
NUM_PER_DRAW = 256

#: Items of the local plate that are run together; None for those of the call.
Items = Optional[torch.Tensor]


class PosteriorMixin(CallMixin):
    """
    Draws, quantiles and the ELBO of an :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`.

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

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        Draws from the guide: proposals that were accepted, independent of one another. If a
        local plate is subsampled, the draws are for all its items, in order, unless the
        arguments of a call choose its items. Each draw has global latents of its own.

        :param int num_samples: number of draws, ``>= 1``.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: a dict of tensors ``[num_samples, *site]``, by name of the latent site.
        :raises ValueError: if ``num_samples`` is not a positive int.
        :raises RejectionSamplingError: if the acceptance is too low.
        """
        check_count("num_samples", num_samples, 1)

        def draw(proposer: Proposer) -> Values:
            batches = self._find_batches(proposer)
            draws = []
            for one, num in self._passes(proposer, num_samples, args, kwargs):
                parts = [_cat(self._draw(one, num, items)) for items in batches]
                draws.append(_join(parts, batches, proposer))
            return _cat(draws)

        with ProposalMessenger():  # nothing is seen from outside
            return self._attempt(draw, args, kwargs)

    def median(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """
        :return: the median of each latent site, from 1,000 draws by :meth:`sample_posterior`.
        :raises NotImplementedError: see :meth:`quantiles`.
        """
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Union[Sequence[float], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        :param quantiles: between 0 and 1.
        :return: quantiles of each latent site, ``[len(quantiles), *site]``, from 1,000
            draws as by :meth:`sample_posterior`. If the draws are large, they are not all kept in
            memory at the same time.
        :raises NotImplementedError: naming the local plate, if model or guide gave it a subsample
            themselves. There are then no draws for its other items.
        """

        def find(proposer: Proposer) -> Values:
            batches = self._find_batches(proposer)
            structure = proposer.structure
            if structure.is_chosen and structure.is_subsampled:
                raise NotImplementedError(
                    f"Plate '{structure.plate}' was given a subsample of {structure.num_items} "
                    f"of its {structure.full_size} items. Expected a plate that chooses its items by "
                    "itself, for one entry for each of them. For the items that were given, "
                    "take quantiles of what sample_posterior() returns."
                )
            parts = [
                self._find_quantiles(proposer, items, quantiles, args, kwargs)
                for items in batches
            ]
            return _join(parts, batches, proposer)

        with ProposalMessenger():
            return self._attempt(find, args, kwargs)

    @torch.no_grad()
    def elbo(self, num_samples: int, *args: Any, **kwargs: Any) -> Tuple[float, float]:
        """
        Evaluates the ELBO on fresh proposals. It uses all of them, accepted or not, so it is much
        more precise than the loss of a step. The bias is of the order of
        ``1 / num_samples``. The threshold stays as it is.

        :param int num_samples: number of proposals, ``>= 2``. With a local plate, this is the
            number for each item. If there are global latents or subsamples, the proposals are divided
            among draws of these, about 256 for each, and ``num_samples`` must be at least 8.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: the ELBO and its standard error.
        :raises ValueError: if ``num_samples`` is too small.
        :raises RejectionSamplingError: if no proposal has a finite log density.
        """
        check_count("num_samples", num_samples, 2)

        def estimate(proposer: Proposer) -> Tuple[float, float]:
            structure = proposer.structure
            if not (structure.has_globals or structure.is_subsampled):
                return self._estimate(proposer, num_samples)
            check_count("num_samples", num_samples, 8)
            num_passes = max(4, num_samples // NUM_PER_DRAW)
            values = []
            for i in range(num_passes):
                one = proposer if i == 0 else self._make_proposer(args, kwargs)
                values.append(self._estimate(one, num_samples // num_passes)[0])
            x = torch.tensor(values, dtype=torch.float64, device="cpu")
            return x.mean().item(), (x.std() / num_passes**0.5).item()

        with ProposalMessenger():
            return self._attempt(estimate, args, kwargs)

    def _estimate(self, proposer: Proposer, num_samples: int) -> Tuple[float, float]:
        sums: Any = 0.0
        T: Any = None
        size = largest_round(proposer)
        for first in range(0, num_samples, size):
            proposals = proposer.propose(min(size, num_samples - first), with_grad=False)
            T = self._find_threshold(proposer).double() if T is None else T
            sums = sums + moments(proposals.log_weight, T, self.epsilon)
        bound = bound_of_moments(sums, num_samples, T)
        if (bound.acceptance == 0).any():
            raise RejectionSamplingError(
                f"Found no finite log density among {num_samples} proposals. Expected some: "
                "raise num_samples, or fit the guide by plain SVI first."
            )
        value, error = bound.value.sum(), bound.standard_error.square().sum().sqrt()
        scale = proposer.structure.full_size / proposer.structure.num_items
        value, error = scale * value, scale * error
        if proposer.globals:
            value = value + proposer.log_ratio_of_globals()
        return value.item(), error.item()

    # -- Draws --------------------------------------------------------------------

    def _passes(
        self, proposer: Proposer, num_samples: int, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Proposer, int]]:
        """Proposers, and how many draws to take of each: one if there are globals."""
        if not proposer.structure.has_globals:
            yield proposer, num_samples
            return
        for i in range(num_samples):
            yield proposer if i == 0 else self._make_proposer(args, kwargs), 1

    def _draw(self, proposer: Proposer, num_samples: int, items: Items) -> Iterator[Values]:
        """A few draws at a time, ``[num, *site]``."""
        structure = proposer.structure
        if items is not None:
            assert structure.plate is not None
            proposer.subsamples[structure.plate] = items
        size = max(1, int(2 * largest_round(proposer) * self.Z_target))
        for first in range(0, num_samples, size):
            accepted = self._sample(proposer, min(size, num_samples - first))
            values = take(proposer, accepted, proposer.latents)
            draws = {n: strip(structure.sites[n], x) for n, x in values.items()}
            for name, (value, _) in proposer.globals.items():
                if name in structure.sites:
                    draws[name] = value.unsqueeze(0)
            yield {name: draws[name] for name in structure.sites}

    def _find_quantiles(
        self, proposer: Proposer, items: Items, quantiles: Any, args: Tuple, kwargs: Dict
    ) -> Values:
        """Keeps some columns at a time, of draws of which each is a row."""
        shapes = {name: site.shape for name, site in proposer.structure.sites.items()}
        num_elements = NUM_QUANTILE_SAMPLES * sum(map(math.prod, shapes.values()))
        num_parts = math.ceil(num_elements / KEPT_ELEMENTS)
        found: Dict[str, List[torch.Tensor]] = {name: [] for name in shapes}
        for part in range(num_parts):
            rows: Dict[str, List[torch.Tensor]] = {name: [] for name in shapes}
            for one, num in self._passes(proposer, NUM_QUANTILE_SAMPLES, args, kwargs):
                for draws in self._draw(one, num, items):
                    for name, x in draws.items():
                        columns = x.reshape(len(x), -1).tensor_split(num_parts, 1)
                        rows[name].append(columns[part].clone())
            for name, xs in rows.items():
                for i in range(0, xs[0].shape[1], SORTED_ELEMENTS // NUM_QUANTILE_SAMPLES):
                    x = torch.cat([x[:, i : i + SORTED_ELEMENTS // NUM_QUANTILE_SAMPLES] for x in xs])
                    q = torch.as_tensor(quantiles, dtype=x.dtype, device=x.device)
                    found[name].append(torch.quantile(x, q, dim=0))
        return {n: torch.cat(xs, -1).reshape(-1, *shapes[n]) for n, xs in found.items()}

    # -- The items of a plate that is subsampled ----------------------------------

    def _find_batches(self, proposer: Proposer) -> List[Items]:
        """Subsamples that make up the whole of the local plate."""
        structure = proposer.structure
        if not structure.is_subsampled or structure.is_chosen:
            return [None]
        assert structure.plate is not None
        values = {
            name: site.value
            for name, site in proposer.run_alone(proposer.guide, {}).latents.items()
        }
        index = proposer.subsamples[structure.plate]
        others = (index + 1) % structure.full_size
        known, other = (self._log_densities(proposer, i, values) for i in (index, others))
        has_rows = any(_num_rows(x) == structure.num_items for x in structure.arguments)
        if has_rows and self.local_size is None and all(map(torch.equal, known, other)):
            # The items come as an argument, and those of the plate are made up.
            proposer.subsamples[structure.plate] = index
            return [None]
        num = structure.num_items * math.ceil(structure.full_size / structure.num_items)
        order = torch.arange(num, device=index.device) % structure.full_size
        return list(order.split(structure.num_items))

    def _log_densities(
        self, proposer: Proposer, items: torch.Tensor, values: Values
    ) -> List[torch.Tensor]:
        assert proposer.structure.plate is not None
        proposer.subsamples[proposer.structure.plate] = items
        runs = [proposer.run_alone(fn, values) for fn in (self.guide, self.model)]
        return [proposer.log_prob_sum(run) for run in runs]


def _num_rows(shape: Any) -> Optional[int]:
    return (shape or (None,))[0] if isinstance(shape, tuple) else shape


def _cat(draws: Any) -> Values:
    draws = list(draws)
    return {name: torch.cat([d[name] for d in draws]) for name in draws[0]}


def _join(parts: List[Values], batches: List[Items], proposer: Proposer) -> Values:
    """Puts the items of a plate together, of values ``[num, *site]``."""
    structure = proposer.structure
    if batches == [None] or structure.plate_dim is None:
        return parts[0]
    joined = dict(parts[0])
    for name in proposer.latents:
        dim = structure.plate_dim - structure.sites[name].event_dim
        whole = torch.cat([part[name] for part in parts], dim)
        joined[name] = whole.narrow(dim, 0, structure.full_size)
    return joined
