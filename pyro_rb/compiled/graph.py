# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence

import torch

from pyro_rb.compiled.background import Compilation
from pyro_rb.compiled.capture import Captured
from pyro_rb.compiled.reach import Reachable
from pyro_rb.compiled.replay import as_function
from pyro_rb.compiled.settle import Learning
from pyro_rb.compiled.torch_private import has_hooks, plain_calls
from pyro_rb.infer.util import announce_parameters, parameter_table

#: Arguments of so many numbers are remembered by value.
_SMALL = 4096


class Step(NamedTuple):
    """What a step found."""

    loss: torch.Tensor
    #: Whether all that the graph takes for granted was true, or None if nothing was.
    held: Optional[torch.Tensor]
    #: By parameter of the graph.
    grads: Sequence[torch.Tensor]
    #: What the loss learns of.
    learned: Sequence[torch.Tensor]


class Gradient(NamedTuple):
    """A loss, and what is to be added to the ``.grad`` of parameters."""

    loss: Any
    parameters: Sequence[torch.Tensor]
    grads: Sequence[torch.Tensor]


class Graph:
    """
    A captured loss, and what must be as it was for it to be valid.

    :param captured: the loss and its gradient.
    :param reach: what model and guide can reach.
    :param learning: what the loss learns.
    """

    def __init__(self, captured: Captured, reach: Reachable, learning: Learning) -> None:
        self.captured = captured
        self.reach = reach
        self.calls = 0
        self.next_check = 0
        #: Steps at which something was not so that it takes for granted.
        self.misses = 0
        self.is_compiled = False
        self._compilation: Optional[Compilation] = None
        self.learning = learning
        self._run: Callable = as_function(captured.module)
        self._replay = self._run
        #: In the param store, by name; all that were announced by a step.
        self.named: Mapping[str, torch.Tensor] = {}
        self._kinds = [_kind(x) for x in captured.fixed]
        #: Arguments, by place, that had one value only where the graph was right.
        self._single: Optional[Dict[int, _Value]] = None

    def note_parameters(self, named: Mapping[str, torch.Tensor]) -> None:
        """Is told the parameters that the eager loss announced."""
        self.named = dict(named)

    def why_invalid(self) -> Optional[str]:
        """What has changed since it was captured, or None."""
        table = parameter_table()
        for name, parameter in self.named.items():
            if table.get(name) is not parameter:
                return f"the parameter {name}"
        for tensor, kind in zip(self.captured.fixed, self._kinds):
            if _kind(tensor) != kind:
                return "the shape, type, device, hooks or requires_grad of a tensor"
        return self.reach.changed()

    def note_values(self, args: Sequence[torch.Tensor]) -> None:
        """Is told the tensors among the arguments where it was right."""
        if self._single is None:
            self._single = {i: _Value.make(x) for i, x in enumerate(args)}
        else:
            self._single = {i: old for i, old in self._single.items() if old.is_of(args[i])}

    def has_new(self, args: Sequence[torch.Tensor]) -> bool:
        """Whether an argument has a second value for the first time, which the graph may not look at."""
        for i, old in (self._single or {}).items():
            x = args[i]
            if not (x is old.tensor and _version(x) == old.version) and not old.is_of(x):
                return True
        return False

    def count_steps(self, num_steps: int, learned: Sequence[torch.Tensor] = ()) -> None:
        """Counts steps at which nothing was compared."""
        self.calls += num_steps
        self.learning.count_steps(num_steps, learned)

    def __call__(self, args: Sequence[torch.Tensor], is_replayed: bool = False) -> Step:
        run = self._replay if is_replayed else self._run
        with torch.no_grad(), plain_calls():
            loss, held, *rest = run(*args, *self.captured.fixed)
        num_grads = len(self.captured.parameters)
        return Step(loss, held, rest[:num_grads], rest[num_grads:])

    def announce(self) -> None:
        """Tells handlers around the loss, such as ``SVI.step``, which parameters were used."""
        announce_parameters(self.named)

    def compile(self, args: Sequence[torch.Tensor], background: bool) -> bool:
        """
        By Inductor.

        :return: whether it is done.
        :raises InductorError: if it failed.
        """
        if self._compilation is None:
            inputs = [*args, *self.captured.fixed]
            self._compilation = Compilation(self.captured.module, inputs, background)
        if self._compilation.is_done():
            self._run, self._compilation = self._compilation.result(), None
            self.is_compiled = True
        return self.is_compiled

    def replay(self) -> None:
        """Calls the operations one by one from now on, as the compiled program is wrong."""
        self._run, self.is_compiled = self._replay, False

    @property
    def is_due(self) -> bool:
        """Whether the next step is to be compared with the eager loss."""
        return self.calls + 1 >= self.next_check or (
            self._compilation is not None and self._compilation.is_done()
        )


class _Value(NamedTuple):
    """Of an argument: the tensor, its version, and a copy if it is small."""

    tensor: torch.Tensor
    version: int
    copy: Optional[torch.Tensor]

    @classmethod
    def make(cls, x: torch.Tensor) -> "_Value":
        return cls(x, _version(x), x.clone() if x.numel() <= _SMALL else None)

    def is_of(self, x: torch.Tensor) -> bool:
        if self.copy is not None:
            return torch.equal(self.copy, x)
        return x is self.tensor and _version(x) == self.version


def _version(x: torch.Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _kind(x: torch.Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, has_hooks(x)
