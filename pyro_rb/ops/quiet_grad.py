# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives on the side, at which no hooks of the user fire."""

from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch


@contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """
    Within the context, hooks of the tensors do not fire, and ``retain_grad`` retains nothing.

    >>> x = torch.ones((), requires_grad=True)
    >>> handle = x.register_hook(print)
    >>> with without_hooks([x]):
    ...     _ = torch.autograd.grad(2 * x, x)
    >>> _ = torch.autograd.grad(3 * x, x)
    tensor(3.)
    """
    suspended: List[Tuple[Any, Any]] = []
    retained: List[Tuple[torch.Tensor, Optional[torch.Tensor]]] = []
    try:
        for tensor in tensors:
            hooks = tensor._backward_hooks
            if hooks:
                # In place: the autograd engine reads this very dict.
                suspended.append((hooks, dict(hooks)))
                hooks.clear()
            if tensor.retains_grad:
                retained.append((tensor, tensor.grad))
        yield
    finally:
        for hooks, before in suspended:
            hooks.update(before)
        for tensor, grad in retained:
            tensor.grad = grad


def quiet_grad(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad_outputs: Optional[Sequence[Optional[torch.Tensor]]] = None,
    between: Iterable[torch.Tensor] = (),
) -> Tuple[Optional[torch.Tensor], ...]:
    """
    :func:`torch.autograd.grad`, without the hooks of ``inputs``. Keeps the graph.

    :param between: further tensors whose hooks are not to fire.
    :return: a derivative for each input, None where there is none.

    >>> x = torch.ones((), requires_grad=True)
    >>> quiet_grad([2 * x], [x])
    (tensor(2.),)
    """
    with without_hooks([*inputs, *between]):
        return torch.autograd.grad(
            outputs, inputs, grad_outputs, retain_graph=True, allow_unused=True
        )
