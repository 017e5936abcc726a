# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What a model or guide can reach that is none of its arguments: names of closures and modules,
defaults, and attributes. A graph has their values as they were when it was captured.
"""

import functools
import operator
import types
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LIBRARIES = {"torch", "pyro", "pyro_rb", "numpy", "builtins", "functools", "collections"}
_MAX_ITEMS = 256
_MODULE_INTERNALS = set(vars(torch.nn.Module())) - {
    "training",
    "_forward_hooks",
    "_forward_pre_hooks",
}


class Slot(NamedTuple):
    """A place that holds a value, and the value that it held."""

    name: str
    read: Callable[[], Any]
    value: Any

    def has_changed(self) -> bool:
        try:
            value = self.read()
        except (LookupError, ValueError):  # of a cell that is empty
            value = None
        if value is self.value:
            return False
        is_scalar = type(value) is type(self.value) and isinstance(value, _SCALARS)
        return not (is_scalar and value == self.value)


class Reachable:
    """
    The slots that some callables can reach, and the modules among them.

    :param roots: callables, by what messages call them.
    :param options: the loss, whose public attributes count.
    """

    def __init__(self, roots: Dict[str, Any], options: Any) -> None:
        self.slots: List[Slot] = []
        self.modules: List[torch.nn.Module] = []
        self._seen: Dict[int, Any] = {}
        for name, root in roots.items():
            self._visit(root, name)
        for key, value in vars(options).items():
            if not key.startswith("_") and isinstance(value, _SCALARS):
                self._add_item(f"{key} of the loss", vars(options), key)

    def changed(self) -> Optional[str]:
        """What has changed since, if something has."""
        for slot in self.slots:
            try:
                if slot.read() is slot.value:
                    continue
            except (LookupError, ValueError):
                pass
            if slot.has_changed():
                return slot.name
        return None

    def buffers(self) -> List[torch.Tensor]:
        """Of all modules, such as the running means of batch normalization."""
        found = {id(b): b for m in self.modules for b in m.buffers(recurse=False)}
        return list(found.values())

    def _add(self, name: str, read: Callable[[], Any]) -> None:
        try:
            value = read()
        except (LookupError, ValueError):
            value = None
        if not isinstance(value, types.ModuleType):
            self.slots.append(Slot(name, read, value))
            self._visit(value, name)

    def _add_item(self, name: str, holder: Any, key: Any) -> None:
        self._add(name, functools.partial(operator.getitem, holder, key))

    def _visit(self, value: Any, name: str) -> None:
        if isinstance(value, (*_SCALARS, torch.Tensor, type)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, functools.partial):
            self._visit(value.func, name)
            self._visit([value.args, value.keywords], name)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, name)
            self._visit(value.__func__, name)
        elif isinstance(value, types.FunctionType):
            self._visit_function(value, name)
        elif isinstance(value, torch.nn.Module):
            self._visit_module(value, name)
        elif isinstance(value, (list, tuple, dict)):
            self._add(f"the length of {name}", functools.partial(len, value))
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys[:_MAX_ITEMS]:
                self._add_item(f"{name}[{key!r}]", value, key)
        elif not _is_library(type(value)) and hasattr(value, "__dict__"):
            self._visit_attributes(value, name)

    def _visit_function(self, fn: Any, name: str) -> None:
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
            self._add(f"{name}'s variable {key}", functools.partial(_contents, cell))
        self._visit([fn.__defaults__ or (), fn.__kwdefaults__ or {}], f"the defaults of {name}")
        if _is_library(fn):
            return
        for key in dict.fromkeys(_names(fn.__code__)):
            if key in fn.__globals__:
                self._add_item(f"{name}'s variable {key}", fn.__globals__, key)

    def _visit_module(self, module: torch.nn.Module, name: str) -> None:
        self.modules.append(module)
        values: Any = vars(module)
        for group in ("_parameters", "_buffers", "_modules"):
            for key in list(values[group]):
                self._add_item(f"{name}.{key}", values[group], key)
        self._visit_attributes(module, name)

    def _visit_attributes(self, value: Any, name: str) -> None:
        attributes = vars(value)
        is_library = _is_library(type(value))
        for key, item in list(attributes.items()):
            if isinstance(value, torch.nn.Module) and key in _MODULE_INTERNALS:
                continue
            # Libraries know what they do with the rest, as with the plates of an autoguide.
            is_kept = isinstance(item, (*_SCALARS, torch.Tensor)) or not is_library
            if isinstance(item, types.FunctionType):  # such as the guide that another is made of
                self._visit(item, f"{name}'s function {item.__name__}")
            elif is_kept and not key.startswith("_" if is_library else "_pyro"):
                self._add_item(f"{name}.{key}", attributes, key)
        if not is_library:
            for key in ("forward", "__call__"):
                method = getattr(type(value), key, None)
                if isinstance(method, types.FunctionType):
                    self._visit(method, f"{name}.{key}")


def _contents(cell: Any) -> Any:
    return cell.cell_contents


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _is_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _LIBRARIES
