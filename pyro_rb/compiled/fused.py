# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

from pyro_rb.compiled.background import Compilation
from pyro_rb.compiled.check import ROUNDED, size_of
from pyro_rb.compiled.graph import Graph
from pyro_rb.compiled.replay import as_function
from pyro_rb.compiled.simplify import simplify
from pyro_rb.compiled.torch_private import foreach, plain_calls, trace
from pyro_rb.compiled.update import Update
from pyro_rb.infer.generators import get_torch_generators, set_torch_generators


class FusedSteps:
    """
    Steps of SVI as one graph: loss, gradient, and the update of the parameters in place; or as
    two for a single step, so that the loss can be looked at in between.

    :param graph: the loss and its gradient.
    :param optim: Pyro's optimizer, which has made a step of all parameters.
    :param int num_steps: the number of steps in the graph.
    :param args: the tensors among the arguments of a step.
    :param bool is_split: whether it is two graphs.
    :raises NotImplementedError: naming what there is no update for.
    """

    def __init__(
        self,
        graph: Graph,
        optim: Any,
        num_steps: int,
        args: Sequence[torch.Tensor],
        is_split: bool,
    ) -> None:
        self.num_steps = num_steps
        self._fixed, self._changed = graph.captured.fixed, graph.captured.changed
        self._parameters = graph.captured.parameters
        ours = {id(p) for p in self._parameters}
        for name, p in graph.named.items():
            if id(p) not in ours:
                raise NotImplementedError(f"no gradient of {name}")
        if len(graph.named) != len(ours):
            raise NotImplementedError("a parameter that is not in the param store")
        self.update = Update(optim, self._parameters)
        self._is_split = is_split
        self._kept: List[torch.Tensor] = []
        self._compilation: Optional[Compilation] = None
        self.is_compiled = False
        self._module = self._trace_update() if self._is_split else self._trace(graph, args)
        self._run: Callable[..., Any] = as_function(self._module)

    def _trace_update(self) -> torch.fx.GraphModule:
        num = len(self._parameters)

        def run(*inputs: torch.Tensor) -> Tuple[()]:
            self.update.apply(inputs[:num], inputs[num : 2 * num], inputs[2 * num :])
            return ()

        inputs = [*self._parameters, *self._parameters, *self.update.tensors]
        with torch.no_grad():
            module = trace(run, [x.detach().clone() for x in inputs])
        simplify(module)
        return module

    def _trace(self, graph: Graph, args: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        places = {id(x): i for i, x in enumerate(self._fixed)}
        changed = [places[id(x)] for x in self._changed]
        captured, update = graph.captured, self.update
        num_args, num_fixed = len(args), len(self._fixed)

        def run(*inputs: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            fixed, state = inputs[num_args:][:num_fixed], inputs[num_args + num_fixed :]
            parameters = [fixed[places[id(p)]] for p in captured.parameters]
            before = [fixed[i].clone() for i in changed]
            loss, held, *rest = captured.module(*inputs[:num_args], *fixed)
            is_good: Any = loss == loss if held is None else (loss == loss) & held
            # After a step that must be made again, no other is made.
            is_good = update.apply(parameters, rest[: len(parameters)], state, is_good)
            for i, value in zip(changed, before):
                fixed[i].copy_(torch.where(is_good, fixed[i], value))
            losses = torch.where(is_good, loss.double(), torch.nan).reshape(1)
            return (losses, *rest[len(parameters) :])

        inputs = [x.detach().clone() for x in [*args, *self._fixed, *update.tensors]]
        generators = get_torch_generators()
        with torch.no_grad():
            module = trace(run, inputs)
        set_torch_generators(generators)
        module = _repeat(module, self.num_steps)
        simplify(module)
        return module

    def compile(self, args: Sequence[torch.Tensor], background: bool) -> bool:
        """
        By Inductor.

        :return: whether it is done.
        :raises InductorError: if it failed.
        :raises RuntimeError: if the result is not what it is without.
        """
        if self._compilation is None:
            inputs = [*args, *self._fixed, *self.update.tensors]
            is_long = self.num_steps > 1
            self._compilation = Compilation(self._module, inputs, background, is_long)
        if not self._compilation.is_done():
            return False
        compiled, self._compilation = self._compilation.result(), None
        self.update.prepare()
        before = self._save()
        self._call(args)
        expected = self._save()
        self._restore(before)
        self._run, replay = compiled, self._run
        self._call(args)
        found = self._save()
        self._restore(before)
        eps = max(torch.finfo(p.dtype).eps for p in self._parameters)
        for i, (a, b) in enumerate(zip(found[0], expected[0])):
            # Adam makes whole steps of gradients that are nothing but rounding.
            if i < len(self._parameters):
                atol = 3 * self.update.largest_rate
            else:  # their state has squares of gradients
                atol = max(1e-5, 2 * eps**ROUNDED * size_of(b))
            if not torch.allclose(a, b, rtol=1e-3, atol=atol, equal_nan=True):
                self._run = replay
                raise RuntimeError("the compiled update differs from the one that is replayed")
        self.is_compiled = True
        return True

    def is_free(self) -> bool:
        """Whether no gradient of something else waits for the update."""
        for p in self._parameters:
            if p.grad is not None:
                if p.grad.any():
                    return False
                p.grad = None
        return True

    def __call__(self, graph: Graph, args: Sequence[torch.Tensor]) -> Optional[List[float]]:
        """
        :return: the losses, or None if nothing was done, as a loss is not a number, say.
        """
        graph.learning.take_scales()
        self.update.prepare()
        generators = get_torch_generators()
        # A single step that is not good changes nothing by itself.
        may_change = self.num_steps > 1 or (self._is_split and self._changed)
        if may_change:
            self._keep()
        try:
            if self._is_split:
                losses, learned = self._make_split(graph, args)
            else:
                found, *learned = self._call(args)
                losses = found.tolist()
        except Exception:  # which the step of the loss looks into
            losses, learned = [math.nan], ()
        if losses[-1] != losses[-1]:
            self.update.forget()
            if may_change:
                self._restore((self._kept, generators))
            set_torch_generators(generators)
            return None
        self.update.finish(self.num_steps)
        graph.count_steps(self.num_steps, learned)
        return losses

    def _make_split(self, graph: Graph, args: Sequence[torch.Tensor]) -> Tuple[List[float], Any]:
        step = graph(args)
        loss = step.loss.item()
        if loss == loss and (step.held is None or step.held):
            with torch.no_grad(), plain_calls():
                self._run(*self._parameters, *step.grads, *self.update.tensors)
            return [loss], step.learned
        return [math.nan], ()

    def _call(self, args: Sequence[torch.Tensor]) -> Any:
        with torch.no_grad(), plain_calls():
            return self._run(*args, *self._fixed, *self.update.tensors)

    def _tensors(self) -> List[torch.Tensor]:
        return [*self._parameters, *self._changed, *self.update.tensors]

    def _save(self) -> Tuple[List[torch.Tensor], Any]:
        return [x.detach().clone() for x in self._tensors()], get_torch_generators()

    def _keep(self) -> None:
        """Saves the tensors where they were saved before, in one operation."""
        tensors = self._tensors()
        if not self._kept:
            self._kept = [x.detach().clone() for x in tensors]
        with torch.no_grad():
            foreach("copy_")(self._kept, tensors)

    def _restore(self, saved: Tuple[List[torch.Tensor], Any]) -> None:
        with torch.no_grad():
            for x, value in zip(self._tensors(), saved[0]):
                x.copy_(value)
        set_torch_generators(saved[1])


def _repeat(module: torch.fx.GraphModule, num_steps: int) -> torch.fx.GraphModule:
    """A graph that changes its inputs in place, several times in a row."""
    if num_steps == 1:
        return module
    graph = torch.fx.Graph()
    inputs = {x: graph.node_copy(x) for x in module.graph.nodes if x.op == "placeholder"}
    results: List[Any] = [graph.graph_copy(module.graph, dict(inputs)) for _ in range(num_steps)]
    losses = [result[0] for result in results]
    graph.output((graph.call_function(torch.ops.aten.cat.default, (losses,)),))
    return torch.fx.GraphModule(module, graph)
