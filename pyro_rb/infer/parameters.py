# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import weakref
from collections.abc import Mapping
from typing import Any, Dict, Iterator, Optional, Set

import pyro
import torch
from pyro import poutine

from pyro_rb.ops.graph import Node, leaves, node_of


class CallParameters:
    """
    What is a parameter, and what is it called, in one call of a loss? Holds on to nothing.

    Leaf tensors that come with the arguments of the call are inputs, unless they are a
    :class:`torch.nn.Parameter` or in the param store. All others are parameters.

    :param model: a model.
    :param guide: its guide.
    :param args: what they are called with.
    """

    def __init__(self, model: Any, guide: Any, *args: Any) -> None:
        modules = {"guide": _module_of(guide), "model": _module_of(model)}
        self._modules = {
            prefix: weakref.ref(module) for prefix, module in modules.items() if module is not None
        }
        self._names: Dict[int, str] = {}
        self._inputs = [weakref.ref(x) for x in _input_leaves(args)]

    def name(self, parameter: torch.Tensor) -> Optional[str]:
        """That of the param store, else of guide or model, if it is a module."""
        name: Optional[str] = pyro.get_param_store().param_name(parameter)
        if name is not None:
            return name
        if not self._names:
            for prefix, module in self._modules.items():
                for name, p in getattr(module(), "named_parameters", dict().items)():
                    self._names.setdefault(id(p), f"{prefix}.{name}")
        return self._names.get(id(parameter))

    def input_nodes(self) -> Set[Node]:
        """The graph nodes of inputs that require grad."""
        return {node_of(x) for x in [ref() for ref in self._inputs] if x is not None}


def _module_of(fn: Any) -> Optional[torch.nn.Module]:
    """The module that a callable is, or is a method of."""
    if not isinstance(fn, torch.nn.Module):
        fn = poutine.unwrap(fn)
        fn = getattr(fn, "func", fn)  # of functools.partial
        fn = getattr(fn, "__self__", fn)
    return fn if isinstance(fn, torch.nn.Module) else None


def _input_leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            store = pyro.get_param_store()
            for leaf in [value] if value.is_leaf else leaves(value):
                if not isinstance(leaf, torch.nn.Parameter) and store.param_name(leaf) is None:
                    yield leaf
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _input_leaves(item)
