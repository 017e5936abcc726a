# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which tensors were computed from which values?"""

import linecache
import sys
from contextlib import ExitStack
from typing import Any, Dict, Iterable, Iterator, List, Optional

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_rb.ops.transforms import unwrap

#: Functions that hand numbers out to Python, which may decide by them what it does next.
_READS = frozenset(
    "item tolist numpy equal allclose is_nonzero __array__ __bool__ __int__ __float__ "
    "__complex__ __index__ __contains__ __format__".split()
)
#: Functions that look at no number of the arguments but the first.
_IGNORE_OTHERS = frozenset(["to", "type_as"])
#: Functions that tell what is the same as long as all is well.
_TESTS = frozenset(["isnan", "isinf", "isfinite"])
#: Functions that reduce all dims unless they are told which.
_REDUCTIONS = frozenset(
    "sum nansum mean nanmean prod max min amax amin median std var norm any all argmax "
    "argmin count_nonzero".split()
)
#: Code that checks what it reads or makes room for it, and does nothing else with it.
_CHECKS = (
    "torch.distributions.",
    "pyro.distributions.",
    "pyro.infer.",
    "pyro.poutine.",
    "pyro.util",
    "pyro_rb.poutine.topk_",
)

#: Results of functions that tell about shape and type.
_NO_NUMBERS = (bool, int, torch.Size, torch.dtype, torch.device)


class Provenance:
    """
    A context in which values are followed through all functions of PyTorch, also inside of
    ``torch.vmap``, ``torch.jit.script`` and functions with a derivative of their own.
    Compiled functions run uncompiled.

    What is followed is memory: views have the sources of what they are views of, and
    tensors keep their type and identity. Where a number is handed out to Python, as by
    ``.item()`` or ``if``, all that comes later may depend on it.

    A set of sources is an int with two bits for each: one for the source, and next to it
    one that is set where all dims have been reduced on the way, by a sum or the like.

    >>> z, w = torch.ones(3), torch.ones(3)
    >>> with Provenance() as provenance:
    ...     provenance.add(z, provenance.source("z"))
    ...     x, y = z[1:] + 1, w.clone()
    >>> provenance.names(provenance.sources(x)), provenance.names(provenance.sources(y))
    (['z'], [])
    """

    def __init__(self) -> None:
        #: Sources of the numbers that Python has read, to be cleared by others.
        self.read = 0
        #: Whether Python has read any number that comes from a source.
        self.has_read = False
        self._names: Dict[str, int] = {}  # each name with its number
        self._sources: Dict[int, int] = {}  # by the address of a storage
        self._kept: Dict[int, Any] = {}  # so that no other storage gets the address

    def __enter__(self) -> "Provenance":
        self._modes = ExitStack()
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._modes.close()

    def source(self, name: str) -> int:
        """:return: the source of a name, made at first use."""
        return 1 << 2 * self._names.setdefault(name, len(self._names))

    def names(self, sources: int) -> List[str]:
        """:return: the names in a set, whether reduced or not."""
        found, names = [], list(self._names) if sources else []
        while sources:
            i = ((sources & -sources).bit_length() - 1) // 2  # of the lowest bit
            found.append(names[i])
            sources &= ~(3 << 2 * i)
        return found

    def reduced(self, sources: int) -> int:
        """:return: those sources of a set that have been reduced, each by its first bit."""
        return (sources >> 1) & self._first_bits

    @property
    def _first_bits(self) -> int:
        return ((1 << 2 * len(self._names)) - 1) // 3

    def add(self, x: Any, sources: int) -> None:
        """
        Marks tensors, and what shares their memory, as computed from ``sources``.

        :param x: a tensor, or lists and tuples of them.
        """
        for tensor in _tensors((x,)):
            key = _memory(tensor)
            if key is None:
                # It cannot be followed.
                self.read |= sources
            elif sources:
                if key not in self._kept:
                    self._kept[key] = StorageWeakRef(unwrap(tensor).untyped_storage())
                self._sources[key] = self._sources.get(key, 0) | sources

    def sources(self, *xs: Any) -> int:
        """
        :param xs: objects, of which tensors, and lists and tuples of them, count.
        :return: what they were computed from.
        """
        found = 0
        for x in xs:
            if isinstance(x, torch.Tensor):
                found |= self._sources.get(_memory(x), 0)  # type: ignore[arg-type]
            elif isinstance(x, (list, tuple)):
                found |= self.sources(*x)
        return found

    def follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Marks the results ``out`` of a function."""
        if not self._sources or isinstance(out, _NO_NUMBERS) or name in _TESTS:
            return
        used = args
        if name.endswith("_like") or name.startswith("new_"):
            used = args[1:]  # the first gives shape and type
        elif name in _IGNORE_OTHERS:
            used, kwargs = args[:1], {}
        sources = self.sources(used, *kwargs.values())
        if not sources:
            return
        dim = kwargs.get("dim", kwargs.get("axis"))
        if name in _REDUCTIONS and len(args) == 1 and dim is None:
            sources |= (sources & self._first_bits) << 1
        if name == "__setitem__":
            self.add(args[0], sources)
        changed = kwargs.get("out", args[0])
        memories = {_memory(x) for x in _tensors((args, *kwargs.values()))}
        for x in _tensors((out,)):
            if x is changed or _memory(x) not in memories:
                self.add(x, sources)
            elif name == "__getitem__":
                # A view of the first argument, at a place that the others tell.
                self.read |= sources & ~self.sources(x)

    def note_read(self, x: Any) -> None:
        """Tells that Python has read the numbers of ``x``."""
        sources = self.sources(x)
        self.has_read |= bool(sources)
        self.read |= sources


class _Functions(TorchFunctionMode):
    """Sees what code calls: also reads, but no more than the outermost function."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self._provenance = provenance

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__
        if name in _READS:
            if not _is_check():
                self._provenance.note_read(args)
        elif name != "__get__":
            self._provenance.follow(name, args, kwargs, out)
        return out


class _Operators(TorchDispatchMode):
    """Sees all that is computed, however it is called."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self._provenance = provenance

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._provenance.follow(func.overloadpacket.__name__, args, kwargs, out)
        return out


def _is_check() -> bool:
    """Whether the function that the mode sees is called by code that only checks values."""
    frame: Any = sys._getframe(2)
    # Other modes may stand in between.
    while (
        frame.f_code.co_name == "__torch_function__"
        or frame.f_globals["__name__"] == "torch.overrides"
    ):
        frame = frame.f_back
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    is_assert = line.lstrip().startswith("assert ")
    return is_assert or frame.f_globals["__name__"].startswith(_CHECKS)


def _tensors(xs: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in xs:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _memory(x: Any) -> Optional[int]:
    """Names the memory of a tensor. None if it has none of its own."""
    x = unwrap(x)
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
