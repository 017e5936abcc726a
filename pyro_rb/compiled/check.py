# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Does a graph do what the eager loss does, from the same state and with the same random numbers?"""

from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

import torch
from pyro import get_param_store, poutine

from pyro_rb.compiled.graph import Gradient, Graph, Step
from pyro_rb.compiled.state import State
from pyro_rb.infer.util import parameter_table

#: Powers of the precision of floats: what may differ where operations are the same, where Inductor has fused them, and
#: where the same operations show that there is nothing else but that.
REPLAYED, COMPILED, ROUNDED = 0.75, 0.6, 0.4


class EagerStep:
    """
    A step of the eager loss, with which graphs can be compared.

    :param loss_and_grads: makes the step.
    :param modules: of model and guide.
    :param buffers: tensors that the step may change in place.
    """

    def __init__(
        self, loss_and_grads: Callable[[], Any], modules: Iterable[Any], buffers: Sequence[torch.Tensor]
    ) -> None:
        self._before = State(buffers)
        table = parameter_table()
        known = dict(table)
        parameters = list(dict.fromkeys([*table.values(), *(p for m in modules for p in m.parameters())]))
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with poutine.trace(param_only=True) as announced:
                loss = loss_and_grads()
            pairs = [(p, p.grad) for p in parameters if p.grad is not None]
        finally:
            for p, grad in zip(parameters, kept):
                p.grad = grad
        self.gradient = Gradient(loss, *zip(*pairs)) if pairs else Gradient(loss, (), ())
        #: Parameters that it announced, and the names of those that are new.
        self.named = {name: table[name] for name in announced.trace.nodes}
        self.new = [name for name, p in self.named.items() if known.get(name) is not p]
        self._after = State(buffers)
        #: Whether it drew random numbers by Python's random or by NumPy.
        self.draws_python = self._before.random_python() != self._after.random_python()

    def compare(self, graph: Graph, tensors: Sequence[torch.Tensor]) -> Optional[Tuple[str, str]]:
        """
        :param tensors: among the arguments.
        :return: what the graph does otherwise, and what only its program by Inductor does, but for
            rounding; each empty if there is nothing. None if what the graph takes for granted was
            not so.
        :raises Exception: if an operation of the graph does.
        """
        of_program = ""
        self._before.restore()
        try:
            step = graph(tensors)
            if step.held is not None and not step.held:
                return None
            parameters, eager = graph.captured.parameters, self.gradient
            problem = difference(step, parameters, eager, COMPILED if graph.is_compiled else REPLAYED)
            if problem and graph.is_compiled:
                # Is it the compiled program? The operations one by one tell.
                self._before.restore()
                if not difference(graph(tensors, is_replayed=True), parameters, eager, REPLAYED):
                    if difference(step, parameters, eager, ROUNDED):
                        of_program = problem
                    problem = ""
            return problem or self._after.compare(), of_program
        finally:
            self._after.restore()


def difference(step: Step, parameters: Sequence[torch.Tensor], eager: Gradient, power: float) -> str:
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
