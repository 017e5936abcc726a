# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from threading import get_ident
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from pyro_rb.infer.generators import (
    get_generators,
    get_torch_generators,
    set_generators,
    set_torch_generators,
)

#: A module, the name of a buffer, the tensor and a copy.
_Buffer = Tuple[torch.nn.Module, str, Any, Any]


class Start:
    """
    Where runs of guide and model begin: random numbers, and buffers such as running means of batch
    normalization. A run that is not kept leaves nothing behind.

    :param bool has_all: whether random numbers of Python and NumPy count, too.

    >>> start, norm = Start(), torch.nn.BatchNorm1d(2)
    >>> with start.watch():
    ...     _ = norm(torch.randn(3, 2))
    >>> start.go_back()
    >>> norm.running_mean
    tensor([0., 0.])
    """

    def __init__(self, has_all: bool = False) -> None:
        states = get_generators() if has_all else get_torch_generators()
        put_back: Callable[[Any], None] = set_generators if has_all else set_torch_generators
        self._go_back = lambda: put_back(states)
        self._buffers: Dict[int, List[_Buffer]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, buffers of modules that are called are noted before."""
        thread = get_ident()

        def note(module: torch.nn.Module, inputs: Any) -> None:
            if module._buffers and id(module) not in self._buffers and get_ident() == thread:
                self._buffers[id(module)] = _copy(module)

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def go_back(self) -> None:
        self._go_back()
        for buffers in self._buffers.values():
            _put_back(buffers)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, another run is made from here, whose buffers do not count."""
        kept = [_copy(buffers[0][0]) for buffers in self._buffers.values() if buffers]
        self.go_back()
        try:
            yield
        finally:
            for buffers in kept:
                _put_back(buffers)


def _copy(module: torch.nn.Module) -> List[_Buffer]:
    buffers = [(name, x) for name, x in module._buffers.items() if x is None or not is_lazy(x)]
    with torch._C.DisableTorchFunction():  # it is none of the user's code
        return [(module, name, x, None if x is None else x.detach().clone()) for name, x in buffers]


def _put_back(buffers: List[_Buffer]) -> None:
    for module, name, buffer, value in buffers:
        module._buffers[name] = buffer
        if buffer is not None:
            with torch._C.DisableTorchFunction():
                buffer.data.copy_(value)  # by data, as autograd has no use for running means and need not know
