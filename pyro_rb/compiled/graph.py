# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence

import torch
from pyro import get_param_store

from pyro_rb.compiled.background import Compilation
from pyro_rb.compiled.capture import Captured
from pyro_rb.compiled.reach import Reachable
from pyro_rb.compiled.replay import as_function
from pyro_rb.compiled.settle import Learning
from pyro_rb.compiled.torch_private import has_hooks, plain_calls
from pyro_rb.infer.util import announce_parameters, parameter_table

#: Powers of the precision of floats: what may differ where operations are the same, where Inductor has fused them, and
#: where the same operations show that there is nothing else but that.
REPLAYED, COMPILED, ROUNDED = 0.75, 0.6, 0.4


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


def _kind(x: torch.Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, has_hooks(x)


def difference(
    step: Step, parameters: Sequence[torch.Tensor], eager: Gradient, power: float
) -> str:
    """
    What is different between a step of a graph and one of the eager loss with the same random
    numbers; empty if nothing is, but for rounding.

    :param parameters: of the graph.
    :param power: of the precision of floats, which gives the relative error that is allowed.
    """
    found = {id(p): (p, g) for p, g in zip(parameters, step.grads)}
    expected = {id(p): (p, g) for p, g in zip(eager.parameters, eager.grads)}
    largest = max([size_of(g) for g in eager.grads], default=0.0)
    expected_loss = torch.as_tensor(eager.loss, dtype=step.loss.dtype, device=step.loss.device)
    if power < REPLAYED:  # weights of draws round as the log densities do that they are made of
        largest = max(largest, size_of(expected_loss))
    pairs: List[Any] = [("the loss", 1.0, step.loss, expected_loss)]
    for key in {**expected, **found}:
        p, g = expected.get(key) or found[key]
        other = torch.zeros_like(g)
        name = get_param_store().param_name(p) or "a parameter that is not in the param store"
        both = [pair[1] if pair else other for pair in (found.get(key), expected.get(key))]
        pairs.append((f"the gradient of {name}", 1e-2 * largest, *both))
    eps = max([torch.finfo(g.dtype).eps for g in eager.grads], default=1e-7)
    tolerance = eps**power
    for name, least, a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} has another shape or type"
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"{name} is not finite at the same places"
        error = size_of(a - b)
        if error > tolerance * (size_of(b) + least):
            return f"{name} is off by {error:.3g} of {size_of(b):.3g}"
    return ""


def size_of(x: torch.Tensor) -> float:
    """The largest of the finite numbers."""
    if not x.numel():
        return 0.0
    return float(x.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max())
