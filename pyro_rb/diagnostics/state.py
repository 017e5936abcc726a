# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Leaves the world as it was found: :func:`preserve_state`.
"""

import functools
from collections.abc import MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn


@contextmanager
def preserve_state(*callables: Callable) -> Iterator[None]:
    """
    Context manager in which models and guides may run, and even be trained, without a
    trace. On exit, also after an exception, these are as they were on entry:

    * Pyro's param store: which parameters exist, their values and constraints;
    * the random number generators of torch (CPU, and CUDA if it is in use), numpy and
      :mod:`random`;
    * each :class:`torch.nn.Module` that can be reached from ``callables``: parameters,
      buffers, training mode, attributes, and submodules that a lazy initialisation has
      added (an autoguide that had not run is uninitialised again);
    * the ``.grad`` of all these parameters, which is ``None`` at the start of the block.

    Modules are restored in place: tensors stay the same objects, so that optimizers which
    hold them go on working. They are not deep-copied, since copies would part modules
    that model and guide share.

    A module is reached if it is one of ``callables``, owns it as a method, is wrapped in
    it by :func:`functools.partial` or a Pyro handler, or is a global or enclosing variable
    that a function names. State kept elsewhere, such as a list in a global variable, is
    not preserved.

    :param callables: Models, guides.

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
    rng = get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    store_state = _store_state()
    owners = _owners(callables)
    attributes = [(owner, _shallow_copy(vars(owner))) for owner in owners]
    tensors = _tensors(owners, list(store_state["params"].values()))
    saved = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        for owner, contents in attributes:
            _restore(vars(owner), contents)
        with torch.no_grad():
            for tensor, value, grad in saved:
                # Writing only what has changed keeps graphs that hold it usable.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.grad = grad
        store.clear()
        store.set_state(store_state)
        _store_state()
        set_rng_state(rng)
        for device, state in enumerate(cuda_rng):
            torch.cuda.set_rng_state(state, device)


def _store_state() -> Any:
    store = pyro.get_param_store()
    state = store.get_state()
    # get_state() takes the `unconstrained` attribute from the parameters, reading them
    # puts it back.
    for _ in store.values():
        pass
    return state


def _owners(callables: Tuple[Callable, ...]) -> List[Any]:
    """All objects whose attributes are to be preserved: modules and what they hold."""
    owners: Dict[int, Any] = {}
    seen: Dict[int, Any] = {}  # holds the objects, so that no id is used twice
    queue: List[Any] = list(callables)
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            owners[id(item)] = item
            for value in vars(item).values():
                queue.extend(_children(value))
                if _is_plain_object(value):
                    owners[id(value)] = value
        elif isinstance(item, MethodType):
            queue += [item.__func__, item.__self__]
            if _is_plain_object(item.__self__):
                owners[id(item.__self__)] = item.__self__
                queue.extend(v for v in vars(item.__self__).values() if _leads_on(v))
        elif isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, FunctionType):
            queue.extend(value for value in _variables(item) if _leads_on(value))
    return list(owners.values())


def _children(value: Any) -> List[Any]:
    if isinstance(value, MutableMapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [child for child in value if _leads_on(child)]
    return [value] if _leads_on(value) else []


def _leads_on(value: Any) -> bool:
    return isinstance(value, (nn.Module, MethodType, FunctionType, functools.partial))


def _variables(function: FunctionType) -> List[Any]:
    found: List[Any] = []
    namespace = function.__globals__
    # The globals of a library lead to no module of the user's; its closures (handlers) may.
    if namespace.get("__name__", "").split(".")[0] not in ("torch", "pyro", "numpy"):
        found += [namespace[name] for name in function.__code__.co_names if name in namespace]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            pass
    return found


def _is_plain_object(value: Any) -> bool:
    other = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType, functools.partial)
    return hasattr(value, "__dict__") and not isinstance(value, other)


def _tensors(owners: List[Any], more: List[Tensor]) -> List[Tensor]:
    found = {id(tensor): tensor for tensor in more}
    for owner in owners:
        if isinstance(owner, nn.Module):
            values = list(vars(owner).values())
            values += list(owner._parameters.values()) + list(owner._buffers.values())
            for value in values:
                if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
                    found[id(value)] = value
    # Only leaves have a .grad of their own and can be written to.
    return [tensor for tensor in found.values() if tensor.is_leaf]


_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


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
