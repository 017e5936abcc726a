# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What a model or guide can reach that is none of its arguments: names of closures and modules,
defaults, and attributes. A graph has their values as they were when it was captured.

Attributes of objects, classes and modules of the user count where the code that was found names them.
"""

import functools
import operator
import sys
import types
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

import torch
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch.distributions import Distribution

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, frozenset)
_KINDS = (*_SCALARS, torch.Tensor, Distribution)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_LIBRARIES = {"torch", "pyro", "pyro_rb", "numpy"}
_MAX_ITEMS = 256
_MODULE_INTERNALS = set(vars(torch.nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What reads attributes whose names the code does not have.
_INDIRECT = {"__dict__", "asdict", "astuple", "attrgetter", "eval", "exec", "getattr", "vars"}
#: Where descriptors, such as properties and PyroSample, have code.
_PARTS = ("__func__", "fget", "func", "wrapped", "prior", "init_value")
#: Methods that the library does not call in a step.
_SET_UP = {"__init__", "__new__", "__post_init__", "__repr__", "__setattr__"}


class Slot(NamedTuple):
    """A place that holds a value, and the value that it held."""

    name: str
    read: Callable[[], Any]
    value: Any

    def has_changed(self) -> bool:
        value = _read(self.read)
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
        #: Of all code that was visited.
        self._names: Set[str] = set()
        #: What it may ask for by ``getattr``.
        self._asked: Set[str] = set()
        #: Objects, classes and modules of the user, and what messages call them.
        self._holders: List[Tuple[Any, str]] = []
        for name, root in {**roots, "the loss": options}.items():
            self._visit(root, name)
        for key, value in vars(options).items():
            if not key.startswith("_") and isinstance(value, _SCALARS):
                self._add_item(f"{key} of the loss", vars(options), key)
        self._visit_holders()

    def changed(self) -> Optional[str]:
        """What has changed since, if something has."""
        for slot in self.slots:
            try:
                if slot.read() is slot.value:
                    continue
            except _MISSING:
                pass
            if slot.has_changed():
                return slot.name
        return None

    def buffers(self) -> List[torch.Tensor]:
        """Of all modules, such as the running means of batch normalization."""
        found = {id(b): b for m in self.modules for b in m.buffers(recurse=False)}
        return list(found.values())

    def _add(self, name: str, read: Callable[[], Any]) -> None:
        value = _read(read)
        if not isinstance(value, types.ModuleType):
            self.slots.append(Slot(name, read, value))
        self._visit(value, name)

    def _add_item(self, name: str, holder: Any, key: Any) -> None:
        self._add(name, functools.partial(operator.getitem, holder, key))

    def _visit(self, value: Any, name: str) -> None:
        if isinstance(value, (*_SCALARS, torch.Tensor)) or id(value) in self._seen:
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
        elif isinstance(value, (list, tuple, dict)):
            self._add(f"the length of {name}", functools.partial(len, value))
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys[:_MAX_ITEMS]:
                self._add_item(f"{name}[{key!r}]", value, key)
        elif isinstance(value, set):
            self._add(name, functools.partial(frozenset, value))
        elif isinstance(value, (type, types.ModuleType)):
            if not _is_library(value):
                self._holders.append((value, name))
        else:
            self._visit_object(value, name)

    def _visit_function(self, fn: Any, name: str) -> None:
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
            self._add(f"{name}'s variable {key}", functools.partial(_contents, cell))
        self._visit([fn.__defaults__ or (), fn.__kwdefaults__ or {}], f"the defaults of {name}")
        if _is_library(fn):
            return
        codes = list(_codes(fn.__code__))
        names = dict.fromkeys(key for code in codes for key in code.co_names)
        self._names.update(names)
        if "getattr" in names:
            constants = (x for code in codes for x in code.co_consts)
            self._asked.update(x for x in constants if isinstance(x, str) and x.isidentifier())
        for key in names:
            if key in fn.__globals__:
                self._add_item(f"{name}'s variable {key}", fn.__globals__, key)

    def _visit_object(self, value: Any, name: str) -> None:
        is_library = _is_library(type(value))
        attributes = getattr(value, "__dict__", {})
        keys: Iterable[str] = ()
        if isinstance(value, torch.nn.Module):
            self.modules.append(value)
            if not isinstance(value, torch.jit.ScriptModule):
                for group in ("_parameters", "_buffers", "_modules"):
                    for key in list(attributes[group]):
                        self._add_item(f"{name}.{key}", attributes[group], key)
                for key in _HOOKS:
                    self._visit(attributes[key], f"{name}.{key}")
                self._visit(attributes.get("_pyro_samples"), f"{name}._pyro_samples")
                keys = set(attributes) - _MODULE_INTERNALS if is_library else ()
        elif isinstance(value, Distribution):
            keys = {*value.arg_constraints, "base_dist"} & attributes.keys()
        elif isinstance(value, Messenger) and not isinstance(value, IndepMessenger) and is_library:
            keys = list(attributes)
        for key in keys:
            item = attributes[key]
            if isinstance(item, _FUNCTIONS) or (callable(item) and not _is_library(type(item))):
                self._visit(item, f"{name}'s function {getattr(item, '__name__', key)}")
            # Libraries know what they do with the rest, as with the plates of an autoguide.
            elif not key.startswith("_") and isinstance(item, _KINDS):
                self._add_item(f"{name}.{key}", attributes, key)
            elif isinstance(value, Messenger) and isinstance(item, dict):  # the data of a condition
                self._add_item(f"{name}.{key}", attributes, key)
        if not is_library:
            self._holders.append((value, name))

    def _visit_holders(self) -> None:
        """Until the names in what was found lead to nothing else."""
        done: Set[Tuple[int, str]] = set()
        while True:
            found = [(holder, name, key) for holder, name in self._holders for key in self._keys(holder)]
            found = [entry for entry in found if (id(entry[0]), entry[2]) not in done]
            if not found:
                return
            for holder, name, key in found:
                done.add((id(holder), key))
                self._visit_attribute(holder, f"{name}.{key}", key)

    def _keys(self, holder: Any) -> List[str]:
        """Names of attributes that count, of those that there are, or may come."""
        own = getattr(holder, "__dict__", {})
        if isinstance(holder, types.ModuleType):
            return [key for key in own if key in self._names or key in self._asked]
        classes = _classes(holder)
        is_module = isinstance(holder, torch.nn.Module)
        counts_all = bool(self._names & _INDIRECT) or not all(
            _is_plain(cls) for cls in classes if _is_library(cls)
        )
        slots = [key for cls in classes if not _is_library(cls) for key in _slots(cls)]
        keys = []
        for key in [*([] if isinstance(holder, type) else own), *slots]:
            is_internal = key.startswith("_pyro") or (is_module and key in _MODULE_INTERNALS)
            if not is_internal and (counts_all or key in self._names or key == "training"):
                keys.append(key)
        for cls in classes:
            if not _is_library(cls):
                keys += [key for key, value in vars(cls).items() if self._counts(key, value, classes)]
        return list(dict.fromkeys([*keys, *self._asked]))

    def _counts(self, key: str, value: Any, classes: Iterable[type]) -> bool:
        """Whether an attribute of a class is named, or called by Python or by a library."""
        if key in self._names:
            return True
        is_called = key.startswith("__") or any(_is_library(c) and key in vars(c) for c in classes)
        return is_called and isinstance(value, types.FunctionType) and key not in _SET_UP

    def _visit_attribute(self, holder: Any, name: str, key: str) -> None:
        """Reads no attribute by ``getattr``, which may run code: a property, or a draw of PyroSample."""
        own: Any = getattr(holder, "__dict__", None)
        if isinstance(holder, types.ModuleType):
            self._add(name, functools.partial(read_item, own, key))
            return
        if isinstance(own, dict):  # that of a class is none
            if key in own or not (isinstance(holder, torch.nn.Module) and _has_item(holder, key)):
                self._add(name, functools.partial(read_item, own, key))
        for cls in _classes(holder):
            value = None if _is_library(cls) else vars(cls).get(key)
            if isinstance(value, types.MemberDescriptorType):
                self._add(name, functools.partial(getattr, holder, key))
            elif value is not None:
                self._add(name, functools.partial(read_class, cls, key))
                for part in _PARTS if hasattr(type(value), "__get__") else ():
                    self._visit(getattr(value, part, None), name)


def read_item(holder: Dict[str, Any], key: str) -> Any:
    """None if there is none."""
    return holder.get(key)


def read_class(cls: type, key: str) -> Any:
    """What a class itself has, as it is."""
    return vars(cls).get(key)


def _has_item(module: torch.nn.Module, key: str) -> bool:
    """Whether a parameter, buffer or module has the name, or a site."""
    groups = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")
    return any(key in vars(module).get(group, {}) for group in groups)


#: What reading a slot raises that is empty.
_MISSING = (LookupError, ValueError, AttributeError)


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except _MISSING:
        return None


def _contents(cell: Any) -> Any:
    return cell.cell_contents


def _codes(code: Any) -> Iterator[Any]:
    """Of a function, and of those within it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _classes(holder: Any) -> Tuple[type, ...]:
    return holder.__mro__ if isinstance(holder, type) else type(holder).__mro__


def _slots(cls: type) -> List[str]:
    slots = vars(cls).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [key for key in slots if not key.startswith("__")]


def _is_plain(cls: type) -> bool:
    """Whether a library reads none but its own attributes of an object of such a class."""
    return cls in (object, torch.nn.Module, PyroModule) or cls.__module__ in ("abc", "typing", "builtins")


def _is_library(thing: Any) -> bool:
    """Of a function, a class or a module."""
    if isinstance(thing, types.ModuleType):
        path = getattr(thing, "__file__", None) or ""
        return "site-packages" in path or "dist-packages" in path or _is_library_name(thing.__name__)
    return _is_library_name(getattr(thing, "__module__", None) or "")


def _is_library_name(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
