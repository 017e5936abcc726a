# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
When does a score have mean zero?

Path gradients drop the term ``d log q(z; phi) / d phi`` at fixed ``z``, because
its mean is zero. That holds when ``log_prob`` is the log density of the draw, at
any value, and when the support does not move with the parameters. The functions
here check both on a :class:`torch.distributions.Distribution`.
"""

import inspect
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple

import torch
from torch.distributions import (
    AffineTransform,
    Distribution,
    PowerTransform,
    Transform,
    TransformedDistribution,
    constraints,
)

_InverseTransform = type(AffineTransform(0.0, 1.0).inv)


def base_dists(fn: Distribution) -> Iterator[Distribution]:
    """
    Yields ``fn``, its ``base_dist``, the ``base_dist`` of that, and so on.

    :param fn: any distribution, wrapped or not.

    >>> normal = torch.distributions.Normal(torch.zeros(3), 1.0)
    >>> fn = torch.distributions.Independent(normal, 1)
    >>> [type(d).__name__ for d in base_dists(fn)]
    ['Independent', 'Normal']
    """
    layer: Optional[Distribution] = fn
    while layer is not None:
        yield layer
        layer = getattr(layer, "base_dist", None)


def flat_transforms(fn: Distribution) -> List[Transform]:
    """
    All transforms under ``fn``, innermost first, composed ones taken apart.

    :param fn: any distribution, wrapped or not.

    >>> LogNormal = torch.distributions.LogNormal(0.0, 1.0)
    >>> [type(t).__name__ for t in flat_transforms(LogNormal)]
    ['ExpTransform']
    """
    found: List[Transform] = []
    for layer in reversed(list(base_dists(fn))):
        for transform in getattr(layer, "transforms", ()):
            found.extend(_parts(transform))
    return found


def _parts(transform: Transform) -> List[Transform]:
    if hasattr(transform, "parts"):
        return [leaf for part in transform.parts for leaf in _parts(part)]
    if hasattr(transform, "base_transform"):
        return _parts(transform.base_transform)
    return [transform]


def support_moves(fn: Distribution) -> bool:
    """
    Whether the support of ``fn`` depends on a parameter that requires grad.

    The score of ``Uniform(0, b)`` with respect to ``b`` is ``-1 / b`` at every
    draw, so its mean is not zero. The same holds for a Pareto with a learned
    scale, and for a bounded distribution that is shifted or stretched by a learned
    amount. Bounded supports under a learned transform that is not known here are
    taken to move.

    :param fn: any distribution, wrapped or not.

    >>> b = torch.tensor(2.0, requires_grad=True)
    >>> support_moves(torch.distributions.Uniform(0.0, b))
    True
    >>> support_moves(torch.distributions.Gamma(b, 1.0))
    False
    """
    for layer in base_dists(fn):
        edges = _edges(layer)
        if edges is not None and any(edge.requires_grad for edge in edges):
            return True
        if isinstance(layer, TransformedDistribution) and _edges_are_moved(layer):
            return True
    return False


def support_can_move(fn: Distribution) -> bool:
    """
    Whether :func:`support_moves` can be true of any distribution that is built of
    the same types as ``fn``: false for those on the real line, and for those with
    one support for all parameters. Cheap to remember, where parameters may be
    frozen and set free.

    :param fn: any distribution, wrapped or not.

    >>> support_can_move(torch.distributions.Uniform(0.0, 1.0))
    True
    >>> support_can_move(torch.distributions.Gamma(1.0, 1.0))
    False
    """
    *_, root = base_dists(fn)
    if _edges(root) == []:
        return False
    support = inspect.getattr_static(type(root), "support", None)
    is_fixed = isinstance(support, constraints.Constraint)
    return (
        not is_fixed or constraints.is_dependent(support) or bool(flat_transforms(fn))
    )


def _edges(fn: Distribution) -> Optional[List[torch.Tensor]]:
    try:
        return _ends(fn.support)
    except NotImplementedError:
        return None


def _ends(space: Any) -> Optional[List[torch.Tensor]]:
    """Finite ends of a constraint: none of the real line's, None where unknown."""
    while isinstance(space, constraints.independent):
        space = space.base_constraint
    if space in (constraints.real, constraints.real_vector):
        return []
    bounds = [getattr(space, name, None) for name in ("lower_bound", "upper_bound")]
    return [torch.as_tensor(bound) for bound in bounds if bound is not None] or None


