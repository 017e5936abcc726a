# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Derivatives of parts of a function that :func:`torch.func.grad` transforms as a whole.

There no tensor can be made a leaf. What is computed from values only, and is constant for the
derivative, can be computed outside.
"""

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor


def is_inside_of_func() -> bool:
    """
    Whether the code runs inside of a function that :mod:`torch.func` transforms.

    >>> torch.func.vmap(lambda x: x + is_inside_of_func())(torch.zeros(2))
    tensor([1., 1.])
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """
    Within the context, operations on what :func:`plain` returns are as outside of :mod:`torch.func`.

    >>> def slope(x):
    ...     with outside_of_transforms():
    ...         leaf = plain(x).requires_grad_()
    ...         return torch.autograd.grad(leaf**2, leaf)[0]
    >>> torch.func.grad(lambda x: x * slope(x))(torch.tensor(3.0))
    tensor(6.)
    """
    if not is_inside_of_func():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def unwrap(x: Any) -> Any:
    """
    The innermost tensor, inside of those that transforms have made of it.

    >>> unwrap(torch.ones(2))
    tensor([1., 1.])
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def plain(x: Tensor) -> Tensor:
    """
    The values of a tensor, without a graph.

    >>> torch.func.grad(lambda x: x * plain(2.0 * x))(torch.tensor(3.0))
    tensor(6.)
    """
    return unwrap(x.detach())
