# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The arguments of a step: what a graph is made for, and the tensors that go into it.
"""

import copy
from typing import Any, Iterator, List, Tuple

import torch

from pyro_rb.compiled.watch import NotCapturable

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def describe(args: Any) -> Tuple[Tuple, List[torch.Tensor]]:
    """
    :param args: tensors and plain values, in tuples, lists and dicts.
    :return: what is the same for all calls that one graph serves: structure, plain values,
        and shape, strides, type and device of tensors; and the tensors.
    :raises NotCapturable: if there is anything else in the arguments.
    """
    key: List[Any] = []
    tensors: List[torch.Tensor] = []
    _describe(args, key, tensors)
    return tuple(key), tensors


def _describe(value: Any, key: List[Any], tensors: List[torch.Tensor]) -> None:
    cls = type(value)
    key.append(cls)
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        if value.requires_grad:
            raise NotCapturable("An argument requires grad. Expected a parameter, or detach() it")
        if value.layout is not torch.strided:
            raise NotCapturable(f"An argument has the layout {value.layout}. Expected strided")
        key.extend((value.shape, value.stride(), value.dtype, value.device))
        tensors.append(value)
    elif cls in _VALUES:
        key.append(value if value == value else repr(value))  # NaN is not equal to itself
    elif isinstance(value, (tuple, list)):
        key.append(len(value))
        for item in value:
            _describe(item, key, tensors)
    elif isinstance(value, dict):
        key.append(len(value))
        for name, item in value.items():
            key.append(name)
            _describe(item, key, tensors)
    else:
        raise NotCapturable(
            f"An argument is a {cls.__module__}.{cls.__qualname__}. Expected tensors, numbers "
            "and strings, in tuples, lists and dicts"
        )


def what_changes(old: Tuple, new: Tuple) -> str:
    """
    :param old: what :func:`describe` returned, at its beginning.
    :param new: another one.
    :return: what is not the same, and what to pass instead.

    >>> what_changes(describe([0.1])[0], describe([0.2])[0])
    'a number among the arguments keeps changing, to 0.2 at last. Expected a tensor, torch.tensor(0.2)'
    """
    i = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
    cls, value = new[i - 1 : i + 1]
    if isinstance(value, torch.Size):
        return f"the shape of an argument keeps changing, to {tuple(value)} at last. Pad it to one of a few shapes"
    if cls in (int, float, complex):
        remedy = f"Expected a tensor, torch.tensor({value})"
        return f"a number among the arguments keeps changing, to {value} at last. {remedy}"
    return f"an argument that is no tensor keeps changing, to {value!r} at last. Expected tensors, or few values"


def parts(value: Any) -> Iterator[Any]:
    """All that is in arguments: tuples, lists and dicts, and what they hold."""
    yield value
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from parts(item)


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same arguments, with other tensors in the place of those in it."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        same = copy.copy(value)  # with the default of a defaultdict
        same.update((k, with_tensors(v, tensors)) for k, v in value.items())
        return same
    if isinstance(value, (tuple, list)):
        items = [with_tensors(v, tensors) for v in value]
        cls: Any = type(value)
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    return value