def _edges_are_moved(fn: TransformedDistribution) -> bool:
    edges = _edges(fn.base_dist)
    for transform in flat_transforms(fn):
        if edges == []:
            return False
        if isinstance(transform, AffineTransform):
            if _requires_grad(transform.loc):
                return True
            if _requires_grad(transform.scale):
                if edges is None or any((edge != 0).any() for edge in edges):
                    return True
                continue
        elif isinstance(transform, PowerTransform):
            if _requires_grad(transform.exponent):
                if edges is None or any(((e != 0) & (e != 1)).any() for e in edges):
                    return True
                continue
        elif _is_learned(transform):
            return True
        edges = _transformed(edges, transform)
    return False


def _transformed(
    edges: Optional[List[torch.Tensor]], transform: Transform
) -> Optional[List[torch.Tensor]]:
    if edges is None:
        return None
    domain = _ends(transform.domain)
    if domain and _ends(transform.codomain) == []:
        # For one, the logit of a unit interval: the ends go to infinity.
        if len(domain) == len(edges) and all(
            (d == e).all() for d, e in zip(domain, edges)
        ):
            return []
    return [transform(edge) for edge in edges]


def _is_learned(transform: Transform) -> bool:
    inverted = _inverted(transform)
    if inverted is not None:
        return _is_learned(inverted)
    if isinstance(transform, torch.nn.Module):
        return any(p.requires_grad for p in transform.parameters())
    return any(_requires_grad(value) for value in vars(transform).values())


def _inverted(transform: Transform) -> Optional[Transform]:
    """The ``t`` of a ``t.inv``."""
    return transform.inv if isinstance(transform, _InverseTransform) else None


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def log_prob_has_memory(fn: Distribution, value: torch.Tensor) -> bool:
    """
    Whether ``log_prob`` needs the very tensor that ``rsample`` returned.

    Flows without an inverse look the draw up in a cache, straight-through
    relaxations read an attribute of it. Such a ``log_prob`` fails or gives another
    number on a copy. Batch normalisation moves its statistics at each call, so that
    its ``log_prob`` is no density at all; it counts as well.

    Caches and buffers of the transforms are put back as they were.

    :param fn: any distribution, wrapped or not.
    :param value: a draw of ``fn``, of shape ``batch_shape + event_shape``, or with
        sample dimensions on the left.

    >>> fn = torch.distributions.LogNormal(torch.zeros(3), 1.0)
    >>> log_prob_has_memory(fn, fn.rsample())
    False
    """
    with torch.no_grad(), _kept(flat_transforms(fn)) as buffers:
        known = fn.log_prob(value)
        try:
            fresh = fn.log_prob(value.detach().clone())
        except (KeyError, NotImplementedError):
            return True
        if not all(torch.equal(buffer, saved) for buffer, saved in buffers):
            return True
    # Inverting in float32 loses digits, so this only tells another function.
    return not torch.allclose(known, fresh, rtol=1e-2, atol=1e-2, equal_nan=True)


Buffers = List[Tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def _kept(transforms: List[Transform]) -> Iterator[Buffers]:
    transforms = transforms + [t for t in map(_inverted, transforms) if t is not None]
    attributes = [dict(vars(transform)) for transform in transforms]
    buffers = [
        (buffer, buffer.clone())
        for transform in transforms
        if isinstance(transform, torch.nn.Module)
        for buffer in transform.buffers()
    ]
    try:
        yield buffers
    finally:
        for transform, saved in zip(transforms, attributes):
            vars(transform).clear()
            vars(transform).update(saved)
        for buffer, saved_buffer in buffers:
            if not torch.equal(buffer, saved_buffer):
                # Only then: the graph of the draw may hold this version of it.
                buffer.copy_(saved_buffer)
