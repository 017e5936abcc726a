# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Calls of PyTorch functions that are linear in each of their factors."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F


class _Signature(NamedTuple):
    names: Tuple[str, ...]  # of positional arguments that may come as keywords
    factors: Tuple[int, ...]
    term: Optional[int] = None  # position of an argument that is added


_LINEAR = _Signature(("input", "weight", "bias"), (0, 1), 2)
_MATMUL = _Signature(("input", "other"), (0, 1))
_ADDMM = _Signature(("input", "mat1", "mat2"), (1, 2), 0)
_SIGNATURES: Dict[Any, _Signature] = {
    F.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
    torch.linalg.matmul: _MATMUL,
    torch.einsum: _Signature(("equation",), ()),
    torch.tensordot: _Signature(("a", "b"), (0, 1)),
}
for _conv in (F.conv1d, F.conv2d, F.conv3d):
    _SIGNATURES[_conv] = _LINEAR
for _name, _signature in {
    "mm": _Signature(("input", "mat2"), (0, 1)),
    "mv": _Signature(("input", "vec"), (0, 1)),
    "bmm": _Signature(("input", "mat2"), (0, 1)),
    "dot": _Signature(("input", "tensor"), (0, 1)),
    "vdot": _Signature(("input", "other"), (0, 1)),
    "inner": _Signature(("input", "other"), (0, 1)),
    "addmm": _ADDMM,
    "addmv": _Signature(("input", "mat", "vec"), (1, 2), 0),
    "baddbmm": _Signature(("input", "batch1", "batch2"), (1, 2), 0),
}.items():
    _SIGNATURES[getattr(torch, _name)] = _signature
    _SIGNATURES[getattr(torch.Tensor, _name)] = _signature


_ADDMMS = (torch.addmm, torch.Tensor.addmm)


class LinearCall:
    """
    A call of a function that is linear in each factor, and to which a term may be added.

    :param func: the function, one of those that :meth:`bind` knows.
    :param list args: its positional arguments.
    :param dict kwargs: the other ones.

    >>> x, w = torch.ones(2, 3), torch.ones(4, 3)
    >>> call = LinearCall.bind(F.linear, (x,), {"weight": w})
    >>> call.factors, call.term
    ((0, 1), None)
    >>> call({1: 2 * w}).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        func: Callable,
        args: List[Any],
        kwargs: Dict[str, Any],
        factors: Tuple[int, ...],
        term: Optional[int],
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        #: Positions of the arguments that are multiplied.
        self.factors = factors
        #: Position of the argument that is added, if there is one.
        self.term = term

    @classmethod
    def bind(
        cls, func: Callable, args: Tuple, kwargs: Dict[str, Any]
    ) -> Optional["LinearCall"]:
        """Returns None unless this is a call of a known function with all factors in their place."""
        signature = _SIGNATURES.get(func)
        if signature is None or kwargs.get("out") is not None:
            return None
        bound, rest = list(args), dict(kwargs)
        for name in signature.names[len(bound) :]:
            if name not in rest:
                break
            bound.append(rest.pop(name))
        factors, term = signature.factors, signature.term
        if func is torch.einsum:
            if not (bound and isinstance(bound[0], str)):
                return None
            if len(bound) == 2 and isinstance(bound[1], (list, tuple)):
                bound = [bound[0], *bound[1]]
            factors = tuple(range(1, len(bound)))
        if term is not None and (term >= len(bound) or bound[term] is None):
            term = None
        tensors = factors if term is None else (*factors, term)
        if not all(i < len(bound) and isinstance(bound[i], torch.Tensor) for i in tensors):
            return None
        return cls(func, bound, rest, factors, term)

    def __call__(self, replaced: Dict[int, Any]) -> torch.Tensor:
        """The value with some arguments replaced, by position."""
        args = [replaced.get(i, arg) for i, arg in enumerate(self.args)]
        return self.func(*args, **self.kwargs)

    @property
    def is_layer(self) -> bool:
        """Whether this is a linear layer on a matrix of inputs, a row for each case."""
        return (
            self.func is F.linear and self.args[0].dim() == 2 and self.args[1].dim() == 2
        )


class Rows(NamedTuple):
    """
    A call as a linear layer: every unit, a row of the factor, has a product with each of
    the same rows, and an element of the term, if there is one, added to it.
    """

    rows: torch.Tensor  # [*batch, m, k]
    to_units: Callable[[torch.Tensor], torch.Tensor]  # factor to [*batch, units, k]
    from_units: Callable[[torch.Tensor], torch.Tensor]  # and back


def find_rows(call: LinearCall, factor: int, has_term: bool) -> Optional[Rows]:
    """
    :param int factor: position of the factor that is random.
    :param bool has_term: whether the term is random too.
    :return: None if the call is no linear layer in that factor, or in factor and term.

    >>> x, w = torch.ones(2, 3), torch.ones(3, 4)
    >>> form = find_rows(LinearCall.bind(torch.matmul, (x, w), {}), 1, False)
    >>> form.rows.shape, form.to_units(w).shape
    (torch.Size([2, 3]), torch.Size([4, 3]))
    """
    if call.func is torch.einsum or call.func is torch.tensordot:
        return None
    if call.func in (F.conv1d, F.conv2d, F.conv3d):
        return None
    u = call.args[factor]
    other = call.args[sum(call.factors) - factor].detach()
    if u.dim() == 0 or other.dim() == 0:
        return None
    is_left = factor == call.factors[0]
    if call.func is F.linear or call.func in (torch.inner, torch.Tensor.inner):
        # Both have their contracted dim last; bias is by unit if the weight is random.
        if has_term and is_left:
            return None
        is_transposed = False
        other = other.reshape(-1, other.shape[-1])
    else:
        if has_term and (is_left or call.func not in _ADDMMS or call.kwargs):
            return None
        # The contracted dim of the left factor is its last, of the right one its first.
        is_transposed = not is_left and u.dim() > 1
        if other.dim() == 1:
            other = other.unsqueeze(0)
        elif is_left:
            other = other.mT
    shape = u.mT.shape if is_transposed else u.shape
    if u.dim() <= 2 or other.dim() == 2:
        other = other.reshape(-1, other.shape[-1])
        flat = (-1, shape[-1])
    elif torch.broadcast_shapes(other.shape[:-2], shape[:-2]) == shape[:-2]:
        flat = tuple(shape)
    else:
        return None
    if has_term and call.args[call.term].shape != shape[:-1]:  # type: ignore[index]
        return None

    def to_units(x: torch.Tensor) -> torch.Tensor:
        return (x.mT if is_transposed else x).reshape(flat)

    def from_units(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(shape)
        return x.mT if is_transposed else x

    return Rows(other, to_units, from_units)
