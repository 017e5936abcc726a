# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What must not happen while a graph is captured: that Python looks at a number that differs
from step to step.
"""

import linecache
import os
import sys
from typing import Any, Dict, List, Set, Tuple

import pyro
import torch
from torch.overrides import TorchFunctionMode

import pyro_rb
from pyro_rb.compiled.torch_private import (
    ASSERTS,
    DRAWS,
    INPUTS,
    NOTHING,
    PACK,
    TorchDispatchMode,
    is_tracked,
    is_unwritten,
    memory,
    origin,
    outside_copy,
    outside_of_graph,
    written,
)
from pyro_rb.infer.generators import get_torch_generators

_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep
    for module in (torch, pyro, pyro_rb)
)
_PYRO_RB = _LIBRARIES[2]
_DISTRIBUTION = os.path.abspath(torch.distributions.distribution.__file__)
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_CAPTURE = _OWN + "capture.py"
_LOOKS = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__"),
        *("__index__", "__complex__", "__contains__", "__repr__", "__dlpack__", "__deepcopy__"),
    )
}
#: Of Pyro, which look whether something is not finite.
_WARNERS = ("warn_if_nan", "warn_if_inf", "torch_isinf")
#: Functions that copy numbers without an operation.
_COPY = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
#: Methods that only need the shape or type of their arguments.
_LIKE = {getattr(torch.Tensor, name) for name in ("expand_as", "view_as", "reshape_as", "type_as", "to")}


class NotCapturable(Exception):
    """
    Says why a loss cannot be captured.

    :param bool is_rare: whether it may be that it can with other random numbers.
    """

    def __init__(self, reason: str, is_rare: bool = False) -> None:
        super().__init__(reason)
        self.is_rare = is_rare


def find_user_line() -> str:
    """
    Where in code that is none of the libraries' the program is, below :func:`capture`; else
    where it is in theirs.
    """
    frame: Any = sys._getframe(1)
    where = ""
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        filename = frame.f_code.co_filename
        is_user = not filename.startswith((*_LIBRARIES, "<"))
        if is_user or not (where or filename.startswith((_OWN, _LIBRARIES[0], "<"))):
            line = linecache.getline(filename, frame.f_lineno).strip()
            where = f" at {filename}:{frame.f_lineno}: {line}"
        if is_user:
            break
        frame = frame.f_back
    return where


def _refuse(what: str, caller: str = "") -> Any:
    raise NotCapturable(
        f"{what}{find_user_line()}. What depends on it cannot change in a captured graph. "
        "Expected tensor operations only, such as torch.where",
        is_rare=caller.startswith(_PYRO_RB),
    )


class Assumptions:
    """What a graph takes for granted."""

    def __init__(self) -> None:
        #: Scalars that are true.
        self.conditions: List[torch.Tensor] = []
        #: Where code that is no library's looks at a value.
        self.places: List[str] = []
        #: Tensors that were in an operation since it was emptied, by their id.
        self.used: Set[int] = set()

    def decide(self, tensor: torch.Tensor, what: str = "") -> bool:
        """
        The value of a condition.

        :param str what: is said of it, if code that is no library's looks at it.
        """
        if what:
            self.places.append(f"{what}{find_user_line()}")
        with outside_of_graph():
            value = bool(tensor)
        self.conditions.append((tensor if value else ~tensor.bool()).bool().reshape(()))
        return value

    def find(self, tensor: torch.Tensor, what: str, caller: str) -> torch.Tensor:
        """The value of a tensor, on which operations are not part of the graph; refuses one that is not known."""
        known = origin(tensor)
        if known > INPUTS:
            _refuse(what, caller)
        if known == NOTHING:  # such as the index of a sequential plate
            return tensor
        self.places.append(f"{what}{find_user_line()}")
        with outside_of_graph():
            value = tensor.detach().clone()
        same = tensor.detach() == value
        if value.is_floating_point():
            same = same | (tensor.detach().isnan() & value.isnan())
        if not is_tracked(same):  # in torch.FloatTensor(), where operations are not recorded
            _refuse(what, caller)
        self.conditions.append(same.all())
        return value


class Watch(TorchFunctionMode):
    """
    Keeps losses from reading their own values, as they do for the loss that they return. Of
    other looks at numbers, those that only depend on what goes into the graph are noted as what it
    takes for granted, and those at draws, and at the values of parameters, are refused.
    """

    def __init__(self, assumptions: Assumptions) -> None:
        super().__init__()
        self._assumptions = assumptions

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        if func in _LOOKS and args and isinstance(args[0], torch.Tensor):
            code = sys._getframe(1).f_code
            if is_tracked(args[0]):
                return self._look(func, args, kwargs or {}, code)
            if not code.co_filename.startswith(_LIBRARIES):
                return self._look_at_others(func, args, kwargs or {}, code)
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Tuple, kwargs: Dict[str, Any]) -> Any:
        """
        Calls a function, and finds arguments whose numbers it took for itself, as lengths or sections: those that were
        in none of its operations.
        """
        tensors = [x for x in _flat([args, kwargs]) if isinstance(x, torch.Tensor)]
        if not tensors:
            return func(*args, **kwargs)
        outer, self._assumptions.used = self._assumptions.used, set()
        found = func(*args, **kwargs)
        used, self._assumptions.used = self._assumptions.used, outer
        outer |= used
        is_new = any(isinstance(y, torch.Tensor) and all(y is not x for x in tensors) for y in _flat(found))
        name = getattr(func, "__name__", "")
        if not is_new or name == "__get__" or func in _LIKE:
            return found
        for x in tensors[name.startswith("new_") :]:
            is_number = func in _COPY or not (x.is_floating_point() or x.is_complex())
            is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)  # others wrap what is in the operations
            if is_number and is_plain and id(x) not in used:
                self._assumptions.find(x, f"It looks at the value of a tensor, by {name}(),", _find_caller())
                if isinstance(found, tuple):  # of numbers which it wrote without an operation, too
                    found = tuple(outside_copy(y) if is_unwritten(y) else y for y in found)
        return found

    def _look(self, func: Any, args: Tuple, kwargs: Dict[str, Any], code: Any) -> Any:
        tensor = args[0]
        if origin(tensor) == NOTHING:  # such as the index of a sequential plate
            with outside_of_graph():
                return func(*args, **kwargs)
        if code.co_filename.startswith(_LIBRARIES):
            if code.co_name in _WARNERS:
                return False  # the value of the graph is looked at
            if func is torch.Tensor.__bool__ and code.co_filename == _DISTRIBUTION:
                return True  # a draw is valid, which eager steps look at
            if func is torch.Tensor.item and code.co_name == "torch_item" or _is_loss(code):
                # In the precision of the number that it stands for.
                if func is torch.Tensor.item:
                    return tensor.detach().double()
                if func is torch.Tensor.tolist and tensor.dim() == 1:
                    return list(tensor.detach().double().unbind())
            if func is torch.Tensor.__bool__ and (
                code.co_filename.startswith(_PYRO_RB) or code.co_name == "compute_expectation"
            ):
                return self._assumptions.decide(tensor)
        return self._look_at_others(func, args, kwargs, code)

    def _look_at_others(self, func: Any, args: Tuple, kwargs: Dict[str, Any], code: Any) -> Any:
        what = f"It looks at the value of a tensor, by {func.__name__}(),"
        if func is torch.Tensor.__bool__ and origin(args[0]) < DRAWS:
            return self._assumptions.decide(args[0], what)
        value = self._assumptions.find(args[0], what, code.co_filename)
        with outside_of_graph():
            return func(value, *args[1:], **kwargs)


def _find_caller() -> str:
    """The file of the code, other than PyTorch's, that called an operation."""
    return getattr(_find_code(), "co_filename", "")


