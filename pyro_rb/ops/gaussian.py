# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussian draws that keep their noise."""

import math
from typing import Any, Optional, Sequence

import torch
from torch.distributions import MultivariateNormal, Normal
from torch.distributions.utils import _standard_normal

from pyro_rb.ops.family import find_family, strip_independent


class GaussianDraw:
    r"""
    A draw :math:`v = \mu + V \epsilon` that keeps :math:`\epsilon`, from the generator
    stream that ``rsample`` would use.

    :param fn: a distribution for which ``find_family`` finds a family.

    >>> fn = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 2.0]))
    >>> draw = GaussianDraw(fn)
    >>> torch.equal(draw.value, draw.loc + draw.spread(draw.noise))
    True
    >>> draw.variance
    tensor([1., 4.])
    """

    def __init__(self, fn: Any) -> None:
        base = strip_independent(fn)
        shape = base.batch_shape + base.event_shape
        like = {"dtype": base.loc.dtype, "device": base.loc.device}
        self.shape = shape
        self.loc = base.loc.expand(shape)
        self._factor: Optional[torch.Tensor] = None
        family = find_family(fn)
        #: Whether each element of the value has a noise of its own.
        self.is_diagonal = family is Normal
        if self.is_diagonal:
            self.scale = base.scale  # of the same shape
            self.noise = _standard_normal(shape, **like)
        elif family is MultivariateNormal:
            self._factor = base._unbroadcasted_scale_tril  # [*batch, n, n]
            self.noise = _standard_normal(shape, **like)
        else:
            self._factor = base._unbroadcasted_cov_factor  # [*batch, n, rank]
            self.scale = base._unbroadcasted_cov_diag.sqrt()
            rank = self._factor.shape[-1:]
            parts = [_standard_normal(shape[:-1] + rank, **like), _standard_normal(shape, **like)]
            self.noise = torch.cat(parts, -1)  # [*batch, rank + n]
        self._base = base
        self._variance: Optional[torch.Tensor] = None
        self.value = self.loc + self.spread(self.noise)

    def spread(self, noise: torch.Tensor) -> torch.Tensor:
        """``V noise``, for noise of the shape of ``noise``."""
        if self._factor is None:
            return noise * self.scale
        rank = self._factor.shape[-1]
        found = (self._factor @ noise[..., :rank].unsqueeze(-1)).squeeze(-1)
        if noise.shape[-1] > rank:
            found = found + self.scale * noise[..., rank:]
        return found

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each element, in the shape of the value."""
        if self._variance is None:
            self._variance = self._find_variance().expand(self.shape)
        return self._variance

    def _find_variance(self) -> torch.Tensor:
        if self._factor is None:
            return self.scale.square()
        variance = self._factor.square().sum(-1)
        if self._factor.shape[-1] < self.noise.shape[-1]:
            variance = variance + self.scale.square()
        return variance

    def entropy(self, batch_dim: int) -> torch.Tensor:
        """
        The entropy, summed over the event.

        :param int batch_dim: the number of batch dims, at the left.
        """
        entropy = self.scale.log() if self.is_diagonal else self._base.entropy()
        event = entropy.shape[batch_dim:]
        if event:
            entropy = entropy.sum(tuple(range(batch_dim, entropy.dim())))
        if self.is_diagonal:
            entropy = entropy + event.numel() * 0.5 * math.log(2 * math.pi * math.e)
        return entropy


def entropy_path(
    draw: GaussianDraw, mean: torch.Tensor, excess: torch.Tensor
) -> torch.Tensor:
    """
    A tensor whose gradient has mean zero: the gradient of ``-log q`` along the path of a diagonal
    draw, given something about its noise, less the gradient of the entropy.

    :param mean: the conditional mean of the noise, in the shape of the draw.
    :param excess: the conditional mean of the square of the noise, less one.

    >>> scale = torch.tensor([2.0], requires_grad=True)
    >>> draw = GaussianDraw(torch.distributions.Normal(torch.zeros(1), scale))
    >>> entropy_path(draw, torch.zeros(1), torch.tensor([0.5])).sum().backward()
    >>> scale.grad
    tensor([0.2500])
    """
    scale = draw.scale.detach()
    return mean / scale * draw.loc + excess / scale * draw.scale


def prior_path(
    parts: Sequence[torch.Tensor], prior_loc: torch.Tensor, prior_scale: torch.Tensor
) -> torch.Tensor:
    """
    The same for the log density of a draw under a Normal prior, less the mean of that.

    :param parts: location and scale of the draw, ``mean`` and ``excess`` as in
        :func:`entropy_path`, in the shape of the prior.

    >>> loc, scale = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0])
    >>> prior_path([loc, scale, torch.tensor([0.5]), torch.zeros(1)], torch.zeros(1), torch.ones(1))
    tensor([-2.], grad_fn=<AddBackward0>)
    """
    loc, scale, mean, excess = parts
    with torch.no_grad():
        precision = prior_scale.square().reciprocal()
        by_loc = -precision * scale * mean
        by_scale = -precision * ((loc - prior_loc) * mean + scale * excess)
    return by_loc * loc + by_scale * scale
