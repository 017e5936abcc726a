# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The flows of zuko, which need not be installed.

A flow of zuko maps draws to noise, so that layers are inverted to draw, and the density at a value that is given
comes in one pass. Its inverted layers, ``transform.inv``, draw in one pass and invert for the density. Either way
``y = f(x; h(x))``, elementwise in the first ``x``, with a network ``h`` by which an element depends on others before
it: ``J = diag(scale) + N`` with a nilpotent ``N``.
"""

from functools import partial
from typing import Any, List, Optional, Tuple

import torch
from torch.distributions import TransformedDistribution

from pyro_rb.ops.triangular import SMALL, iterate, substitute

#: Continuous, with slopes that are bounded away from zero, and an inverse by a formula.
ELEMENTWISE = {"AdditiveTransform", "IdentityTransform", "MonotonicAffineTransform", "MonotonicRQSTransform"}
LAYERS = {"AutoregressiveTransform", "CouplingTransform"}
#: What the parameters of layers are computed by. All are continuous.
NETWORKS = set(
    """GeneralCouplingTransform LayerNorm MLP MNN MaskedAutoregressiveTransform MaskedMLP MonotonicLinear MonotonicMLP
    Residual TwoWayELU UMNN""".split()
)


def zuko_name(part: Any) -> Optional[str]:
    """
    The name of a class, or of the class of an object, if it is one of zuko's.

    >>> zuko_name(torch.nn.ReLU())
    """
    cls = part if isinstance(part, type) else type(part)
    return cls.__name__ if cls.__module__.startswith("zuko.") else None


def is_layer(transform: Any) -> bool:
    """
    Whether a transform is an autoregressive or a coupling layer of zuko.

    >>> is_layer(torch.distributions.ExpTransform())
    False
    """
    return zuko_name(transform) in LAYERS


def as_transformed(fn: Any) -> Any:
    """
    A flow of zuko, also in Pyro's wrapper, as a :class:`~torch.distributions.TransformedDistribution`. Others are
    returned as they are.

    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> as_transformed(normal) is normal
    True
    """
    cls = type(fn)
    if f"{cls.__module__}.{cls.__name__}" == "pyro.contrib.zuko.ZukoToPyro" and vars(fn).keys() == {"dist", "cache"}:
        fn = fn.dist
    if zuko_name(fn) == "NormalizingFlow":
        return TransformedDistribution(fn.base, fn.transform.inv, validate_args=False)
    return fn


def parts_of(transform: Any) -> Optional[List[Any]]:
    """
    What a transform of zuko is made of, if it is composed, or wrapped.

    >>> parts_of(torch.distributions.ExpTransform())
    """
    name = zuko_name(transform)
    if name == "ComposedTransform":
        return list(transform.transforms)
    return [transform.base] if name == "DependentTransform" else None


def is_bisected(transform: Any) -> bool:
    """
    Whether the inverse of a transform is found by bisection, as that of neural autoregressive layers.

    >>> is_bisected(torch.distributions.ExpTransform())
    False
    """
    if not is_layer(transform):
        return False
    univariate = transform.meta.func.__self__.univariate
    univariate = univariate.func if isinstance(univariate, partial) else univariate
    return zuko_name(univariate) not in ELEMENTWISE


def solve(transform: Any, x: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    """
    As :func:`pyro_rb.ops.affine_autoregressive.solve`, for a layer of zuko.

    :param transform: for which :func:`is_layer` holds.

    >>> from zuko.flows import MaskedAutoregressiveTransform  # doctest: +SKIP
    >>> solve(MaskedAutoregressiveTransform(3)(), torch.zeros(3), torch.ones(3))[1]  # doctest: +SKIP
    'substitution'
    """
    maker = transform.meta.func.__self__
    order = getattr(maker, "order", None)
    if order is not None and x.dim() == 1 and x.numel() <= SMALL:
        rows, of_log_det = _differentiate_rows(transform, x)
        return substitute(rows, rows.diagonal(), b - of_log_det, order.argsort()), "substitution"
    with torch.enable_grad():
        others, own = (x.detach().clone().requires_grad_() for _ in range(2))
        if zuko_name(transform) == "CouplingTransform":
            # The rest is drawn as it is, and counts by the network alone.
            given, taken = transform.idx_a, transform.idx_b
            y, log_det = transform.meta(others[..., given]).call_and_ladj(own[..., taken])
            num_steps = 1
        else:
            given = taken = slice(None)
            y, log_det = transform.meta(others).call_and_ladj(own)
            num_steps = transform.passes - 1
        scale = torch.ones_like(x)
        scale[..., taken] = _differentiate(y, own, torch.ones_like(y))[..., taken]
        start = b - _differentiate(log_det, own, torch.ones_like(log_det))

    def step(a: torch.Tensor) -> torch.Tensor:
        outputs, grads = [y], [a[..., taken]]
        if log_det.requires_grad:
            outputs.append(log_det)
            grads.append(torch.ones_like(log_det))
        by_others = torch.autograd.grad(outputs, others, grads, retain_graph=True, materialize_grads=True)[0]
        return (start - by_others) / scale

    return iterate(step, step(torch.zeros_like(b)), num_steps)


def _differentiate_rows(transform: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The Jacobian, and the derivative of the logarithm of its determinant, from a copy of the draw for each row."""
    eye = torch.eye(len(x) + 1, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        copies = x.detach().expand(len(x) + 1, -1).clone().requires_grad_()
        y, log_det = transform.call_and_ladj(copies)
    outputs, grads = [y], [eye[:, :-1]]
    if log_det.requires_grad:
        outputs.append(log_det)
        grads.append(eye[:, -1])
    found = torch.autograd.grad(outputs, copies, grads)[0]
    return found[:-1], found[-1]


def _differentiate(output: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if not output.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(output, x, grad, retain_graph=True, materialize_grads=True)[0]
