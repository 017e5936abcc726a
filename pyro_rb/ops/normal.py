# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Normal distributions whose parameters are shared by many draws."""

import math
from typing import Any, Iterator, Tuple

import torch
from torch import Tensor
from torch.distributions.utils import _sum_rightmost

from pyro_rb.ops.gather import compact
from pyro_rb.ops.gaussian import find_family, strip_independent

#: Elements of a tensor of which a few fit in the cache of a processor.
BLOCK = 2**16


def is_normal(fn: Any) -> bool:
    """
    Whether a distribution is Normal, after stripping ``Independent``.

    >>> is_normal(torch.distributions.Normal(torch.zeros(2), 1.0))
    True
    """
    return find_family(fn) is torch.distributions.Normal


def draw(fn: Any, shape: torch.Size) -> Tuple[Tensor, Tensor]:
    """
    A draw of an expanded ``fn``, and its log density, without a graph.

    :param fn: for which :func:`is_normal` is true, of batch shape ``batch``.
    :param shape: ``[*sample, *batch, *event]``.
    :return: of that shape, and ``[*sample, *batch]``.

    >>> fn = torch.distributions.Normal(torch.zeros(3), 2.0)
    >>> value, log_prob = draw(fn, torch.Size([100, 3]))
    >>> torch.allclose(log_prob, fn.log_prob(value), atol=1e-5)
    True
    """
    loc, scale, constant = (x.detach() for x in _parameters(fn))
    value, density = loc.new_empty(shape), loc.new_empty(shape)
    for x, v, m, s, c in _blocks(density, value, loc, scale, constant):
        noise = x.normal_()
        torch.addcmul(m, s, noise, out=v)
        torch.addcmul(c, noise, noise, value=-0.5, out=x)
    return value, _sum_rightmost(density, len(fn.event_shape))


def log_prob(fn: Any, value: Tensor) -> Tensor:
    """
    What ``fn.log_prob`` returns, a few times faster where many elements of the value
    share one location or scale.

    :param fn: for which :func:`is_normal` is true, of batch shape ``batch``.
    :param value: ``[*sample, *batch, *event]``.
    :return: ``[*sample, *batch]``.

    >>> fn = torch.distributions.Normal(torch.zeros(3), 2.0)
    >>> value = torch.randn(100, 3)
    >>> torch.allclose(log_prob(fn, value), fn.log_prob(value), atol=1e-6)
    True
    """
    if fn._validate_args:
        fn._validate_sample(value)
    loc, scale, constant = _parameters(fn)
    shape = torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
    if torch.is_grad_enabled():
        z = (value - loc) / scale
        density = torch.addcmul(constant, z, z, value=-0.5).expand(shape)
    else:
        density = loc.new_empty(shape)
        for x, v, m, s, c in _blocks(density, value, loc, scale, constant):
            torch.sub(v, m, out=x).div_(s)
            torch.addcmul(c, x, x, value=-0.5, out=x)
    return _sum_rightmost(density, len(fn.event_shape))


def redraw(fn: Any, value: Tensor) -> Tensor:
    """
    A draw once more, with a graph: by the noise that gave it.

    :param fn: for which :func:`is_normal` is true.
    :param value: a draw of it, of its shape.

    >>> loc = torch.zeros(2, requires_grad=True)
    >>> redraw(torch.distributions.Normal(loc, 1.0), torch.ones(2))
    tensor([1., 1.], grad_fn=<AddcmulBackward0>)
    """
    loc, scale, _ = _parameters(fn)
    return torch.addcmul(loc, scale, ((value - loc) / scale).detach())


def _parameters(fn: Any) -> Tuple[Tensor, Tensor, Tensor]:
    """Location, scale and log density at the mode, without what ``expand`` made of them."""
    base = strip_independent(fn)
    loc, scale = (compact(x.unsqueeze(-1)).squeeze(-1) for x in (base.loc, base.scale))
    return loc, scale, -scale.log() - 0.5 * math.log(2 * math.pi)


def _blocks(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Rows of several tensors in the shape of the first, few enough for the cache."""
    shape = tensors[0].shape
    if not shape:
        return iter([tensors])
    num_rows = max(1, BLOCK * shape[0] // max(1, shape.numel()))
    return zip(*(x.expand(shape).split(num_rows) for x in tensors))