def _find_code() -> Any:
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename: str = frame.f_code.co_filename
        if not filename.startswith((_LIBRARIES[0], _OWN, _PYRO_RB + "ops" + os.sep, "<")):
            return frame.f_code
        frame = frame.f_back
    return None


def _is_loss(code: Any) -> bool:
    return code.co_filename.endswith(("_elbo.py", "importance_bound.py"))


class Operations(TorchDispatchMode):
    """
    Notes which tensors of others are used and changed, and refuses operations whose shapes
    depend on values.
    """

    def __init__(self, assumptions: Assumptions) -> None:
        super().__init__()
        self._assumptions = assumptions
        self._generators = get_torch_generators()
        #: The memory of arguments.
        self.given: Set[int] = set()
        #: Tensors that are changed in place, and copies of what they were.
        self.changed: Dict[int, Tuple[torch.Tensor, torch.Tensor]] = {}
        #: Tensors of others, by their memory.
        self._others: Dict[int, torch.Tensor] = {}
        #: Tensors that autograd may add a gradient to, and the gradient that they had.
        self.leaves: Dict[int, Tuple[torch.Tensor, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            _refuse("It draws random numbers from a generator of its own")
        tensors = [x for x in _flat([args, kwargs]) if isinstance(x, torch.Tensor)]
        self._assumptions.used.update(map(id, tensors))
        for x in tensors:
            if not is_tracked(x):
                self._others.setdefault(memory(x), x)
                if x.requires_grad and x.is_leaf and id(x) not in self.leaves:
                    self.leaves[id(x)] = x, x.grad
                    x.grad = None
        self._save(written(func, args))
        if func is PACK:
            return self._pack(func, *args)
        if torch.Tag.dynamic_output_shape in func.tags and any(map(is_tracked, tensors)):
            if func is not torch.ops.aten.index.Tensor:
                return self._known(func, args, kwargs, "A shape depends on values")
            args = (args[0], self._without_masks(args[1]))
        if torch.Tag.data_dependent_output in func.tags and any(map(is_tracked, tensors)):
            return self._look(func, args, kwargs, tensors)
        if func in ASSERTS:  # the eager loss says it, where it is not so
            self._assumptions.conditions.append(args[0].detach().bool().reshape(()))
            return None
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.check_generators()
        found = func(*args, **kwargs)
        with outside_of_graph():
            self._generators = get_torch_generators()
        return found

    def check_generators(self) -> None:
        """Refuses generators whose state was set since the last draw."""
        with outside_of_graph():
            now = get_torch_generators()
            pairs = zip([self._generators[0], *(self._generators[1] or ())], [now[0], *(now[1] or ())])
            is_same = all(torch.equal(a, b) for a, b in pairs)
        if not is_same:
            raise NotCapturable(
                f"The state of a random number generator is set{find_user_line()}, as by torch.manual_seed, fork_rng or "
                "torch.utils.checkpoint, which a graph does not. Expected draws one after the other"
            )

    def _look(self, func: Any, args: Tuple, kwargs: Dict[str, Any], tensors: List[Any]) -> Any:
        is_condition = len(tensors) == 1 and tensors[0].dtype == torch.bool
        if is_condition and getattr(_find_code(), "co_name", "") in _WARNERS:
            return False  # as in the hook by which Pyro looks at a gradient
        if is_condition and _find_caller().startswith(_PYRO_RB):
            return self._assumptions.decide(tensors[0])
        what = "It looks at the value of a tensor"
        if func is torch.ops.aten.equal.default and max(map(origin, tensors)) < DRAWS:
            same = tensors[0].shape == tensors[1].shape
            return same and self._assumptions.decide((tensors[0] == tensors[1]).all(), what)
        return self._known(func, args, kwargs, what)

    def _known(self, func: Any, args: Tuple, kwargs: Dict[str, Any], what: str) -> Any:
        """What a function makes of tensors whose values are known, outside of the graph."""
        caller = _find_caller()
        args = tuple(
            self._assumptions.find(x, what, caller) if isinstance(x, torch.Tensor) else x for x in args
        )
        with outside_of_graph():
            return func(*args, **kwargs)

    def _pack(self, func: Any, x: torch.Tensor, lengths: torch.Tensor, *options: Any) -> Tuple:
        """Sequences of known lengths. Their number at each time is what others look at."""
        lengths = self._assumptions.find(lengths, "It looks at the lengths of sequences", _find_caller())
        with outside_of_graph():
            sizes = func(x.detach(), lengths, *options)[1]
        return func(x, lengths, *options)[0], sizes

    def _without_masks(self, indices: Any) -> List[Any]:
        """Indices, with numbers in the place of masks."""
        found: List[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            else:
                mask = self._assumptions.find(index, "A shape depends on values", _find_caller())
                with outside_of_graph():
                    found.extend(mask.nonzero(as_tuple=True))
        return found

    def _save(self, values: List[Any]) -> None:
        """Copies tensors of others that are about to be changed."""
        for x in _flat(values):
            if not isinstance(x, torch.Tensor):
                continue
            if memory(x) in self.given:
                raise NotCapturable(
                    f"It changes an argument in place{find_user_line()}. Expected a copy of the argument, or a tensor "
                    "that is no argument, such as a buffer"
                )
            other = self._others.get(memory(x))
            if other is not None and id(other) not in self.changed:
                with outside_of_graph():
                    self.changed[id(other)] = other, other.detach().clone()


def _flat(value: Any) -> List[Any]:
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _flat(item)]
    if isinstance(value, dict):
        return [x for item in value.values() for x in _flat(item)]
    return [value]
