# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""How much memory a step takes, and what stops one that takes too much: :func:`peak_memory`, :class:`SizeLimit`."""

import gc
import math
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

#: Since this version a storage has one Python object as long as it lives.
_TRACKS_STORAGES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 1)
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def peak_memory(step: Callable[[], Any], device: torch.device) -> Optional[int]:
    """
    The largest number of bytes that ``step`` has allocated at any time and not yet freed;
    what existed before does not count. Runs ``step`` once, more slowly than usual.

    On the CPU each tensor that an operation returns is followed until its storage is
    freed; what operations use within themselves is not seen. On CUDA it is
    :func:`torch.cuda.max_memory_allocated`, whose statistics are reset.

    :param callable step: What to measure.
    :param ~torch.device device: Where its tensors are.
    :returns: The number, or None if it cannot be measured: on the CPU with
        PyTorch 2.0, and on other devices.

    **Example**

    >>> import torch
    >>> peak_memory(lambda: torch.zeros(1000).add(1).sum().item(), torch.device("cpu")) >= 8000
    True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _TRACKS_STORAGES:
        return None
    with _LiveStorage() as live, _without_collection():
        step()
    return live.peak


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage of earlier steps is not freed within. To collect it before takes longer than many steps."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _LiveStorage(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: Dict[int, Tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            id(item.untyped_storage())
            for item in tree_flatten((args, kwargs))[0]
            if _has_storage(item)
        }
        result = func(*args, **kwargs)
        for item in tree_flatten(result)[0]:
            if _has_storage(item) and id(item.untyped_storage()) not in given:
                self._follow(item.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:
            # The reference is kept, as its callback would be lost with it.
            self._sizes[key] = weakref.ref(storage, lambda _: self._freed(key)), size
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[1]


def _has_storage(item: Any) -> bool:
    return isinstance(item, Tensor) and item.layout == torch.strided


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
            if _has_storage(item):
                self._check(item.untyped_storage().nbytes() // item.element_size())
        return result

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ValueError(f"a tensor of {size} elements is needed, more than {self._most}")
