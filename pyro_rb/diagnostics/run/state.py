# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Leaves the world as it was found: :func:`preserve_state`."""

import functools
import sys
from collections.abc import Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import pyro
import torch
from torch import Tensor, nn

from pyro_rb.infer.generators import get_generators, set_generators

#: Objects of these packages lead to no module of the user's; what their closures hold may.
_LIBRARIES = {"numpy", "pandas", "pyro", "scipy", "torch", *sys.stdlib_module_names} - {"__main__"}
_VALUES = (bool, bytes, float, int, str, type(None), Tensor)
_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


class Snapshot:
    """
    What :func:`preserve_state` puts back. It can grow within the block.

    :param roots: Models, guides, arguments: whatever may lead to modules.

    **Example**

    >>> module = nn.Linear(2, 1)
    >>> bias = module.bias.item()
    >>> snapshot = Snapshot([module])
    >>> _ = module.bias.data.add_(1)
    >>> snapshot.restore()
    >>> module.bias.item() == bias
    True
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._seen: Dict[int, Any] = {}  # holds the objects, so that no id is used twice
        self._owners: List[Tuple[Any, Dict[str, Tuple[Any, Any]]]] = []
        self._tensors: Dict[int, Tuple[Tensor, Tensor, Optional[Tensor]]] = {}
        self._roots = list(roots)
        self.add(*self._roots)

    @property
    def roots(self) -> List[Any]:
        """All objects from which the search has begun."""
        return self._roots

    def add(self, *roots: Any) -> None:
        """Keeps the modules that can be reached from ``roots``, as they are now."""
        owned = {id(root) for root in roots if callable(root)}
        queue = list(roots)
        while queue:
            item = queue.pop()
            if id(item) in self._seen:
                continue
            self._seen[id(item)] = item
            is_module = isinstance(item, nn.Module)
            if is_module or id(item) in owned and _has_attributes(item):
                self._owners.append((item, _shallow_copy(vars(item))))
            if is_module:
                self.add_tensors(_tensors_of(item))
                owned.update(id(value) for value in vars(item).values())
            if isinstance(item, MethodType):
                owned.add(id(item.__self__))
            queue.extend(child for child in _children(item) if not isinstance(child, _VALUES))

    def add_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Keeps the values and gradients of leaves; only those can be written to."""
        for tensor in tensors:
            if id(tensor) not in self._tensors and tensor.is_leaf and not nn.parameter.is_lazy(tensor):
                self._tensors[id(tensor)] = tensor, tensor.detach().clone(), tensor.grad
                tensor.grad = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """
        Within the block, in which nothing may be trained, modules are also kept as they are
        before they are first called, wherever they are stored, and parameters that Pyro's param
        store gets to know.
        """

        def keep(module: nn.Module, _: Any) -> None:
            if id(module) not in self._seen:
                self._roots.append(module)
                self.add(module)

        hook = nn.modules.module.register_module_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()
            self.add_tensors(tensor for _, tensor in pyro.get_param_store().named_parameters())

    def restore(self) -> None:
        for owner, contents in self._owners:
            _restore(vars(owner), contents)
        with torch.no_grad():
            for tensor, value, grad in self._tensors.values():
                # Writing only what has changed keeps graphs that hold it usable.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.grad = grad


