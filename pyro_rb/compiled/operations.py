# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What operations must not do while a graph is captured, and which tensors of others they use."""

from typing import Any, Dict, List, Set, Tuple

import torch

from pyro_rb.compiled.torch_private import (
    ASSERTS,
    DRAWS,
    PACK,
    TorchDispatchMode,
    is_tracked,
    memory,
    origin,
    outside_of_graph,
    written,
)
from pyro_rb.compiled.watch import (
    PYRO_RB,
    WARNERS,
    Assumptions,
    NotCapturable,
    find_caller,
    find_code,
    find_user_line,
    flat,
    refuse,
)
from pyro_rb.infer.generators import get_torch_generators


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
            refuse("It draws random numbers from a generator of its own")
        tensors = [x for x in flat([args, kwargs]) if isinstance(x, torch.Tensor)]
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
                f"The state of a random number generator is set{find_user_line()}, which a graph does not, as by "
                "torch.manual_seed, fork_rng, torch.utils.checkpoint, or an RVRSGuide where shapes of arguments "
                "alternate. Expected draws one after the other"
            )

    def _look(self, func: Any, args: Tuple, kwargs: Dict[str, Any], tensors: List[Any]) -> Any:
        is_condition = len(tensors) == 1 and tensors[0].dtype == torch.bool
        if is_condition and getattr(find_code(), "co_name", "") in WARNERS:
            return False  # as in the hook by which Pyro looks at a gradient
        if is_condition and find_caller().startswith(PYRO_RB):
            return self._assumptions.decide(tensors[0])
        what = "It looks at the value of a tensor"
        if func is torch.ops.aten.equal.default and max(map(origin, tensors)) < DRAWS:
            same = tensors[0].shape == tensors[1].shape
            return same and self._assumptions.decide((tensors[0] == tensors[1]).all(), what)
        return self._known(func, args, kwargs, what)

    def _known(self, func: Any, args: Tuple, kwargs: Dict[str, Any], what: str) -> Any:
        """What a function makes of tensors whose values are known, outside of the graph."""
        caller = find_caller()
        args = tuple(
            self._assumptions.find(x, what, caller) if isinstance(x, torch.Tensor) else x for x in args
        )
        with outside_of_graph():
            return func(*args, **kwargs)

    def _pack(self, func: Any, x: torch.Tensor, lengths: torch.Tensor, *options: Any) -> Tuple:
        """Sequences of known lengths. Their number at each time is what others look at."""
        lengths = self._assumptions.find(lengths, "It looks at the lengths of sequences", find_caller())
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
                mask = self._assumptions.find(index, "A shape depends on values", find_caller())
                with outside_of_graph():
                    found.extend(mask.nonzero(as_tuple=True))
        return found

    def _save(self, values: List[Any]) -> None:
        """Copies tensors of others that are about to be changed."""
        for x in flat(values):
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
