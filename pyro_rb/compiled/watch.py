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
    DRAWS,
    INPUTS,
    NOTHING,
    is_tracked,
    is_unwritten,
    origin,
    outside_copy,
    outside_of_graph,
)

_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep
    for module in (torch, pyro, pyro_rb)
)
PYRO_RB = _LIBRARIES[2]
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
WARNERS = ("warn_if_nan", "warn_if_inf", "torch_isinf")
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


def refuse(what: str, caller: str = "") -> Any:
    """Raises an error that says what happened, and at which line."""
    raise NotCapturable(
        f"{what}{find_user_line()}. What depends on it cannot change in a captured graph. "
        "Expected tensor operations only, such as torch.where",
        is_rare=caller.startswith(PYRO_RB),
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
            refuse(what, caller)
        if known == NOTHING:  # such as the index of a sequential plate
            return tensor
        self.places.append(f"{what}{find_user_line()}")
        with outside_of_graph():
            value = tensor.detach().clone()
        same = tensor.detach() == value
        if value.is_floating_point():
            same = same | (tensor.detach().isnan() & value.isnan())
        if not is_tracked(same):  # in torch.FloatTensor(), where operations are not recorded
            refuse(what, caller)
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
        tensors = [x for x in flat([args, kwargs]) if isinstance(x, torch.Tensor)]
        if not tensors:
            return func(*args, **kwargs)
        outer, self._assumptions.used = self._assumptions.used, set()
        found = func(*args, **kwargs)
        used, self._assumptions.used = self._assumptions.used, outer
        outer |= used
        is_new = any(isinstance(y, torch.Tensor) and all(y is not x for x in tensors) for y in flat(found))
        name = getattr(func, "__name__", "")
        if not is_new or name == "__get__" or func in _LIKE:
            return found
        for x in tensors[name.startswith("new_") :]:
            is_number = func in _COPY or not (x.is_floating_point() or x.is_complex())
            is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)  # others wrap what is in the operations
            if is_number and is_plain and id(x) not in used:
                self._assumptions.find(x, f"It looks at the value of a tensor, by {name}(),", find_caller())
                if type(found) is tuple:  # with numbers that it wrote without an operation, too
                    found = tuple(outside_copy(y) if is_unwritten(y) else y for y in found)
        return found

    def _look(self, func: Any, args: Tuple, kwargs: Dict[str, Any], code: Any) -> Any:
        tensor = args[0]
        if origin(tensor) == NOTHING:  # such as the index of a sequential plate
            with outside_of_graph():
                return func(*args, **kwargs)
        if code.co_filename.startswith(_LIBRARIES):
            if code.co_name in WARNERS:
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
                code.co_filename.startswith(PYRO_RB) or code.co_name == "compute_expectation"
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


def find_code() -> Any:
    """The code, other than PyTorch's, that called an operation."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename: str = frame.f_code.co_filename
        if not filename.startswith((_LIBRARIES[0], _OWN, PYRO_RB + "ops" + os.sep, "<")):
            return frame.f_code
        frame = frame.f_back
    return None


def find_caller() -> str:
    """The file of that code."""
    return getattr(find_code(), "co_filename", "")


def _is_loss(code: Any) -> bool:
    return code.co_filename.endswith(("_elbo.py", "importance_bound.py"))


def flat(value: Any) -> List[Any]:
    """All that is in lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    return [value]