@contextmanager
def preserve_state(*roots: Any) -> Iterator[Snapshot]:
    """
    Context manager in which models and guides may run, and even be trained, without leaving a
    trace. On exit, also after an exception, these are as they were on entry:

    * Pyro's param store: which parameters exist, their values and constraints;
    * the random number generators of torch (CPU, and CUDA if it is in use), numpy and
      :mod:`random`;
    * each :class:`torch.nn.Module` that can be reached from ``roots``: parameters, buffers,
      training mode, attributes, and submodules that a lazy initialization has added (an
      autoguide that had not run is uninitialized again);
    * the ``.grad`` of all these parameters, which is set to ``None`` at the start of the block.

    Modules are restored in place: tensors stay the same objects, so that optimizers which
    hold them go on working. They are not deep-copied, since copies would part modules
    that model and guide share.

    A module is reached if it is one of ``roots``, or lies in a container, an attribute, a method,
    a :func:`functools.partial`, a Pyro handler, or a global or enclosing variable that a function
    names. A module that cannot be reached is preserved too if it is called, or its parameters are
    registered with Pyro, within the ``watch()`` of the snapshot that the block is given. Other
    state, such as a counter in a global variable or a file, is not preserved.

    :param roots: Models, guides, and their arguments.

    **Example**

    >>> import pyro, torch
    >>> pyro.clear_param_store()
    >>> def guide():
    ...     return pyro.param("loc", torch.randn(()))
    >>> with preserve_state(guide):
    ...     _ = guide()
    ...     print(list(pyro.get_param_store()))
    ['loc']
    >>> print(list(pyro.get_param_store()))
    []
    """
    store = pyro.get_param_store()
    generators = get_generators()
    store_state = _store_state()
    snapshot = Snapshot(roots)
    snapshot.add_tensors(store_state["params"].values())
    try:
        yield snapshot
    finally:
        snapshot.restore()
        store.clear()
        store.set_state(store_state)
        _store_state()
        set_generators(generators)


def _store_state() -> Any:
    store = pyro.get_param_store()
    state = store.get_state()
    # get_state() takes the `unconstrained` attribute from the parameters, reading them
    # puts it back.
    for _ in store.values():
        pass
    return state


def _children(item: Any) -> List[Any]:
    """What the search goes on with."""
    if isinstance(item, nn.Module):
        return list(vars(item).values())
    if isinstance(item, MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, FunctionType):
        return _variables(item)
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    if isinstance(item, type):
        return [] if _is_of_library(item) else list(vars(item).values())
    if isinstance(item, (property, classmethod, staticmethod)):
        return [getattr(item, "fget", None) or getattr(item, "__func__", None)]
    if isinstance(item, ModuleType) or _is_of_library(type(item)):
        return []
    names = [name for cls in type(item).__mro__ for name in _slots(cls)]
    inside = [getattr(item, name) for name in names if hasattr(item, name)]
    return [*inside, *getattr(item, "__dict__", {}).values(), type(item)]


def _variables(function: FunctionType) -> List[Any]:
    """Variables and default arguments that a function names, and so may use."""
    found: List[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found += vars(function).values()
    namespace = function.__globals__
    # The globals of a library lead to no module of the user's.
    if namespace.get("__name__", "").split(".")[0] not in _LIBRARIES:
        names = _names(function.__code__)
        for value in [namespace[name] for name in names if name in namespace]:
            if isinstance(value, ModuleType):
                if value.__name__.split(".")[0] not in _LIBRARIES:
                    found += [vars(value)[name] for name in names if name in vars(value)]
            else:
                found.append(value)
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            pass
    return found


def _names(code: CodeType) -> Set[str]:
    """Also of functions and comprehensions within."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner)


def _slots(cls: type) -> Tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _has_attributes(item: Any) -> bool:
    return hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType, FunctionType, MethodType))


def _is_of_library(cls: type) -> bool:
    package = getattr(cls, "__module__", "builtins").split(".")[0]
    return package in _LIBRARIES and not issubclass(cls, SimpleNamespace)


def _tensors_of(module: nn.Module) -> List[Tensor]:
    values = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
    return [value for value in values if isinstance(value, Tensor)]


def _shallow_copy(attributes: Dict[str, Any]) -> Dict[str, Tuple[Any, Any]]:
    """Each attribute and, where it is a container, what is in it."""
    return {
        name: (value, _contents(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in attributes.items()
    }


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def _restore(attributes: Dict[str, Any], contents: Dict[str, Tuple[Any, Any]]) -> None:
    for name in set(attributes) - set(contents):
        del attributes[name]
    for name, (value, inside) in contents.items():
        attributes[name] = value
        if inside is not None and _differs(_contents(value), inside):
            value.clear()
            if isinstance(value, MutableMapping):
                value.update(inside)
            elif isinstance(value, MutableSequence):
                value.extend(inside)
            else:
                for element in inside:
                    value.add(element)


def _differs(now: Any, before: Any) -> bool:
    # By identity, since == on tensors is elementwise.
    if isinstance(before, dict):
        return list(map(id, now.values())) != list(map(id, before.values())) or (
            list(now) != list(before)
        )
    return list(map(id, now)) != list(map(id, before))
