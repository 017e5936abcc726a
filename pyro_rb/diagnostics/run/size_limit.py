# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Stops a computation whose tensors grow too large: :class:`SizeLimit`."""

import math
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class SizeLimit(TorchDispatchMode):
    """
    Within the block no operation may make a tensor of more than ``most`` elements. What tensors are
    broadcast to is known before the memory for it is taken.

    :raises ValueError: At the first operation that would.

    **Example**

    >>> import torch
    >>> with SizeLimit(100):
    ...     torch.ones(20, 1) + torch.ones(20)
    Traceback (most recent call last):
    ValueError: a tensor of 400 elements is needed, more than 100
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None
    ) -> Any:
        tensors = [item for item in tree_flatten((args, kwargs or {}))[0] if isinstance(item, Tensor)]
        shapes = [tensor.shape for tensor in tensors]
        if func.overloadpacket.__name__ in _PRODUCTS:
            self._check(math.prod(shapes[-2][:-1]) * shapes[-1][-1])
        elif len(shapes) > 1:
            try:
                self._check(math.prod(torch.broadcast_shapes(*shapes)))
            except RuntimeError:  # not an operation that broadcasts
                pass
        result = func(*args, **(kwargs or {}))
        for item in tree_flatten(result)[0]:
            if isinstance(item, Tensor) and item.layout == torch.strided:
                self._check(item.untyped_storage().nbytes() // item.element_size())
        return result

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ValueError(f"a tensor of {size} elements is needed, more than {self._most}")
